"""The recursion: (v, dσ) is carried along the logged steps (docs/method.md §3).

    dg_s = (C_s + λI) v_s + b_s
    (v_{s+1}, dσ_{s+1}) = JVP of Φ_s at (θ_s, σ_s, g_s) along (v_s, dσ_s, dg_s),   or less what the step did if it is skipped

With K = null all sources enter one joint vector, whatever their number. A finite K truncates each source on its own, so
each step with a source opens a window of K steps; the windows' end values add up, since the recursion is linear.

The first steps can be replayed instead (unlearn/head.py).

Skipped steps leave the counterfactual optimizer's counter behind the actual one. All later steps are linearised with its
counter, and the finite difference between Φ with the one counter and with the other is a source of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lmc_dist.curvature import HVPConfig, Loss, LowRank, MicroBatch, hvp_apply, low_rank_basis
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedStep, edit_step
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.head import Head
from lmc_dist.unlearn.path import TrainingPath
from lmc_dist.unlearn.plan import gradients_per_basis, gradients_per_step
from lmc_dist.unlearn.source import micro_batches, share, source
from lmc_dist.unlearn.windows import GrowthGuard, Window
from lmc_dist.update_rules import Deviation, Point


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        v: θ̂_τ − θ_τ.
        audit: One record a unit.
        gradients_equivalent: Cost in gradients of a whole batch.
        state: dσ_τ by kind, of the windows that ran to the end; a window that was cut off keeps the actual state.
        behind: Steps by which their optimizer's counter lags behind the actual one.
        step: The actual counter at the end.
    """

    v: ShardedVector
    audit: tuple[AuditRecord, ...]
    gradients_equivalent: float
    state: Mapping[str, ShardedVector] = field(default_factory=dict)
    behind: int = 0
    step: int = 0


def sweep(
    trajectory: Trajectory,
    module: ShardedModule | None,
    loss: Loss,
    batches: BatchSource | None,
    counterfactual: Counterfactual,
    config: HVPConfig,
    K: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
    kept: KeptCurvature | None = None,
    head: Head | None = None,
) -> SweepResult:
    """Propagates the sources of a request to the end of the trajectory. Collective.

    Args:
        trajectory: The logged run.
        module: The model on shards, laid out like the trajectory. None with `kept`, where the log keeps gradients and
            whole batches are forgotten.
        loss: Its loss.
        batches: Samples by id; None as `module`.
        counterfactual: What "without the data" means.
        config: Curvature and damping.
        K: Steps each source is propagated; None is all.
        progress: Called with each step done, from the first that holds forgotten data.
        kept: Curvature computed before, in place of the model's.
        head: Steps to replay first; None is none.

    Raises:
        LmcError: Nothing to forget in the log, divergence, damaged log, an update rule that the log does not follow.
    """
    return _Sweep(trajectory, module, loss, batches, counterfactual, config, K, kept, head).run(progress)


class _Sweep:
    total: Deviation

    def __init__(
        self,
        trajectory: Trajectory,
        module: ShardedModule | None,
        loss: Loss,
        batches: BatchSource | None,
        counterfactual: Counterfactual,
        config: HVPConfig,
        K: int | None,
        kept: KeptCurvature | None,
        head: Head | None,
    ) -> None:
        self.trajectory, self.module, self.loss, self.batches = trajectory, module, loss, batches
        self.counterfactual, self.config, self.K, self.kept = counterfactual, config, K, kept
        self.head = head or Head(0, 0.05)
        self.path = TrainingPath(trajectory, module, loss, batches)
        self.rule = self.path.rule
        self.guard = GrowthGuard(self.rule)
        self.windows: list[Window] = []
        self.done: list[AuditRecord] = []
        self.behind = 0
        self.basis: LowRank | None = None
        self.basis_step = 0
        self.missed = None if kept is None else max(window.curvature.missed for window in kept.windows)
        self.cost = 0.0
        self.started = time.perf_counter()

    def run(self, progress: Callable[[int], None]) -> SweepResult:
        trajectory, path, tau = self.trajectory, self.path, self.trajectory.num_steps
        first = first_touched(trajectory, self.counterfactual)
        rates = [trajectory.record(step).lr for step in range(first, tau)]
        self.peak = tuple(max(rate) for rate in zip(*rates, strict=True))
        start = path.start(first)
        path.seek(start)
        self.total = self.rule.no_deviation(path.theta)
        with trajectory.read_ahead(start, tau):
            for step in range(start, first):
                path.step(step)
            for step in range(first, tau):
                self._step(step)
                progress(step)
        self.guard.warn(max((a.growth_max or 0.0 for a in self.done), default=0.0))
        cost, total = self.cost + path.cost, self.total
        return SweepResult(total.v, tuple(self.done), cost, total.state, self.behind, path.state.step)

    def _step(self, step: int) -> None:
        """One step of training, and the windows along with it."""
        record = self.trajectory.record(step)
        counts = None if self.batches is None else self.batches.num_targets
        normalization = self.trajectory.manifest.loss_normalization
        edited = edit_step(record, self.counterfactual, normalization, counts)  # type: ignore[arg-type]
        active = [window for window in self.windows if step <= window.last_step]
        is_taken = record.applied and not edited.skipped
        is_asked = self.head.is_on or self.config.mode in ("fisher", "secant")
        here, update = self.path.step(step, is_asked and is_taken)
        b = self._source(edited, here) if is_taken and edited.is_changed else None
        if self.head.is_on:
            self._replay(step, here, edited, update, b)
        else:
            injected = self._linear(step, here, edited, update, active, b)
            self.guard.measure(self.windows, step)
            if injected is not None:
                self._add(step, here, injected, b)
        self._retire(step)

    def _source(self, edited: EditedStep, here: Point) -> ShardedVector:
        assert self.module is not None and self.batches is not None
        self.cost += share(edited, "source")
        return source(edited, here.theta, self.batches, self.module, self.loss)

    def _linear(
        self,
        step: int,
        here: Point,
        edited: EditedStep,
        update: ShardedVector,
        windows: list[Window],
        b: ShardedVector | None,
    ) -> Deviation | None:
        """Carries windows through the step by its tangent; returns what its source adds."""
        if edited.record.applied and edited.skipped:
            return self._taken_back(here, update)
        if not edited.record.applied:
            return None
        behind = sum(window.behind for window in windows)
        self._propagate(step, here, edited, windows, b)
        if b is None:
            return None
        return self.rule.tangents(here, [(self.rule.no_deviation(b), b)], behind)[0]

    def _taken_back(self, here: Point, update: ShardedVector) -> Deviation:
        """What it adds that the counterfactual run skips a step that was taken."""
        after = self.path.state.vectors
        state = {key: (after[key] - vector).scale_(-1.0) for key, vector in here.state.vectors.items()}
        return Deviation(update * -1.0, state)

    def _replay(
        self, step: int, here: Point, edited: EditedStep, update: ShardedVector, b: ShardedVector | None
    ) -> None:
        """A step of the head: the joint window takes it as it is, and the trial, if there is one, by its tangent."""
        is_skipped = edited.record.applied and edited.skipped
        trial, hvp_calls = self.head.trial, 0
        if trial is not None:
            injected = self._linear(step, here, edited, update, [trial], b)
            if injected is not None:
                trial.at.add_(injected)
                trial.behind += is_skipped
            hvp_calls, trial.hvp_calls = trial.hvp_calls, 0
        if not self.windows:
            nothing = self.rule.no_deviation(here.theta)
            unit = "joint" if self.K is None else f"head-{step}"
            self.windows.append(Window(unit, step, self.trajectory.num_steps - 1, nothing, 0.0, 0.0, last_source=step))
        (joint,) = self.windows
        joint.hvp_calls += hvp_calls
        if is_skipped or b is not None:
            self.guard.enter(self._reach(here, b))
            joint.last_source = step
        if is_skipped:
            joint.at.add_(self._taken_back(here, update))
            joint.behind += 1
        elif edited.record.applied:
            joint.at = self.rule.difference(here, joint.at, self._change(step, here, edited, joint, b), joint.behind)
            joint.steps += step > joint.tz
        self.guard.measure(self.windows, step)
        if step == joint.tz:
            joint.v0_norm = joint.norm
        self.head.advance(joint)
        if not self.head.is_on and self.K is not None:
            assert joint.last_source is not None
            joint.last_step = min(max(joint.last_source + self.K, step), joint.last_step)

    def _change(
        self, step: int, here: Point, edited: EditedStep, joint: Window, b: ShardedVector | None
    ) -> ShardedVector:
        """∇L_s(θ_s + v_s; w') − ∇L_s(θ_s; w) of a step that is replayed."""
        if step == joint.tz and b is not None:
            return b  # v = 0
        assert self.module is not None and self.batches is not None
        micros = micro_batches(edited, self.batches, self.module, "kept")
        self.cost += share(edited, "kept")
        changed = weighted_gradient(self.module, self.loss, here.theta + joint.at.v, micros)
        changed = changed - self._gradient(step, here, edited, b)
        return changed if b is None else changed.add_(b)

    def _gradient(self, step: int, here: Point, edited: EditedStep, b: ShardedVector | None) -> ShardedVector:
        """∇L_s(θ_s; w'), as the module here computes it: of the logged one where training did so as well."""
        if self.path.is_precise(step):
            assert here.gradient is not None
            return here.gradient if b is None else here.gradient + b
        assert self.module is not None and self.batches is not None
        self.cost += share(edited, "kept")
        micros = micro_batches(edited, self.batches, self.module, "kept")
        return weighted_gradient(self.module, self.loss, here.theta, micros)

    def _propagate(
        self, step: int, here: Point, edited: EditedStep, active: list[Window], b: ShardedVector | None
    ) -> None:
        """Carries the windows through a step that the counterfactual run takes as well."""
        if not active:
            return
        products = self._products(step, here, edited, active, b)
        along = [(window.at, dg) for window, dg in zip(active, products, strict=True)]
        moved = self.rule.tangents(here, along, sum(window.behind for window in active))
        behind = 0
        for window, at in zip(active, moved, strict=True):
            # Each window answers for its own skipped steps, so that the windows add up to the joint counter.
            gap = self.rule.clock_gap(here, behind + window.behind, behind)
            behind += window.behind
            window.at, window.steps = at, window.steps + 1
            if gap is not None:
                window.at.add_(gap)
                self.guard.enter(gap.v.norm())

    def _products(
        self, step: int, here: Point, edited: EditedStep, active: list[Window], b: ShardedVector | None
    ) -> list[ShardedVector]:
        """(C_s + λI) v of each window."""
        config, vectors = self.config, [window.at.v for window in active]
        if self.kept is not None:
            found = self.kept.window(step).curvature(vectors)
            return [c.add_(v, alpha=config.damping) for c, v in zip(found, vectors, strict=True)]
        assert self.module is not None and self.batches is not None
        micros = micro_batches(edited, self.batches, self.module, "kept") if config.uses_model else []
        gradient = here.gradient if config.mode == "fisher" else None
        if config.mode == "secant":
            gradient = self._gradient(step, here, edited, b)
        basis = self._basis(step, here.theta, micros, share(edited, "kept")) if config.mode == "low_rank" else None
        for window in active:
            window.hvp_calls += config.mode not in ("none", "low_rank")
        self.cost += gradients_per_step(config, len(active)) * share(edited, "kept")
        return hvp_apply(vectors, config, self.module, self.loss, here.theta, micros, gradient, basis=basis)

    def _basis(self, step: int, theta: ShardedVector, micros: list[MicroBatch], part: float) -> LowRank:
        """The eigenpairs in use, taken anew every `refresh` logged steps."""
        assert self.module is not None
        if self.basis is None or step >= self.basis_step + self.config.refresh:
            self.basis, self.basis_step = low_rank_basis(self.config, self.module, self.loss, theta, micros), step
            self.missed = max(self.missed or 0.0, self.basis.missed)
            self.cost += gradients_per_basis(self.config, self.basis.products) * part
            for window in self.windows:
                window.hvp_calls += self.basis.products
        return self.basis

    def _add(self, step: int, here: Point, injected: Deviation, b: ShardedVector | None) -> None:
        """A source enters (a skipped step where b is None): the joint window takes it up, or one of its own opens."""
        size = injected.v.norm()
        self.guard.enter(self._reach(here, b) if self.rule.keys else size)
        behind = int(b is None)
        if self.K is None and self.windows:
            joint = self.windows[0]
            joint.at.add_(injected)
            joint.behind += behind
            joint.norm = joint.at.v.norm()
            return
        end = self.trajectory.num_steps - 1
        last = end if self.K is None else min(step + self.K, end)
        unit = "joint" if self.K is None else f"step-{step}"
        self.windows.append(Window(unit, step, last, injected, v0_norm=size, norm=size, behind=behind))

    def _reach(self, here: Point, b: ShardedVector | None) -> float:
        """How far a source moves θ in one step at the run's largest learning rate.

        An optimizer with momentum moves θ by it later as well, and at warm-up its own step may be 0.
        """
        at = replace(here, lrs=self.peak)
        if b is None:
            return (self.rule.apply(at)[0] - here.theta).norm()
        return self.rule.tangents(at, [(self.rule.no_deviation(b), b)])[0].v.norm()

    def _retire(self, step: int) -> None:
        """Freezes the windows that are through."""
        self._freeze([window for window in self.windows if step >= window.last_step])
        self.windows = [window for window in self.windows if step < window.last_step]

    def _freeze(self, finished: list[Window]) -> None:
        for window in finished:
            if window.last_step == self.trajectory.num_steps - 1:
                self.total.add_(window.at)
                self.behind += window.behind
            else:
                self.total.v.add_(window.at.v)
            self.done.append(self._audit(window))

    def _audit(self, window: Window) -> AuditRecord:
        tau = self.trajectory.num_steps
        return AuditRecord(
            unit=window.unit,
            tz=window.tz,
            tau=tau,
            K_used=window.steps,
            v_norm=window.norm,
            v0_norm=window.v0_norm,
            hvp_calls=window.hvp_calls,
            mode=self.config.mode if self.kept is None else f"low_rank:{self.kept.name}",
            damping=self.config.damping,
            counterfactual=self.counterfactual.kind,
            replay_head=self.head.steps if window.last_source is not None else 0,
            stopped_by="K" if window.last_step < tau - 1 else "end",
            seconds=time.perf_counter() - self.started,
            growth_max=window.growth_max,
            missed=self.missed,
            head_error=self.head.error if window.last_source is not None else None,
        )


def first_touched(trajectory: Trajectory, counterfactual: Counterfactual) -> int:
    """First applied step that holds forgotten data.

    Raises:
        LmcError: There is none.
    """
    for step in range(trajectory.first_step, trajectory.num_steps):
        record = trajectory.record(step)
        if record.applied and counterfactual.touches(record):
            return step
    raise LmcError("no logged step holds any of the forgotten data: there is nothing to correct")
