"""What a correction is computed from, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmc_dist.curvature import HVPConfig, Loss
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.units import JOINT


@dataclass(frozen=True)
class Problem:
    """What a correction is computed from.

    Attributes:
        trajectory: The logged run.
        module: The model on shards, laid out like the trajectory. None with `kept`, where the log keeps gradients and
            whole batches are forgotten.
        loss: Its loss.
        batches: Samples by id; None as `module`.
        counterfactual: What "without the data" means.
        config: Curvature and damping.
        K: Steps each source is propagated; None is all.
        kept: Curvature computed before, in place of the model's.
        tol: A unit stops once what it would still move, by its pace over the last steps, is below this share of ‖v‖.
        block: Vectors that share a curvature product; None is all that are under way.
        is_finite: Whether the optimizer's steps are taken as they are, and not by their tangent.
    """

    trajectory: Trajectory
    module: ShardedModule | None
    loss: Loss
    batches: BatchSource | None
    counterfactual: Counterfactual
    config: HVPConfig
    K: int | None = None
    kept: KeptCurvature | None = None
    tol: float | None = None
    block: int | None = None
    is_finite: bool = False


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found for a unit.

    Attributes:
        v: θ̂_τ − θ_τ.
        audit: One record, or one for each window where K truncates.
        gradients_equivalent: Cost in gradients of a whole batch, of all units of the sweep up to here.
        state: dσ_τ by kind, of the windows that ran to the end; a window that was cut off keeps the actual state.
        behind: Steps by which their optimizer's counter lags behind the actual one.
        step: The actual counter at the end.
        unit: Whose.
    """

    v: ShardedVector
    audit: tuple[AuditRecord, ...]
    gradients_equivalent: float
    state: Mapping[str, ShardedVector] = field(default_factory=dict)
    behind: int = 0
    step: int = 0
    unit: str = JOINT
