"""Taking parts out of a log, in an order that a crash cannot make lie.

Whatever is dropped leaves the descriptions (manifest, table) first and the disk afterwards; what is made anew is on disk
before anything names it. So at every moment the log opens and verifies, and pruning that was cut off is ended by
pruning again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout, Slot
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.contents import folder_bytes, read_contents
from lmc_dist.trajectory.difference import exact_update
from lmc_dist.trajectory.files import publish_files, rank_file, step_folder
from lmc_dist.trajectory.lock import LogLock, require_free
from lmc_dist.trajectory.manifest import write_manifest
from lmc_dist.trajectory.reader import ShardReader
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.snapshot_files import SnapshotReader
from lmc_dist.trajectory.snapshots import snapshot_folder
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.stream import Piece, stream_shard_file
from lmc_dist.trajectory.table import StepTable
from lmc_dist.trajectory.writer import drop_before

PrunedTier = Literal["replay", "update"]
Tensors = dict[str, torch.Tensor]
Read = Callable[[Slot, torch.Tensor], None]


@dataclass(frozen=True)
class PrunePlan:
    """What pruning will do.

    Attributes:
        first_kept: Snapshot from which on everything stays.
        snapshots: Snapshots that go, those before `first_kept` included.
        tier: Storage tier afterwards.
        dropped: (step, kind) of all vectors that go.
        converted: Steps whose updates are made from θ of two steps.
        samples: Samples whose tokens go.
        leftovers: What nothing names.
        freed: Bytes by kind; updates that are made count against it.
    """

    first_kept: int
    snapshots: list[int]
    tier: str
    dropped: list[tuple[int, str]]
    converted: list[int]
    samples: int
    leftovers: list[Path]
    freed: dict[str, int] = field(default_factory=dict)


def plan_prune(
    log: TrajectoryLog,
    before: int | None = None,
    to_tier: PrunedTier | None = None,
    snapshots_every: int | None = None,
    batch_data: bool = False,
) -> PrunePlan:
    """What pruning would do. Local.

    Args:
        log: The log.
        before: Tensors and snapshots before this step go, but for the snapshot from which it can be reached.
        to_tier: Vectors that this tier does not keep go; of `full` the updates are made from its θ.
        snapshots_every: Of the snapshots the first, the last, the first that corrections can start from, those at
            multiples of this and those of edits stay.
        batch_data: The samples' tokens go.

    Raises:
        LmcError: Nothing to do, a step that is not in the log, or a tier that the log's does not hold.
    """
    if before is None and to_tier is None and snapshots_every is None and not batch_data:
        raise LmcError("say what to prune: prune.before, prune.to_tier, prune.snapshots_every or prune.batch_data")
    if not log.snapshots:
        raise LmcError(f"log {log.path} holds no snapshot: there is nothing to follow from, and nothing to prune")
    if before is not None and not 0 <= before <= log.num_steps:
        raise LmcError(f"prune.before={before}: the log holds steps 0 to {log.num_steps - 1}")
    if snapshots_every is not None and snapshots_every < 1:
        raise LmcError(f"prune.snapshots_every must be at least 1, got {snapshots_every}")
    tier = log.manifest.storage
    if to_tier is not None:
        if to_tier not in reachable_tiers(tier):
            raise LmcError(f"prune.to_tier={to_tier}: a log of tier '{tier}' does not hold what that tier keeps")
        tier = to_tier
    contents = read_contents(log.path)
    first_kept = log.first_step if before is None else log.nearest_anchor(max(before, log.first_step))
    gone = [n for n in log.snapshots if n < first_kept]
    if snapshots_every is not None:
        kept = [n for n in log.snapshots if n >= first_kept]
        whole = contents.unbroken_from()
        start = next((n for n in kept if n >= whole and log.nearest_anchor(n) == n), None)
        gone += [n for n in kept[1:-1] if n % snapshots_every and n not in log.edits and n != start]
    converts = tier == "update" and log.manifest.storage == "full"
    dropped = [
        (step, kind)
        for step in range(log.num_steps)
        for kind in log.kinds(step)
        if step < first_kept or kind not in TIERS[tier]
    ]
    steps = range(first_kept, log.num_steps) if converts else ()
    converted = [s for s in steps if "theta" in log.kinds(s) and "update" not in log.kinds(s)]
    sizes = count_samples(log.path) if batch_data else []
    plan = PrunePlan(first_kept, gone, tier, dropped, converted, len(sizes), contents.leftovers())
    plan.freed.update(_freed(log, plan, sum(sizes)))
    return plan


def reachable_tiers(tier: str) -> tuple[str, ...]:
    """Tiers whose vectors a log of `tier` holds, or can make."""
    return {"replay": ("replay",), "update": ("replay", "update")}.get(tier, ("replay", "update"))


def count_samples(log_dir: Path) -> list[int]:
    """Bytes of each sample in the table."""
    table = StepTable(log_dir)
    try:
        return table.sample_sizes()
    finally:
        table.close()


def _freed(log: TrajectoryLog, plan: PrunePlan, sample_bytes: int) -> dict[str, int]:
    freed: dict[str, int] = {}
    for step, kind in plan.dropped:
        freed[kind] = freed.get(kind, 0) + vector_bytes(log, step, kind)
    if plan.converted:  # θ and u take the same room
        freed["update"] = -sum(vector_bytes(log, step, "theta") for step in plan.converted)
    if plan.snapshots:
        freed["snapshots"] = sum(folder_bytes(log.path / snapshot_folder(n)) for n in plan.snapshots)
    if plan.samples:
        freed["samples"] = sample_bytes
    if plan.leftovers:
        freed["leftovers"] = sum(folder_bytes(path) for path in plan.leftovers)
    return freed


def vector_bytes(log: TrajectoryLog, step: int, kind: str) -> int:
    """Bytes of a step's files of a kind."""
    ranks = len(log.kinds(step)[kind])
    paths = (log.path / step_folder(step) / rank_file(rank, ranks, kind) for rank in range(ranks))
    return sum(path.stat().st_size for path in paths if path.exists())


def prune(log_dir: str | Path, progress: Callable[[int], None] = lambda steps: None, **settings: Any) -> PrunePlan:
    """Prunes a log; `settings` are those of `plan_prune`. Local: one process does it.

    Args:
        log_dir: The log, which nobody may be writing.
        progress: Called with the steps whose updates have been made since the last call.
        settings: See `plan_prune`.

    Raises:
        LmcError: Another job writes the log, or settings that do not fit; nothing has changed then.
    """
    path = Path(log_dir)
    TrajectoryLog(path)
    lock = LogLock(path)
    try:
        log = TrajectoryLog(path)  # as it is now that nobody else can change it
        plan = plan_prune(log, **settings)
        table = StepTable(path)
        try:
            for step in _apply(log, plan, table):
                progress(step)
        finally:
            table.close()
        return plan
    finally:
        lock.release()


def dry_run(log_dir: str | Path, **settings: Any) -> PrunePlan:
    """What `prune` would do. Local.

    Raises:
        LmcError: As `prune`.
    """
    require_free(Path(log_dir))
    return plan_prune(TrajectoryLog(log_dir), **settings)


def _apply(log: TrajectoryLog, plan: PrunePlan, table: StepTable) -> Iterator[int]:
    path = log.path
    for left in plan.leftovers:
        remove(left)
    drop_before(path, table, plan.first_kept)
    for step in plan.snapshots:
        if step > plan.first_kept:
            drop_snapshot(path, step)
    kept = {step: dict(log.kinds(step)) for step in range(plan.first_kept, log.num_steps)}
    for step in plan.converted:
        kept[step]["update"] = write_update(log, step)
        yield 1
    if plan.converted:
        table.set_tensors({step: kept[step] for step in plan.converted})
    manifest = replace(log.manifest, storage=plan.tier)
    for kind in ("update", "gradient"):
        if kind not in TIERS[plan.tier]:
            manifest = replace(manifest, **{f"{kind}_dtype": "float32"})  # type: ignore[arg-type]
    if plan.samples:
        manifest = replace(manifest, save_batch_data=False)
    if manifest != log.manifest:
        write_manifest(path, manifest)
    changed = {step for step, _ in plan.dropped if step >= plan.first_kept}
    wanted = TIERS[plan.tier]
    table.set_tensors({step: {k: kept[step][k] for k in kept[step] if k in wanted} for step in sorted(changed)})
    for step, kind in plan.dropped:
        folder = path / step_folder(step)
        for file in folder.glob(f"{kind}.rank-*"):
            file.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if plan.samples:
        table.drop_samples()


def drop_snapshot(log_dir: Path, step: int) -> None:
    """Deletes a snapshot: out of sight first, so that a half-deleted one is never taken for a whole one."""
    doomed = log_dir / "snapshots" / f"deleted-{step}"
    (log_dir / snapshot_folder(step)).rename(doomed)
    shutil.rmtree(doomed)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_update(log: TrajectoryLog, step: int) -> list[str]:
    """Writes u_s as tier `update` keeps it, from the θ around it; returns the files' digests. One parameter in memory.

    The files are cut as those of θ_{s+1} are.
    """
    ranks, rule = len(log.kinds(step)["theta"]), log.manifest.segment(step).partition
    staged = []
    for rank in range(ranks):
        layout = ShardLayout(log.layout.params, rank, ranks, rule)  # type: ignore[arg-type]
        before, after = _theta_before(log, step, layout), _theta_after(log, step, layout)

        def update(slot: Slot, before: Read = before, after: Read = after, layout: ShardLayout = layout) -> Tensors:
            alone = ShardLayout([slot.spec], layout.rank, layout.world_size, layout.rule)
            vectors = [ShardedVector.zeros(alone, log.dtype) for _ in range(2)]
            for read, vector in zip((before, after), vectors, strict=True):
                read(slot, vector[slot.spec.name])
            return exact_update(*vectors)

        pieces = []
        for slot in layout:
            make = lambda s=slot, of=update: of(s)[s.spec.name]  # noqa: E731
            pieces.append(Piece(slot.spec.name, log.dtype, slot.local_numel, make))
            for name, tensor in update(slot).items():  # the few elements that u does not reproduce are kept
                if name != slot.spec.name:
                    pieces.append(Piece(name, tensor.dtype, tensor.numel(), lambda t=tensor: t))  # type: ignore[misc]
        metadata = {"step": str(step), "kind": "update"}
        folder, compression = log.path / step_folder(step), log.manifest.compression
        staged.append(stream_shard_file(folder, layout, pieces, metadata, "update", compression))  # type: ignore[arg-type]
    publish_files(staged)
    return [file.digest for file in staged]


def _theta_after(log: TrajectoryLog, step: int, layout: ShardLayout) -> Read:
    """Reads parameters of the stored θ_{s+1}."""
    rule: Any = log.manifest.segment(step).partition
    digests = log.kinds(step)["theta"]
    folder, what = log.path / step_folder(step), f"log {log.path}, step {step}"
    return ShardReader(folder, layout, rule, what, "theta", {log.dtype}, digests).read_slot


def _theta_before(log: TrajectoryLog, step: int, layout: ShardLayout) -> Read:
    """Reads parameters of θ_s: the last that was stored, or a snapshot's; steps in between were not applied."""
    stored = max((s for s in range(step) if "theta" in log.kinds(s)), default=-1)
    start = log.nearest_snapshot(step)
    if start <= stored:
        return _theta_after(log, stored, layout)
    snapshot = SnapshotReader(log.path / snapshot_folder(start))
    return lambda slot, target: snapshot.read_slot("theta", slot, target)
