"""The files of a log: atomic writes, per-rank shard files, snapshots. No pickle anywhere.

A shard file is a safetensors file of 1-D tensors, one a rank; names, bounds and world size make it readable at any
other world size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import BITS
from lmc_dist.shards.layout import PartitionRule, ShardLayout, Slot, group_rank, shard_bounds
from lmc_dist.shards.vector import ShardedVector

_RANK_FILE = re.compile(r"rank-(\d{5})-of-(\d{5})\.safetensors")
FIX_INDEX, FIX_VALUE = "#fix_index", "#fix_value"


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def fsync_path(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, fsyncs, renames."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    fsync_path(part)
    part.replace(path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise LmcError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LmcError(f"{path} is damaged: {error}") from None


def write_shard_file(
    folder: Path, layout: ShardLayout, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes this rank's tensors of one step. `tensors` hold unpadded shards, named as the layout's slots."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(layout.rank, layout.world_size)
    part = path.with_suffix(".part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        part,
        metadata={
            "format": "pt",
            "rank": str(layout.rank),
            "world_size": str(layout.world_size),
            **metadata,
        },
    )
    fsync_path(part)
    part.replace(path)
    fsync_path(folder)


class ShardReader:
    """Reads the shard files of one folder, written at any world size, at the layout of this rank. Local.

    Args:
        folder: Where all ranks' files are.
        layout: The reader's own layout.
        rule: Partition rule of the writer.
        what: What the folder is, for messages.
    """

    def __init__(self, folder: Path, layout: ShardLayout, rule: PartitionRule, what: str) -> None:
        self.folder, self.layout, self.rule, self.what = folder, layout, rule, what
        found = sorted(folder.glob("rank-*.safetensors")) if folder.is_dir() else []
        matches = [m for m in (_RANK_FILE.fullmatch(path.name) for path in found) if m]
        if not matches:
            raise LmcError(f"{what}: no shard files in {folder}")
        self.world_size = int(matches[0].group(2))
        ranks = {int(m.group(1)) for m in matches if int(m.group(2)) == self.world_size}
        if len(matches) != len(ranks):
            raise LmcError(f"{what}: {folder} mixes files of different world sizes; the log is damaged")
        missing = sorted(set(range(self.world_size)) - ranks)
        if missing:
            raise LmcError(f"{what}: the file of rank {missing[0]} of {self.world_size} is missing in {folder}")
        self._open: dict[int, Any] = {}

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.folder / rank_file(rank, self.world_size)
            try:
                handle = safe_open(path, framework="pt")
            except Exception as error:  # safetensors raises its own error type for a truncated or damaged header
                raise LmcError(f"{self.what}: {path} is damaged ({error})") from None
            metadata = handle.metadata() or {}
            if metadata.get("world_size") != str(self.world_size) or metadata.get("rank") != str(rank):
                raise LmcError(
                    f"{self.what}: {path} was written by rank {metadata.get('rank')} of "
                    f"{metadata.get('world_size')}, its name says rank {rank} of {self.world_size}"
                )
            self._open[rank] = handle
        return self._open[rank]

    def _overlaps(self, slot: Slot) -> list[tuple[int, int, int]]:
        """(writer rank, its start, its end) of every writer's shard that overlaps this rank's."""
        bounds = ((r, *shard_bounds(slot.spec, r, self.world_size, self.rule)) for r in range(self.world_size))
        return [(r, start, end) for r, start, end in bounds if start < slot.end and slot.start < end]

    def check(self) -> None:
        """Opens every writer's file: truncated, foreign or misnamed ones are found without reading tensors."""
        for rank in range(self.world_size):
            self._file(rank)

    def read(self, dtype: torch.dtype) -> ShardedVector:
        """This rank's shards as one vector; every element is read exactly once and must be finite."""
        vector = ShardedVector.zeros(self.layout, dtype)
        for slot in self.layout:
            name, target = slot.spec.name, vector[slot.spec.name]
            for rank, start, end in self._overlaps(slot):
                try:
                    source = self._file(rank).get_slice(name)
                except LmcError:
                    raise
                except Exception as error:
                    raise LmcError(f"{self.what}: rank {rank}'s file lacks tensor '{name}' ({error})") from None
                if source.get_shape() != [end - start]:
                    raise LmcError(
                        f"{self.what}: tensor '{name}' of rank {rank} has {source.get_shape()} elements, "
                        f"world size {self.world_size} needs {end - start}: a file of another world size?"
                    )
                low, high = max(start, slot.start), min(end, slot.end)
                target[low - slot.start : high - slot.start] = source[low - start : high - start]
            if not bool(torch.isfinite(target).all()):
                raise LmcError(
                    f"{self.what}: tensor '{name}' holds NaN or infinity in elements {slot.start}:{slot.end}"
                )
        return vector

    def apply_fixes(self, vector: ShardedVector) -> None:
        """Sets the elements that θ + u does not reproduce exactly (see `exact_update`)."""
        for rank in range(self.world_size):
            keys = {key for key in self._file(rank).keys() if key.endswith(FIX_INDEX)}  # noqa: SIM118
            for key in keys:
                name = key.removesuffix(FIX_INDEX)
                slot = self.layout.slots[name]
                index = self._file(rank).get_tensor(key)
                value = self._file(rank).get_tensor(name + FIX_VALUE)
                mine = (index >= slot.start) & (index < slot.end)
                vector[name][index[mine] - slot.start] = value[mine].to(vector.flat.dtype)


def exact_update(theta: ShardedVector, after: ShardedVector) -> dict[str, torch.Tensor]:
    """u = θ' − θ as shards to store, with the elements for which θ + u rounds to something other than θ'.

    The difference of two floats need not be a float (an element that crosses zero by a step larger than itself), so
    those few elements are stored as they are: flattened index and value.
    """
    tensors: dict[str, torch.Tensor] = {}
    for slot in theta.layout:
        name = slot.spec.name
        before, target = theta[name], after[name]
        u = target - before
        tensors[name] = u
        bits = BITS[u.element_size()]  # not the values: −0.0 equals 0.0
        wrong = ((before + u).view(bits) != target.view(bits)).nonzero().squeeze(-1)
        if wrong.numel():
            tensors[name + FIX_INDEX] = wrong + slot.start
            tensors[name + FIX_VALUE] = target[wrong]
    return tensors


def save_snapshot(
    folder: Path,
    vectors: Mapping[str, ShardedVector],
    meta: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """θ and optimizer state of one step through torch.distributed.checkpoint, promoted by rename. Collective.

    `vectors` maps `theta`, `exp_avg`, … to sharded vectors; entries of the checkpoint are flat 1-D tensors
    `KIND/PARAMETER`, sharded over the ranks, in safetensors files (DCP's own format would be pickle).
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    rank, _ = group_rank(group)
    part = folder.with_name(folder.name + ".part")
    with agreement(group):
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    state = {
        f"{kind}/{name}": tensor for kind, vector in vectors.items() for name, tensor in flat_tensors(vector).items()
    }
    dcp.save(
        state,
        storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
        process_group=group,
    )
    with agreement(group):
        if rank == 0:
            for path in part.iterdir():
                fsync_path(path)
            write_json(part / "meta.json", {**meta, "kinds": sorted(vectors)})
            part.replace(folder)
            fsync_path(folder.parent)


def load_snapshot(folder: Path, layout: ShardLayout, kinds: list[str], dtype: torch.dtype) -> dict[str, ShardedVector]:
    """Vectors of a snapshot at this rank's layout, whatever the writer's world size. Collective."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    vectors = {kind: ShardedVector.zeros(layout, dtype) for kind in kinds}
    state = {
        f"{kind}/{name}": tensor for kind, vector in vectors.items() for name, tensor in flat_tensors(vector).items()
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=layout.group)
    for kind, vector in vectors.items():
        for name, target in vector.items():
            tensor = state[f"{kind}/{name}"]
            target.copy_(tensor.to_local() if hasattr(tensor, "to_local") else tensor)
    return vectors


def flat_tensors(vector: ShardedVector) -> dict[str, torch.Tensor]:
    """The vector as 1-D DTensors, one a parameter, sharing memory with it; plain tensors without a process group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    layout = vector.layout
    if layout.rule != "zero3":
        raise LmcError(f"snapshots of '{layout.rule}' shards are not available yet")
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
