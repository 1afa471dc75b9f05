"""The recursion: v is carried along the logged steps (docs/method.md §3).

    dg_s = (C_s + λI) v_s + b_s
    v_{s+1} = JVP of Φ_s at θ_s along (v_s, dg_s),   or v_s − u_s where the step is skipped

With K = null all sources enter one joint vector, whatever their number. A finite K truncates each source on its own, so
each step with a source opens a window of K steps; the windows' end values add up, since the recursion is linear.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmc_dist.curvature import HVPConfig, Loss, LowRank, MicroBatch, hvp_apply, low_rank_basis
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector, dots
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedStep, edit_step
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.plan import gradients_per_basis, gradients_per_step
from lmc_dist.unlearn.source import micro_batches, share, source
from lmc_dist.update_rules import SGDTangent

logger = logging.getLogger(__name__)

# ‖v‖ beyond this multiple of all sources added up is divergence: a stable sweep keeps it near or below one.
GROWTH_LIMIT = 1e3
# A PSD curvature within the stability limit never lengthens v; a little room is left for weight changes between steps.
GROWTH_WARNING = 1.05


@dataclass
class Window:
    """A vector under propagation."""

    unit: str
    tz: int
    last_step: int  # last step it is propagated through
    v: ShardedVector
    v0_norm: float
    norm: float
    steps: int = 0
    hvp_calls: int = 0
    growth_max: float | None = None


@dataclass(frozen=True)
class SweepResult:
    """v at θ_τ, what was done, and its cost in gradients of a whole batch."""

    v: ShardedVector
    audit: tuple[AuditRecord, ...]
    gradients_equivalent: float


def sweep(
    trajectory: Trajectory,
    module: ShardedModule,
    loss: Loss,
    batches: BatchSource,
    counterfactual: Counterfactual,
    config: HVPConfig,
    K: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> SweepResult:
    """Propagates the sources of a request to the end of the trajectory. Collective.

    Args:
        trajectory: The logged run.
        module: The model on shards, laid out like the trajectory.
        loss: Its loss.
        batches: Samples by id.
        counterfactual: What "without the data" means.
        config: Curvature and damping.
        K: Steps each source is propagated; None is all.
        progress: Called with each step done.

    Raises:
        LmcError: Nothing to forget in the log, divergence, damaged log.
    """
    return _Sweep(trajectory, module, loss, batches, counterfactual, config, K).run(progress)


class _Sweep:
    def __init__(
        self,
        trajectory: Trajectory,
        module: ShardedModule,
        loss: Loss,
        batches: BatchSource,
        counterfactual: Counterfactual,
        config: HVPConfig,
        K: int | None,
    ) -> None:
        self.trajectory, self.module, self.loss, self.batches = trajectory, module, loss, batches
        self.counterfactual, self.config, self.K = counterfactual, config, K
        manifest = trajectory.manifest
        self.tangent = SGDTangent(trajectory.layout, manifest.parameters, manifest.optimizer["groups"])
        self.windows: list[Window] = []
        self.done: list[AuditRecord] = []
        self.total: ShardedVector
        self.basis: LowRank | None = None
        self.basis_step = 0
        self.missed: float | None = None
        self.cost = 0.0
        self.source_total = 0.0
        self.started = time.perf_counter()

    def run(self, progress: Callable[[int], None]) -> SweepResult:
        trajectory, tau = self.trajectory, self.trajectory.num_steps
        first = first_touched(trajectory, self.counterfactual)
        theta = trajectory.theta(first)
        self.total = theta.like(torch.zeros_like(theta.flat))
        for step in range(first, tau):
            record = trajectory.record(step)
            edited = edit_step(
                record, self.counterfactual, trajectory.manifest.loss_normalization, self.batches.num_targets
            )
            before = theta.clone()
            update = trajectory.advance(theta, step)
            injected = None
            if record.applied and not edited.skipped:
                injected = self._propagate(step, before, edited, update)
            self._measure(step)
            if record.applied and edited.skipped:
                injected = update * -1.0
            if injected is not None:
                self._add(step, injected)
            self._retire(step)
            progress(step)
        self._freeze(self.windows)
        growth = max((a.growth_max or 0.0 for a in self.done), default=0.0)
        if growth > GROWTH_WARNING:
            logger.warning(
                "the correction grew by up to %.2f a step: η·λ_max ≈ %.2f, beyond 2, where the recursion is unstable "
                "although training was not; compare with a replay before trusting it",
                growth,
                1 + growth,
            )
        return SweepResult(self.total, tuple(self.done), self.cost)

    def _propagate(
        self, step: int, theta: ShardedVector, edited: EditedStep, update: ShardedVector
    ) -> ShardedVector | None:
        """Carries the windows through the step; returns what the step's own source adds."""
        lrs = edited.record.lr
        active = [window for window in self.windows if step <= window.last_step]
        if active:
            micros = micro_batches(edited, self.batches, self.module, "kept") if self.config.uses_model else []
            gradient = self.tangent.gradient(theta, update, lrs) if self.config.mode == "fisher" else None
            vectors = [window.v for window in active]
            basis = self._basis(step, theta, micros, share(edited, "kept")) if self.config.mode == "low_rank" else None
            products = hvp_apply(vectors, self.config, self.module, self.loss, theta, micros, gradient, basis=basis)
            for window, dg in zip(active, products, strict=True):
                window.v = self.tangent(theta, window.v, dg, lrs)
                window.steps += 1
                window.hvp_calls += self.config.mode not in ("none", "low_rank")
            self.cost += gradients_per_step(self.config, len(active)) * share(edited, "kept")
        if not edited.is_changed:
            return None
        b = source(edited, theta, self.batches, self.module, self.loss)
        self.cost += share(edited, "source")
        return self.tangent(theta, b.like(torch.zeros_like(b.flat)), b, lrs)

    def _basis(self, step: int, theta: ShardedVector, micros: list[MicroBatch], part: float) -> LowRank:
        """The eigenpairs in use, taken anew every `refresh` logged steps."""
        if self.basis is None or step >= self.basis_step + self.config.refresh:
            self.basis, self.basis_step = low_rank_basis(self.config, self.module, self.loss, theta, micros), step
            self.missed = max(self.missed or 0.0, self.basis.missed)
            self.cost += gradients_per_basis(self.config, self.basis.products) * part
            for window in self.windows:
                window.hvp_calls += self.basis.products
        return self.basis

    def _add(self, step: int, injected: ShardedVector) -> None:
        """A source enters: the joint vector takes it up, or a window of its own opens."""
        size = injected.norm()
        self.source_total += size
        if self.K is None and self.windows:
            self.windows[0].v.add_(injected)
            self.windows[0].norm = self.windows[0].v.norm()
            return
        last = self.trajectory.num_steps - 1 if self.K is None else min(step + self.K, self.trajectory.num_steps - 1)
        unit = "joint" if self.K is None else f"step-{step}"
        self.windows.append(Window(unit, step, last, injected, v0_norm=size, norm=size))

    def _measure(self, step: int) -> None:
        """Norms of all windows after propagation (one all-reduce), growth, divergence."""
        if not self.windows:
            return
        for window, square in zip(self.windows, dots([(w.v, w.v) for w in self.windows]), strict=True):
            norm = math.sqrt(square) if square >= 0 else math.nan
            if not math.isfinite(norm) or norm > GROWTH_LIMIT * max(self.source_total, 1e-300):
                raise LmcError(
                    f"unit {window.unit}: the correction diverged at step {step}, ‖v‖ = {norm:.3g} after sources of "
                    f"{self.source_total:.3g} together (last growth {norm / max(window.norm, 1e-300):.3g} a step): "
                    "η·λ_max > 2 on these steps. Use a smaller K, or replay_head=all"
                )
            if window.norm > 0:
                window.growth_max = max(window.growth_max or 0.0, norm / window.norm)
            window.norm = norm

    def _retire(self, step: int) -> None:
        """Freezes the windows that are through."""
        self._freeze([window for window in self.windows if step >= window.last_step])
        self.windows = [window for window in self.windows if step < window.last_step]

    def _freeze(self, finished: list[Window]) -> None:
        for window in finished:
            self.total.add_(window.v)
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
            mode=self.config.mode,
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
