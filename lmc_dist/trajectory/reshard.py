"""A log rewritten for another number of ranks or another partition rule, to the bit.

Any number of ranks M writes the files of N: files are dealt out one by one, and each is written parameter by parameter,
so that not even a single rank writing a single file holds more than one parameter at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, promoted
from lmc_dist.shards.layout import PartitionRule, ShardLayout, Slot, num_replicas
from lmc_dist.trajectory.edits import EDIT_FILE
from lmc_dist.trajectory.exchange import gather_to_first, this_rank
from lmc_dist.trajectory.files import FIX_INDEX, FIX_VALUE, fsync_path, publish_files, step_folder
from lmc_dist.trajectory.kept import FOLDER as CURVATURE_FOLDER
from lmc_dist.trajectory.lock import require_free
from lmc_dist.trajectory.manifest import MAX_RANKS, write_manifest
from lmc_dist.trajectory.reader import ShardReader
from lmc_dist.trajectory.record import TrajectoryManifest
from lmc_dist.trajectory.sealed import write_sealed
from lmc_dist.trajectory.snapshot_files import SnapshotReader, write_snapshot_file
from lmc_dist.trajectory.snapshots import META_FILE, read_meta, snapshot_folder
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.stream import Piece, stream_shard_file
from lmc_dist.trajectory.table import StepTable, copy_table

Item = tuple[str, int, str, int]  # ("step", s, kind, rank) or ("snapshot", N, "", rank)


def reshard(
    log_dir: str | Path,
    output: str | Path,
    ranks: int,
    partition: PartitionRule | None = None,
    progress: Callable[[int], None] = lambda files: None,
) -> TrajectoryLog:
    """Writes the log anew as `ranks` ranks would have written it; returns the new log. Collective.

    World size and engine in the manifest remain those of training, which exact replay goes by.

    Args:
        log_dir: The log, which nobody may be writing.
        output: Where the new one goes; replaced if it is there.
        ranks: Files of each step and snapshot.
        partition: How they are cut; None keeps the rule.
        progress: Called with the files that this rank has written since the last call.

    Raises:
        LmcError: On every rank, and without a new log: no log, one that is being written, a bad number of ranks,
            damaged files.
    """
    rank, world_size = this_rank()
    with agreement():
        if not 1 <= ranks <= MAX_RANKS:
            raise LmcError(f"reshard.ranks must be between 1 and {MAX_RANKS}, got {ranks}")
        require_free(Path(log_dir))
        log = TrajectoryLog(log_dir)
        manifest = repartitioned(log.manifest, partition)
        for segment in manifest.all_segments:
            if ranks % num_replicas(segment.partition):
                raise LmcError(
                    f"reshard.ranks={ranks} cannot keep the log's partition '{segment.partition}', which is for a multiple of "
                    f"{num_replicas(segment.partition)} ranks: give reshard.partition"
                )
    with promoted(Path(output)) as part:
        written: dict[Item, Any] = {}
        with agreement():
            for i, item in enumerate(work_items(log, ranks)):
                if i % world_size == rank:
                    written[item] = write_item(log, item, ranks, manifest, part)
                    progress(1)
        found = gather_to_first(written)
        with agreement():
            if rank == 0:
                finish(log, manifest, part, {item: value for some in found for item, value in some.items()}, ranks)
    return TrajectoryLog(output)


def repartitioned(manifest: TrajectoryManifest, partition: PartitionRule | None) -> TrajectoryManifest:
    """The manifest with all files cut by one rule."""
    if partition is None:
        return manifest
    segments = [{**values, "partition": partition} for values in manifest.segments]
    return replace(manifest, partition=partition, segments=segments)


def work_items(log: TrajectoryLog, ranks: int) -> list[Item]:
    """The files to write."""
    steps = [("step", step, kind) for step in range(log.num_steps) for kind in log.kinds(step)]
    snapshots = [("snapshot", step, "") for step in log.snapshots]
    return [(what, step, kind, rank) for what, step, kind in [*steps, *snapshots] for rank in range(ranks)]


def write_item(log: TrajectoryLog, item: Item, ranks: int, manifest: TrajectoryManifest, output: Path) -> Any:
    """Writes one file; returns its digest, of a snapshot's its shares of the checksums. Local."""
    what, step, kind, rank = item
    if what == "snapshot":
        folder = log.path / snapshot_folder(step)
        kinds = sorted(read_meta(folder)["kinds"])
        layout = ShardLayout(log.layout.params, rank, ranks)
        return write_snapshot_file(output / snapshot_folder(step), SnapshotReader(folder), kinds, layout)
    layout = ShardLayout(log.layout.params, rank, ranks, manifest.segment(step).partition)  # type: ignore[arg-type]
    rule: Any = log.manifest.segment(step).partition
    where = f"log {log.path}, step {step}"
    source = ShardReader(log.path / step_folder(step), layout, rule, where, kind, None, log.kinds(step)[kind])
    staged = stream_shard_file(
        output / step_folder(step),
        layout,
        shard_pieces(source, kind),
        {"step": str(step), "kind": kind},
        kind,
        manifest.compression,  # type: ignore[arg-type]
    )
    publish_files([staged])
    return staged.digest


def shard_pieces(source: ShardReader, kind: str) -> list[Piece]:
    """What the reader's own rank holds of a step's vector, in the type it is stored in, with its fixes."""

    def make(slot: Slot, dtype: torch.dtype) -> torch.Tensor:
        target = torch.empty(slot.local_numel, dtype=dtype)
        source.read_slot(slot, target)
        return target

    pieces = []
    for slot in source.layout:
        dtype = source.dtype(slot.spec.name)
        pieces.append(Piece(slot.spec.name, dtype, slot.local_numel, lambda s=slot, d=dtype: make(s, d)))  # type: ignore[misc]
    fixed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, place, value in source.fixes() if kind == "update" else ():
        if len(place):
            fixed.setdefault(name, []).append((place + source.layout.slots[name].start, value))
    for name, parts in fixed.items():
        index, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        pieces.append(Piece(name + FIX_INDEX, index.dtype, len(index), lambda t=index: t))  # type: ignore[misc]
        pieces.append(Piece(name + FIX_VALUE, value.dtype, len(value), lambda t=value: t))  # type: ignore[misc]
    return pieces


def finish(
    log: TrajectoryLog, manifest: TrajectoryManifest, output: Path, written: dict[Item, Any], ranks: int
) -> None:
    """Makes a log of the files that all ranks have written. Rank 0."""
    for name in ("steps", "snapshots"):
        (output / name).mkdir(exist_ok=True)
    for step in log.snapshots:
        folder, meta = output / snapshot_folder(step), read_meta(log.path / snapshot_folder(step))
        for kind, expected in meta["kinds"].items():
            shares = zip(*(written["snapshot", step, "", rank][kind] for rank in range(ranks)), strict=True)
            if "".join(f"{sum(share) % 2**64:016x}" for share in shares) != expected:
                raise LmcError(f"log {log.path}: '{kind}' of snapshot {step} does not have its checksum: it is damaged")
        if step in log.edits:
            write_sealed(folder / EDIT_FILE, log.edits[step].to_json())
        write_sealed(folder / META_FILE, meta)
        fsync_path(folder)
    copy_table(log.path, output)
    table = StepTable(output)
    by_step = {
        step: {kind: [written["step", step, kind, rank] for rank in range(ranks)] for kind in log.kinds(step)}
        for step in range(log.num_steps)
    }
    table.set_tensors(by_step)
    table.close()
    write_manifest(output, manifest)
    if (log.path / CURVATURE_FOLDER).is_dir():  # of another layout, which it says itself
        shutil.copytree(log.path / CURVATURE_FOLDER, output / CURVATURE_FOLDER)
    if (log.path / "train.json").is_file():
        shutil.copyfile(log.path / "train.json", output / "train.json")
