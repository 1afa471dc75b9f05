"""The correction: computed, stored, applied. θ̂ = θ + v."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.curvature import HVPConfig, Loss, TokenCrossEntropy
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import ShardReader, write_shard_file
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.record import StepRecord, Trajectory, TrajectoryManifest
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.kept_sweep import kept_sweep
from lmc_dist.unlearn.request import check_request
from lmc_dist.unlearn.sweep import sweep
from lmc_dist.update_rules import check_supported


@dataclass(frozen=True)
class Correction:
    """v and what is known about it.

    Attributes:
        v: θ̂_τ − θ_τ, sharded like the trajectory, float32 or better.
        audit: One record a forget unit.
        gradients_equivalent: Cost in gradients of a whole training batch.
        theta_hat: The corrected weights where the method found them itself (replay): θ + v can round differently.
    """

    v: ShardedVector
    audit: tuple[AuditRecord, ...]
    gradients_equivalent: float
    theta_hat: ShardedVector | None = None

    def corrected(self, theta: ShardedVector) -> ShardedVector:
        """θ̂ = θ + v."""
        return theta + self.v if self.theta_hat is None else self.theta_hat

    def save(self, folder: str | Path) -> None:
        """Writes this rank's shards; readable at any world size. Every rank calls."""
        tensors = dict(self.v.items())
        write_shard_file(Path(folder), self.v.layout, tensors, {"kind": "correction"})


def load_correction(folder: str | Path, layout: ShardLayout, like: ShardedVector) -> ShardedVector:
    """v as `Correction.save` wrote it, at the layout of this rank. Local."""
    return ShardReader(Path(folder), layout, "zero3", f"correction {folder}").read(like.flat.dtype)


def compute_correction(
    trajectory: Trajectory,
    module: ShardedModule | None,
    batches: BatchSource | None,
    counterfactual: Counterfactual,
    config: HVPConfig | None = None,
    K: int | None = None,
    loss: Loss | None = None,
    progress: Callable[[int], None] = lambda step: None,
    kept: KeptCurvature | None = None,
) -> Correction:
    """v for a request, propagated through the logged steps (docs/method.md §3). Collective.

    Args:
        trajectory: The logged run, on disk or in memory.
        module: The model on shards, laid out like the trajectory.
        batches: Samples by id.
        counterfactual: The request.
        config: Curvature and damping; None is GGN without damping.
        K: Steps each source is propagated through; None is all.
        loss: The model's loss; None is next-token cross-entropy.
        progress: Called with each step done.
        kept: `low_rank`: curvature computed before (`lmc log curvature`), in place of the model. Batches are then
            forgotten from the log alone: `module` and `batches` may be None.

    Raises:
        LmcError: Before any long work, on every rank: unknown ids, unsupported optimizer, active clipping, missing
            steps, K < 0. During it: divergence, damaged files.
    """
    config = config or HVPConfig()
    with agreement(trajectory.layout.group):
        if module is not None and module.layout != trajectory.layout:
            raise LmcError("the module's shards are laid out differently from the trajectory's")
        if kept is not None and config.mode != "low_rank":
            raise LmcError(f"kept curvature serves hessian_mode 'low_rank', not '{config.mode}'")
        if (module is None or batches is None) and (kept is None or counterfactual.kind != "skip"):
            raise LmcError("only batches (counterfactual 'skip') on kept curvature need neither module nor batches")
        if K is not None and K < 0:
            raise LmcError(f"K must be ≥ 0 or null, got {K}")
        manifest = trajectory.manifest
        records = list(trajectory.records())
        touched = check_request(counterfactual, records, batches, manifest.loss_normalization)
        if not touched:
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        first = touched[0].step
        trajectory.require(first)
        check_update_rule(manifest, records, first)
        if kept is not None:
            kept.require(first, trajectory.num_steps)
    loss = loss or TokenCrossEntropy()
    if kept is not None:
        result = kept_sweep(trajectory, kept, module, loss, batches, counterfactual, config, K, progress)
    else:
        assert module is not None and batches is not None
        result = sweep(trajectory, module, loss, batches, counterfactual, config, K, progress)
    return Correction(result.v, result.audit, result.gradients_equivalent)


def check_update_rule(manifest: TrajectoryManifest, records: Iterable[StepRecord], first: int) -> None:
    """Checks that the tangent of every step ≥ first is known. Local.

    Raises:
        LmcError: Another optimizer than plain SGD, or steps whose gradient was clipped.
    """
    check_supported(manifest.optimizer)
    clipped = [r.step for r in records if r.step >= first and r.applied and r.clip_coef < 1]
    if clipped:
        raise LmcError(
            f"{len(clipped)} steps were clipped, the first at {clipped[0]} (max_grad_norm={manifest.max_grad_norm}): "
            "the tangent of clipping is not available yet; use replay_head=all"
        )


def apply_correction(target: Any, correction: Correction | ShardedVector) -> str:
    """θ ← θ + v in a live engine; returns the checksum of the new θ. Collective.

    Masters, working shards and persistent parameters are set, and checked by hash on every rank.

    Args:
        target: A DeepSpeed ZeRO-3 engine, or a `ShardedVector` θ, changed in place.
        correction: v, laid out like the target.

    Raises:
        LmcError: Other layout, unsupported engine, or copies that disagree afterwards.
    """
    v = correction.v if isinstance(correction, Correction) else correction
    if isinstance(target, ShardedVector):
        if target.layout != v.layout:
            raise LmcError("the correction is laid out differently from the vector it should be added to")
        return checksum(target.add_(v))
    shards = engine_shards(target)
    theta = shards.read()
    if theta.layout != v.layout:
        raise LmcError("the correction is laid out differently from the engine: other parameters or world size")
    theta.add_(v)
    shards.write(theta)
    return checksum(theta)
