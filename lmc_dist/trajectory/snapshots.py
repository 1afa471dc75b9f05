"""Snapshots: θ and optimizer state of one step through torch.distributed.checkpoint, written while training goes on.

Entries of the checkpoint are flat 1-D tensors `KIND/PARAMETER`, sharded over the ranks, in safetensors files (DCP's own
format would be pickle).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement
from lmc_dist.shards.checksum import format_checksum, local_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.edits import EDIT_FILE
from lmc_dist.trajectory.files import fsync_path
from lmc_dist.trajectory.sealed import read_sealed, require_plain, write_sealed
from lmc_dist.trajectory.snapshot_files import SnapshotReader

META_FILE = "meta.json"


def snapshot_folder(step: int) -> str:
    return f"snapshots/step-{step}"


def part_folder(folder: Path) -> Path:
    """Where a snapshot is written before it is whole."""
    return folder.with_name(folder.name + ".part")


def snapshot_steps(log_dir: Path) -> list[int]:
    """Steps N of the whole snapshots θ_N, ascending."""
    folders = (log_dir / "snapshots").glob("step-*")
    numbers = (re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", folder.name) for folder in folders if _is_whole(folder))
    return sorted(int(m.group(1)) for m in numbers if m)


def _is_whole(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / META_FILE).is_file()


class _Staged:
    """DCP's `AsyncStager`, whose import takes a second: the tensors are copies already, which are nobody else's."""

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def synchronize_staging(self) -> None:
        return None

    def close(self) -> None:
        return None


def start_snapshot(folder: Path, vectors: Mapping[str, ShardedVector], group: dist.ProcessGroup | None) -> Future[Any]:
    """Starts writing `folder`.part and returns at once. Collective; `finish_snapshot` is called when all are done.

    Args:
        folder: Of the snapshot.
        vectors: `theta`, `exp_avg`, … in host memory, which must not change until the future is done.
        group: A gloo group used for nothing else, since a thread talks over it beside training.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    part = part_folder(folder)
    with agreement(group):
        if group is None or dist.get_rank(group) == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    response = dcp.async_save(
        snapshot_state(vectors),
        storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
        process_group=group,
        async_stager=_Staged(),  # type: ignore[arg-type]
    )
    assert isinstance(response, Future)
    return _in_one_line(response)


def _in_one_line(response: Future[Any]) -> Future[Any]:
    """The same future, whose error, if any, says in one line what went wrong: DCP's holds all ranks' tracebacks."""
    found: Future[Any] = Future()

    def finish(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            found.set_result(None)
            return
        causes = getattr(error, "failures", {}).values()  # rank → (exception, traceback)
        cause = next((cause[0] for cause in causes), error)
        lines = str(cause).strip().splitlines() or [""]
        found.set_exception(LmcError(f"{type(cause).__name__}: {lines[-1]}"))

    response.add_done_callback(finish)
    return found


def finish_snapshot(folder: Path, meta: Mapping[str, Any], edit: Mapping[str, Any] | None = None) -> None:
    """Makes a snapshot that all ranks have written visible, with what was edited there. Rank 0."""
    part = part_folder(folder)
    for path in part.iterdir():
        fsync_path(path)
    if edit is not None:
        write_sealed(part / EDIT_FILE, edit)
    write_sealed(part / META_FILE, meta)
    fsync_path(part)
    part.replace(folder)
    fsync_path(folder.parent)


def vector_checksums(vectors: Mapping[str, ShardedVector]) -> dict[str, str]:
    """Checksum of each vector. One all-reduce; collective."""
    kinds = sorted(vectors)
    totals = torch.stack([local_checksum(vectors[kind]).cpu() for kind in kinds])
    layout = vectors[kinds[0]].layout
    if layout.world_size > 1:
        dist.all_reduce(totals, group=layout.group)
    return {kind: format_checksum(total) for kind, total in zip(kinds, totals, strict=True)}


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` of a snapshot says: `step`, `checksum`, `kinds`, `scalars`. Local.

    Raises:
        LmcError: It is missing or damaged, or the snapshot lies in the folder of another step.
    """
    for place in (folder.parent, folder):
        require_plain(place)
    meta = read_sealed(folder / META_FILE)
    if problem := _meta_problem(meta):
        raise LmcError(f"{folder / META_FILE} is damaged: {problem}")
    if folder.name != Path(snapshot_folder(meta["step"])).name:
        raise LmcError(f"snapshot {folder} is that of step {meta['step']}, it lies in the wrong place")
    return meta


def _meta_problem(meta: Mapping[str, Any]) -> str | None:
    """What of `meta.json` is not as a writer leaves it."""
    kinds, scalars = meta.get("kinds"), meta.get("scalars")
    if not isinstance(kinds, dict) or not all(isinstance(value, str) for value in kinds.values()):
        return "kinds are no checksums by name"
    if meta.get("checksum") is None or kinds.get("theta") != meta["checksum"]:
        return "there is no θ with the snapshot's checksum"
    if not isinstance(scalars, dict) or not all(type(value) in (int, float) for value in scalars.values()):
        return "scalars are no numbers by name"
    return None if type(meta.get("step")) is int else "step is no number"


def read_snapshot(
    folder: Path, layout: ShardLayout, dtype: torch.dtype
) -> tuple[dict[str, ShardedVector], dict[str, Any]]:
    """(vectors by kind, `meta.json`) at this rank's layout, whatever the writer's world size, verified. Collective.

    Raises:
        LmcError: The snapshot is damaged; the message names the kind.
    """
    with agreement(layout.group):
        meta = read_meta(folder)
        try:
            vectors = _load(folder, layout, sorted(meta["kinds"]), dtype)
        except LmcError:
            raise
        except Exception as error:  # of safetensors, or of numbers that are none
            raise LmcError(f"snapshot {folder} is damaged: {error}") from error
    for kind, found in vector_checksums(vectors).items():
        if found != meta["kinds"][kind]:
            raise AgreedError(f"snapshot {folder}: '{kind}' does not have the logged checksum: the log is damaged")
    return vectors, meta


def _load(folder: Path, layout: ShardLayout, kinds: list[str], dtype: torch.dtype) -> dict[str, ShardedVector]:
    """The vectors without torch.distributed, which would also read what else lies in the folder. Local."""
    for path in folder.iterdir():
        require_plain(path)
    reader = SnapshotReader(folder)
    for kind in kinds:  # before any memory is taken for them
        for slot in layout:
            if slot.spec.numel and (stored := reader.dtype(kind, slot.spec.name)) != dtype:
                raise LmcError(f"snapshot {folder}: '{kind}' of {slot.spec.name} is {stored}, the log says {dtype}")
    return {kind: reader.read(kind, layout, dtype) for kind in kinds}


def snapshot_state(vectors: Mapping[str, ShardedVector]) -> dict[str, torch.Tensor]:
    """The entries of a snapshot. Collective where the vectors are not laid out by rule `zero3`."""
    state: dict[str, torch.Tensor] = {}
    for kind, vector in vectors.items():
        layout = vector.layout
        flat = ShardLayout(layout.params, layout.rank, layout.world_size, "zero3", layout.group)
        state |= {f"{kind}/{name}": tensor for name, tensor in flat_tensors(relayout(vector, flat)).items()}
    return state


def flat_tensors(vector: ShardedVector) -> dict[str, torch.Tensor]:
    """The vector as 1-D DTensors, one a parameter, sharing memory with it; plain tensors without a process group.

    DTensor cuts n elements into pieces of ⌈n/W⌉, which is rule `zero3`.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    layout = vector.layout
    if not dist.is_initialized():
        return dict(vector.items())
    mesh = (
        DeviceMesh.from_group(layout.group, "cpu")
        if layout.group is not None
        else DeviceMesh("cpu", list(range(layout.world_size)))
    )
    return {
        slot.spec.name: DTensor.from_local(
            vector[slot.spec.name],
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([slot.spec.numel]),
            stride=(1,),
        )
        for slot in layout
    }
