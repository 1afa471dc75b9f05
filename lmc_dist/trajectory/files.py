"""The files of a log: atomic writes and per-rank shard files. No pickle anywhere.

A shard file is a safetensors file of 1-D tensors, one a rank; names, bounds and world size make it readable at any
other world size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import BITS
from lmc_dist.shards.layout import PartitionRule, ShardLayout, Slot, shard_bounds
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.codec import Compression, decode, digest, encode

MANIFEST_FILE = "manifest.json"
FIX_INDEX, FIX_VALUE = "#fix_index", "#fix_value"


def step_folder(step: int) -> str:
    return f"steps/step-{step:08d}"


def rank_file(rank: int, world_size: int, kind: str = "") -> str:
    """Name of a rank's file; files of several kinds can share a folder."""
    return f"{kind}{'.' if kind else ''}rank-{rank:05d}-of-{world_size:05d}.safetensors"


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
    folder: Path,
    layout: ShardLayout,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    kind: str = "",
    compression: Compression = "none",
) -> str:
    """Writes this rank's tensors, atomically and synced to disk. Local.

    Args:
        folder: Of all ranks' files; made when absent.
        layout: Of the vectors.
        tensors: Unpadded 1-D shards in host memory, named as the layout's slots, and any others.
        metadata: More strings for the file's header.
        kind: What the file holds, the first part of its name.
        compression: See `codec.encode`.

    Returns:
        The file's digest: of its header, which holds those of the tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(layout.rank, layout.world_size, kind)
    stored = {name: encode(tensor, compression) for name, tensor in tensors.items()}
    table = {
        name: [str(tensor.dtype).removeprefix("torch."), tensor.numel(), digest(stored[name])]
        for name, tensor in tensors.items()
    }
    header = {
        "format": "pt",
        "rank": str(layout.rank),
        "world_size": str(layout.world_size),
        "compression": compression,
        "tensors": json.dumps(table),
        **metadata,
    }
    part = path.with_suffix(".part")
    save_file(stored, part, metadata=header)
    fsync_path(part)
    part.replace(path)
    fsync_path(folder)
    fsync_path(folder.parent)
    return header_digest(header)


def header_digest(header: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(header, sort_keys=True).encode())


class ShardReader:
    """Reads the shard files of one folder, written at any world size, at the layout of this rank. Local.

    Args:
        folder: Where all ranks' files are.
        layout: The reader's own layout.
        rule: Partition rule of the writer.
        what: What the folder is, for messages.
        kind: Which files to read.
    """

    def __init__(self, folder: Path, layout: ShardLayout, rule: PartitionRule, what: str, kind: str = "") -> None:
        self.folder, self.layout, self.rule, self.what, self.kind = folder, layout, rule, what, kind
        matches = list(rank_files(folder, kind))
        if not matches:
            raise LmcError(f"{what}: no shard files{f' of {kind}' if kind else ''} in {folder}")
        self.world_size = matches[0][1]
        ranks = {rank for rank, world_size in matches if world_size == self.world_size}
        if len(matches) != len(ranks):
            raise LmcError(f"{what}: {folder} mixes files of different world sizes; the log is damaged")
        missing = sorted(set(range(self.world_size)) - ranks)
        if missing:
            raise LmcError(f"{what}: the file of rank {missing[0]} of {self.world_size} is missing in {folder}")
        self._open: dict[int, Any] = {}
        self._tables: dict[int, dict[str, tuple[str, int, str]]] = {}

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.folder / rank_file(rank, self.world_size, self.kind)
            try:
                handle = safe_open(path, framework="pt")
                header = handle.metadata() or {}
                table = json.loads(header.get("tensors", "{}"))
            except Exception as error:  # safetensors raises its own error type for a truncated or damaged header
                raise LmcError(f"{self.what}: {path} is damaged ({error})") from None
            if header.get("world_size") != str(self.world_size) or header.get("rank") != str(rank):
                raise LmcError(
                    f"{self.what}: {path} was written by rank {header.get('rank')} of "
                    f"{header.get('world_size')}, its name says rank {rank} of {self.world_size}"
                )
            if odd := sorted(set(handle.keys()) ^ set(table)):
                problem = "lacks" if odd[0] in table else "does not name"
                raise LmcError(f"{self.what}: rank {rank}'s file {problem} tensor '{odd[0]}' ({path})")
            self._open[rank], self._tables[rank] = handle, table
        return self._open[rank]

    def _overlaps(self, slot: Slot) -> list[tuple[int, int, int]]:
        """(writer rank, its start, its end) of every writer's shard that overlaps this rank's."""
        bounds = ((r, *shard_bounds(slot.spec, r, self.world_size, self.rule)) for r in range(self.world_size))
        return [(r, start, end) for r, start, end in bounds if start < slot.end and slot.start < end]

    def _whole(self, rank: int, name: str) -> torch.Tensor:
        """A tensor of a writer's file, decompressed."""
        handle = self._file(rank)
        dtype, numel, _ = self._tables[rank][name]
        try:
            return decode(handle.get_tensor(name), getattr(torch, dtype), numel, handle.metadata()["compression"])
        except LmcError as error:
            raise LmcError(f"{self.what}: tensor '{name}' of rank {rank}: {error}") from None

    def check(self) -> None:
        """Opens every writer's file: truncated, foreign or misnamed ones are found without reading tensors."""
        for rank in range(self.world_size):
            self._file(rank)

    def header_digest(self, rank: int) -> str:
        """What `write_shard_file` returned for a writer's file, of the file as it is now."""
        return header_digest(self._file(rank).metadata())

    def damaged_tensors(self, rank: int) -> list[str]:
        """Tensors of a writer's file whose bytes do not have the digest in its header, read one at a time."""
        handle = self._file(rank)
        return [name for name, row in self._tables[rank].items() if digest(handle.get_tensor(name)) != row[2]]

    def read(self, dtype: torch.dtype) -> ShardedVector:
        """This rank's shards as one vector; every element is read exactly once and must be finite."""
        vector = ShardedVector.zeros(self.layout, dtype)
        for slot in self.layout:
            name, target = slot.spec.name, vector[slot.spec.name]
            for rank, start, end in self._overlaps(slot):
                low, high = max(start, slot.start), min(end, slot.end)
                target[low - slot.start : high - slot.start] = self._piece(rank, name, end - start)[
                    low - start : high - start
                ]
            if not bool(torch.isfinite(target).all()):
                raise LmcError(
                    f"{self.what}: tensor '{name}' holds NaN or infinity in elements {slot.start}:{slot.end}"
                )
        return vector

    def _piece(self, rank: int, name: str, numel: int) -> Any:
        """A writer's shard, to be sliced: not read before that where it is not compressed."""
        compressed = self._file(rank).metadata().get("compression", "none") != "none"
        if name not in self._tables[rank]:
            raise LmcError(f"{self.what}: rank {rank}'s file lacks tensor '{name}'")
        piece = self._whole(rank, name) if compressed else self._file(rank).get_slice(name)
        shape = list(piece.shape) if isinstance(piece, torch.Tensor) else piece.get_shape()
        if shape != [numel]:
            raise LmcError(
                f"{self.what}: tensor '{name}' of rank {rank} has {shape} elements, world size {self.world_size} "
                f"needs {numel}: a file of another world size?"
            )
        return piece

    def apply_fixes(self, vector: ShardedVector) -> None:
        """Sets the elements that θ + u does not reproduce exactly (see `exact_update`)."""
        for rank in range(self.world_size):
            keys = {key for key in self._file(rank).keys() if key.endswith(FIX_INDEX)}  # noqa: SIM118
            for key in keys:
                name = key.removesuffix(FIX_INDEX)
                slot = self.layout.slots[name]
                index, value = self._whole(rank, key), self._whole(rank, name + FIX_VALUE)
                mine = (index >= slot.start) & (index < slot.end)
                vector[name][index[mine] - slot.start] = value[mine].to(vector.flat.dtype)


def rank_files(folder: Path, kind: str = "") -> Iterator[tuple[int, int]]:
    """(rank, world size) of every file of a kind in a folder, by their names."""
    pattern = re.compile(re.escape(rank_file(0, 0, kind)).replace("00000", r"(\d{5})"))
    for path in sorted(folder.glob("*.safetensors")):
        if match := pattern.fullmatch(path.name):
            yield int(match.group(1)), int(match.group(2))


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
