"""The recursion on kept curvature: from source to source in closed form, no model, and data for the sources only.

Between two sources the steps of plain SGD are a product of commuting matrices, so an eigencomponent is scaled by
Π_s (1 − η_s (λ_i + λ + w)); see curvature/low_rank.py. Where groups differ in learning rate or weight decay the matrices
do not commute, and steps are taken one by one; they still read nothing from the log.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise

from lmc_dist.curvature import HVPConfig, Loss
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedStep, edit_step
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.record import StepRecord, Trajectory
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.problem import SweepResult
from lmc_dist.unlearn.source import share, source
from lmc_dist.unlearn.status import Progress, Status, unwatched
from lmc_dist.unlearn.windows import GROWTH_LIMIT
from lmc_dist.update_rules import Deviation, Point, UpdateRule


def kept_sweep(
    trajectory: Trajectory,
    kept: KeptCurvature,
    module: ShardedModule | None,
    loss: Loss,
    batches: BatchSource | None,
    counterfactual: Counterfactual,
    config: HVPConfig,
    K: int | None = None,
    progress: Progress = unwatched,
) -> SweepResult:
    """Propagates the sources of a request on kept curvature, for plain SGD. Collective; arguments as `sweep`.

    `module` and `batches` may be None for `skip`, whose sources are logged updates.

    Raises:
        LmcError: Nothing to forget, steps without curvature, divergence.
    """
    return _KeptSweep(trajectory, kept, module, loss, batches, counterfactual, config, K).run(progress)


class _KeptSweep:
    def __init__(
        self,
        trajectory: Trajectory,
        kept: KeptCurvature,
        module: ShardedModule | None,
        loss: Loss,
        batches: BatchSource | None,
        counterfactual: Counterfactual,
        config: HVPConfig,
        K: int | None,
    ) -> None:
        self.trajectory, self.kept, self.module, self.loss, self.batches = trajectory, kept, module, loss, batches
        self.counterfactual, self.config, self.K = counterfactual, config, K
        manifest = trajectory.manifest
        self.groups = manifest.optimizer["groups"]
        self.rule = UpdateRule(trajectory.layout, manifest.parameters, manifest.optimizer)
        self.edited: dict[int, EditedStep] = {}
        self.records = {record.step: record for record in trajectory.records()}
        self.cost = 0.0

    def run(self, progress: Progress) -> SweepResult:
        tau, started = self.trajectory.num_steps, time.perf_counter()
        touched = [r for r in self.records.values() if r.applied and self.counterfactual.touches(r)]
        if not touched:
            raise LmcError("no logged step holds any of the forgotten data: there is nothing to correct")
        self.kept.require(touched[0].step, tau)
        for record in touched:
            counts = None if self.batches is None else self.batches.num_targets
            normalization = self.trajectory.manifest.loss_normalization
            self.edited[record.step] = edit_step(record, self.counterfactual, normalization, counts)  # type: ignore[arg-type]
        work = self._joint if self.K is None else self._windows
        v, audit = work(touched, tau, started, progress)
        norm = v.norm()
        progress(Status(tau - 1, 1, 0, 0, norm, norm))
        return SweepResult(v, tuple(audit), self.cost)

    def _joint(
        self, touched: list[StepRecord], tau: int, started: float, progress: Progress
    ) -> tuple[ShardedVector, list[AuditRecord]]:
        """All sources in one vector."""
        first = touched[0].step
        v = self._source(touched[0])
        v0_norm = sizes = v.norm()
        for before, record in pairwise(touched):
            v = self._through(v, before.step + 1, record.step + 1)
            injected = self._source(record)
            sizes += injected.norm()
            v.add_(injected)
            norm = self._check(v, record.step, sizes)
            progress(Status(record.step, 0, 1, 1, norm, norm))
        v = self._through(v, touched[-1].step + 1, tau)
        return v, [self._audit("joint", first, v0_norm, v, tau - first - 1, "end", started, sizes)]

    def _windows(
        self, touched: list[StepRecord], tau: int, started: float, progress: Progress
    ) -> tuple[ShardedVector, list[AuditRecord]]:
        """Each source through K steps of its own."""
        assert self.K is not None
        audit, total = [], None
        for record in touched:
            v, stop = self._source(record), min(record.step + 1 + self.K, tau)
            size = v.norm()
            v = self._through(v, record.step + 1, stop)
            by, steps = "K" if stop < tau else "end", stop - record.step - 1
            audit.append(self._audit(f"step-{record.step}", record.step, size, v, steps, by, started, size))
            total = v if total is None else total.add_(v)
            norm = audit[-1].v_norm
            progress(Status(record.step, 0, 1, 1, norm, norm))
        assert total is not None
        return total, audit

    def _source(self, record: StepRecord) -> ShardedVector:
        """What the step's own source adds to v."""
        edited = self.edited[record.step]
        if edited.skipped:
            return self.trajectory.update(record.step) * -1.0
        if self.module is None or self.batches is None:
            raise LmcError(
                "sources of samples are gradients: pass module= and batches= (batches with 'skip' need none)"
            )
        theta = self.trajectory.theta(record.step)
        b = source(edited, theta, self.batches, self.module, self.loss)
        self.cost += share(edited, "source")
        return self._tangent(theta, b * 0.0, b, record)

    def _through(self, v: ShardedVector, start: int, stop: int) -> ShardedVector:
        """v after the steps [start, stop), which have no source of their own to add."""
        span: list[StepRecord] = []
        for step in range(start, stop):
            if span and self.kept.window(step) is not self.kept.window(span[0].step):
                v, span = self._span(v, span), []
            skipped = step in self.edited and self.edited[step].skipped
            if self.records[step].applied and not skipped:
                span.append(self.records[step])
        return self._span(v, span) if span else v

    def _span(self, v: ShardedVector, span: list[StepRecord]) -> ShardedVector:
        """v after steps of one window."""
        curvature, damping = self.kept.window(span[0].step).curvature, self.config.damping
        decays = {float(group.get("weight_decay", 0.0)) for group in self.groups}
        if len(decays) == 1 and all(len(set(record.lr)) == 1 for record in span):
            return curvature.propagate(v, [record.lr[0] for record in span], damping, decays.pop())
        for record in span:
            dg = curvature([v])[0].add_(v, alpha=damping)
            v = self._tangent(v, v, dg, record)  # SGD is linear: where it is taken does not matter
        return v

    def _tangent(self, theta: ShardedVector, v: ShardedVector, dg: ShardedVector, record: StepRecord) -> ShardedVector:
        return self.rule.tangents(Point(theta, record.lr), [(Deviation(v), dg)])[0].v

    def _check(self, v: ShardedVector, step: int, sizes: float) -> float:
        norm = v.norm()
        if not math.isfinite(norm) or norm > GROWTH_LIMIT * max(sizes, 1e-300):
            raise LmcError(
                f"the correction diverged on kept curvature '{self.kept.name}' by step {step}: ‖v‖ = {norm:.3g} after "
                f"sources of {sizes:.3g} together: η·λ_max > 2 there. Use a smaller K, or replay_head=all"
            )
        return norm

    def _audit(
        self,
        unit: str,
        tz: int,
        v0_norm: float,
        v: ShardedVector,
        steps: int,
        stopped_by: str,
        started: float,
        sizes: float,
    ) -> AuditRecord:
        tau = self.trajectory.num_steps
        return AuditRecord(
            unit=unit,
            tz=tz,
            tau=tau,
            K_used=steps,
            v_norm=self._check(v, tau - 1, sizes),
            v0_norm=v0_norm,
            hvp_calls=0,
            mode=f"low_rank:{self.kept.name}",
            damping=self.config.damping,
            counterfactual=self.counterfactual.kind,
            replay_head=0,
            stopped_by=stopped_by,
            seconds=time.perf_counter() - started,
            growth_max=None,
            missed=max(window.curvature.missed for window in self.kept.windows),
        )
