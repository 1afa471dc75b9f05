"""The recursion: (v, dσ) is carried along the logged steps (docs/method.md §3).

    dg_s = (C_s + λI) v_s + b_s
    (v_{s+1}, dσ_{s+1}) = JVP of Φ_s at (θ_s, σ_s, g_s) along (v_s, dσ_s, dg_s),   or less what the step did if it is skipped

With K = null all sources enter one joint vector, whatever their number. A finite K truncates each source on its own, so
each step with a source opens a window of K steps; the windows' end values add up, since the recursion is linear.

Skipped steps leave the counterfactual optimizer's counter behind the actual one. All later steps are linearised with its
counter, and the finite difference between Φ with the one counter and with the other is a source of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lmc_dist.curvature import HVPConfig, Loss, LowRank, MicroBatch, hvp_apply, low_rank_basis
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedStep, edit_step
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.audit import AuditRecord
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

    Raises:
        LmcError: Nothing to forget in the log, divergence, damaged log, an update rule that the log does not follow.
    """
    return _Sweep(trajectory, module, loss, batches, counterfactual, config, K, kept).run(progress)


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
    ) -> None:
        self.trajectory, self.module, self.loss, self.batches = trajectory, module, loss, batches
        self.counterfactual, self.config, self.K, self.kept = counterfactual, config, K, kept
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
        here, update = self.path.step(step, self.config.mode == "fisher" and is_taken and bool(active))
        b = None
        if is_taken:
            behind = sum(window.behind for window in active)
            if edited.is_changed:
                b = self._source(edited, here)
            self._propagate(step, here, edited, active)
        self.guard.measure(self.windows, step)
        if b is not None:
            (injected,) = self.rule.tangents(here, [(self.rule.no_deviation(b), b)], behind)
            self._add(step, here, injected, b)
        elif record.applied and edited.skipped:
            after = self.path.state.vectors
            state = {key: (after[key] - vector).scale_(-1.0) for key, vector in here.state.vectors.items()}
            self._add(step, here, Deviation(update * -1.0, state), None)
        self._retire(step)

    def _source(self, edited: EditedStep, here: Point) -> ShardedVector:
        assert self.module is not None and self.batches is not None
        self.cost += share(edited, "source")
        return source(edited, here.theta, self.batches, self.module, self.loss)

    def _propagate(self, step: int, here: Point, edited: EditedStep, active: list[Window]) -> None:
        """Carries the windows through a step that the counterfactual run takes as well."""
        if not active:
            return
        products = self._products(step, here, edited, active)
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

    def _products(self, step: int, here: Point, edited: EditedStep, active: list[Window]) -> list[ShardedVector]:
        """(C_s + λI) v of each window."""
        config, vectors = self.config, [window.at.v for window in active]
        if self.kept is not None:
            found = self.kept.window(step).curvature(vectors)
            return [c.add_(v, alpha=config.damping) for c, v in zip(found, vectors, strict=True)]
        assert self.module is not None and self.batches is not None
        micros = micro_batches(edited, self.batches, self.module, "kept") if config.uses_model else []
        gradient = here.gradient if config.mode == "fisher" else None
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
            replay_head=0,
            stopped_by="K" if window.last_step < tau - 1 else "end",
            seconds=time.perf_counter() - self.started,
            growth_max=window.growth_max,
            missed=self.missed,
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
