"""The correction: computed, stored, applied. θ̂ = θ + v, σ̂ = σ + dσ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lmc_dist.curvature import HVPConfig, Loss, TokenCrossEntropy
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.codec import Compression
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import with_open_edits
from lmc_dist.trajectory.files import read_json, write_json, write_shard_file
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.trajectory.reader import ShardReader
from lmc_dist.trajectory.record import StepRecord, Trajectory, TrajectoryManifest
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.head import Head, Length
from lmc_dist.unlearn.kept_sweep import kept_sweep
from lmc_dist.unlearn.optimizer_state import correct_state
from lmc_dist.unlearn.path import logs_gradients, no_gradients, update_rule
from lmc_dist.unlearn.problem import Problem
from lmc_dist.unlearn.request import check_request
from lmc_dist.unlearn.status import Progress, unwatched
from lmc_dist.unlearn.sweep import sweep
from lmc_dist.update_rules import check_supported

Update = Literal["tangent", "finite", "auto"]

DESCRIPTION = "correction.json"


@dataclass(frozen=True)
class Correction:
    """(v, dσ) and what is known about it.

    Attributes:
        v: θ̂_τ − θ_τ, sharded like the trajectory, float32 or better.
        audit: One record a forget unit.
        gradients_equivalent: Cost in gradients of a whole training batch.
        theta_hat: The corrected weights where the method found them itself (replay): θ + v can round differently.
        state: dσ = σ̂_τ − σ_τ by kind, sharded like v; empty for an optimizer without state.
        behind: Steps that the counterfactual run skipped, by which its optimizer's counter is lower.
        step: The counter of σ_τ.
    """

    v: ShardedVector
    audit: tuple[AuditRecord, ...]
    gradients_equivalent: float
    theta_hat: ShardedVector | None = None
    state: Mapping[str, ShardedVector] = field(default_factory=dict)
    behind: int = 0
    step: int = 0

    def corrected(self, theta: ShardedVector) -> ShardedVector:
        """θ̂ = θ + v."""
        return theta + self.v if self.theta_hat is None else self.theta_hat

    def save(self, folder: str | Path, compression: Compression = "none") -> None:
        """Writes this rank's shards; readable at any world size. Every rank calls."""
        folder, layout = Path(folder), self.v.layout
        write_shard_file(folder, layout, dict(self.v.items()), {"kind": "correction"}, "", compression)
        for key, vector in self.state.items():
            write_shard_file(folder, layout, dict(vector.items()), {"kind": key}, key, compression)
        if layout.rank == 0:
            known = {"partition": layout.rule, "state": list(self.state), "behind": self.behind, "step": self.step}
            write_json(folder / DESCRIPTION, known)


def load_correction(folder: str | Path, layout: ShardLayout, like: ShardedVector) -> ShardedVector:
    """v as `Correction.save` wrote it, at the layout of this rank. Local."""
    return load_full_correction(folder, layout, like).v


def load_full_correction(folder: str | Path, layout: ShardLayout, like: ShardedVector) -> Correction:
    """(v, dσ) as `Correction.save` wrote them, without the audit, at the layout of this rank. Local."""
    folder = Path(folder)
    known = read_json(folder / DESCRIPTION)

    def read(kind: str) -> ShardedVector:
        return ShardReader(folder, layout, known["partition"], f"correction {folder}", kind).read(like.flat.dtype)

    state = {key: read(key) for key in known["state"]}
    return Correction(read(""), (), 0.0, None, state, known["behind"], known["step"])


def compute_correction(
    trajectory: Trajectory,
    module: ShardedModule | None,
    batches: BatchSource | None,
    counterfactual: Counterfactual,
    config: HVPConfig | None = None,
    K: int | None = None,
    loss: Loss | None = None,
    progress: Progress = unwatched,
    kept: KeptCurvature | None = None,
    replay_head: Length = 0,
    head_tolerance: float = 0.05,
    tol: float | None = None,
    update: Update = "auto",
) -> Correction:
    """v for a request, propagated through the logged steps (docs/method.md §3). Collective.

    Args:
        trajectory: The logged run, on disk or in memory.
        module: The model on shards, laid out like the trajectory.
        batches: Samples by id.
        counterfactual: The request. Earlier corrections of the run that it reaches past are gone over with it.
        config: Curvature and damping; None is GGN without damping.
        K: Steps each source is propagated through; None is all.
        loss: The model's loss; None is next-token cross-entropy.
        progress: Called after each step.
        kept: `low_rank`: curvature computed before (`lmc log curvature`), in place of the model. Batches are then
            forgotten from the log alone: `module` and `batches` may be None, if the optimizer is plain SGD or the log
            keeps gradients.
        replay_head: Steps, from the first that holds forgotten data on, that are replayed before the recursion takes
            over; `auto` replays until the two agree.
        head_tolerance: `auto`: relative difference at which they do.
        tol: The sweep stops once what v would still move, at its pace over the last ten steps, is below this share of it.
        update: How the optimizer's steps are carried: by their `tangent`, linear in what is forgotten, or `finite`, as they
            are: the same number of gradients, far closer under Adam, and only with K = null. `auto` takes them as they are
            where that makes a difference and can be done (`is_finite`).

    Raises:
        LmcError: Before any long work, on every rank: unknown ids, unsupported optimizer, missing steps, K < 0. During
            it: divergence, damaged files, steps that the optimizer's update rule does not reproduce.
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
        check_update(update, K)
        check_tolerance(tol)
        manifest = trajectory.manifest
        records = list(trajectory.records())
        counterfactual, passed = with_open_edits(counterfactual, trajectory.edits, records)
        if passed and kept is not None:
            raise LmcError(f"the run was corrected at step {max(passed)}: kept curvature does not lead past that")
        touched = check_request(counterfactual, records, batches, manifest.loss_normalization)
        if not touched:
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        first = touched[0].step
        trajectory.require(first)
        check_update_rule(manifest, records, first)
        head = Head(replay_head, head_tolerance)
        if head.is_on and (module is None or batches is None):
            raise LmcError(f"replay_head={replay_head} computes gradients: pass module= and batches=")
        if kept is not None:
            kept.require(first, trajectory.num_steps)
        rule = update_rule(trajectory)
        if rule.keys and (module is None or batches is None) and not logs_gradients(manifest):
            raise LmcError(no_gradients(trajectory))
    loss = loss or TokenCrossEntropy()
    as_they_are = is_finite(update, trajectory, first, K, kept)
    is_clipped = any(r.clip_coef < 1 for r in records if r.step >= first and r.applied)
    if kept is not None and rule.is_plain and not is_clipped and not head.is_on and tol is None and not as_they_are:
        result = kept_sweep(trajectory, kept, module, loss, batches, counterfactual, config, K, progress)
    else:
        problem = Problem(
            trajectory, module, loss, batches, counterfactual, config, K, kept, tol, is_finite=as_they_are
        )
        result = sweep(problem, head, progress)
    found = result.v, result.audit, result.gradients_equivalent
    return Correction(*found, state=result.state, behind=result.behind, step=result.step)


def check_update(update: str, K: int | None) -> None:
    """Checks how the optimizer's steps are to be carried. Local.

    Raises:
        LmcError: An unknown way, or one that does not go with K.
    """
    if update not in get_args(Update):
        raise LmcError(f"unknown update '{update}': one of {', '.join(get_args(Update))}")
    if update == "finite" and K is not None:
        raise LmcError("update 'finite' is not linear in what is forgotten: use K=null, or update 'tangent'")


def check_tolerance(tol: float | None) -> None:
    """Local.

    Raises:
        LmcError: None that could ever end a sweep.
    """
    if tol is not None and not tol > 0:  # NaN is not either
        raise LmcError(f"tol must be above 0, or null, got {tol}")


def is_finite(update: Update, trajectory: Trajectory, first: int, K: int | None, kept: KeptCurvature | None) -> bool:
    """Whether a joint correction takes the optimizer's steps from `first` on as they are. Local.

    With `auto` it does where the two differ, the optimizer has state or clips, and where all is carried to the end by the
    model's curvature.
    """
    if update != "auto":
        return update == "finite"
    clips = any(r.clip_coef < 1 for r in trajectory.records() if r.step >= first and r.applied)
    return K is None and kept is None and (bool(update_rule(trajectory).keys) or clips)


def check_update_rule(manifest: TrajectoryManifest, records: Iterable[StepRecord], first: int) -> None:
    """Checks that the tangent of every step ≥ first is known. Local.

    Raises:
        LmcError: An optimizer whose update rule is not known, or steps that the manifest does not explain.
    """
    check_supported(manifest.optimizer)
    groups = len(manifest.optimizer["groups"])
    for record in records:
        if record.step < first or not record.applied:
            continue
        if len(record.lr) != groups:
            raise LmcError(f"step {record.step} has {len(record.lr)} learning rates for {groups} parameter groups")
        if record.clip_coef < 1 and not manifest.max_grad_norm:
            raise LmcError(f"step {record.step} was clipped, but the manifest's max_grad_norm is 0: the log is damaged")


def apply_correction(target: Any, correction: Correction | ShardedVector) -> str:
    """θ ← θ + v and σ ← σ + dσ in a live engine; returns the checksum of the new θ. Collective.

    Masters, working shards and persistent parameters are set, and checked by hash on every rank; so is the optimizer's
    state, where it has trained (`optimizer_state.correct_state`).

    Args:
        target: A DeepSpeed engine or the `EngineShards` of any, or a `ShardedVector` θ, changed in place.
        correction: Over the same ranks; for a vector, laid out like it. v alone leaves the optimizer as it is.

    Raises:
        LmcError: Other layout, unsupported engine, an optimizer at another step, or copies that disagree afterwards.
    """
    v = correction.v if isinstance(correction, Correction) else correction
    if isinstance(target, ShardedVector):
        if target.layout != v.layout:
            raise LmcError("the correction is laid out differently from the vector it should be added to")
        return checksum(target.add_(v))
    shards = engine_shards(target)
    theta = shards.read()
    with agreement(shards.layout.group):
        if (theta.layout.params, theta.layout.world_size) != (v.layout.params, v.layout.world_size):
            raise LmcError("the correction is laid out differently from the engine: other parameters or world size")
    theta.add_(relayout(v, theta.layout))
    if isinstance(correction, Correction) and correction.state:
        correct_state(shards, correction.state, correction.behind, correction.step)
    shards.write(theta)
    return checksum(theta)
