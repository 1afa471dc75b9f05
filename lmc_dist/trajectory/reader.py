"""Reading shard files, which may come from anywhere: nothing is believed that the files and the table do not prove.

A file's header names its tensors with their digests, the step table names the header's. So every byte that is read is
known to be the one that was written, or the error says where it is not; sizes are checked before memory is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import PartitionRule, ShardLayout, Slot, num_replicas, shard_bounds
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.codec import COMPRESSIONS, decode, digest, raw_bytes
from lmc_dist.trajectory.files import FIX_INDEX, FIX_VALUE, header_digest, rank_file
from lmc_dist.trajectory.sealed import require_plain

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# safetensors' names
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
# (parameter, places in this rank's shard, values)
Fix = tuple[str, torch.Tensor, torch.Tensor]
_CHUNK = 1 << 20  # elements of another rank's shard that are in memory at a time


class ShardReader:
    """Reads the shard files of one folder, written at any world size, at the layout of this rank. Local.

    Args:
        folder: Where all ranks' files are.
        layout: The reader's own layout.
        rule: Partition rule of the writer.
        what: What the folder is, for messages.
        kind: Which files to read.
        stored: Types that elements may be stored as; None takes any float.
        digests: Of all ranks' files, where they are known from elsewhere.
        is_partial: Whether files may be missing: they are then looked at one by one.

    Raises:
        LmcError: Here and in the methods: files are missing, damaged, of another shape, or not those of the digests.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        rule: PartitionRule,
        what: str,
        kind: str = "",
        stored: Collection[torch.dtype] | None = None,
        digests: Sequence[str] | None = None,
        is_partial: bool = False,
    ) -> None:
        self.folder, self.layout, self.rule, self.what, self.kind = folder, layout, rule, what, kind
        self.stored, self.digests = stored, digests
        matches = list(rank_files(folder, kind))
        if not matches:
            raise LmcError(f"{what}: no shard files{f' of {kind}' if kind else ''} in {folder}")
        self.world_size = matches[0][1] if digests is None else len(digests)
        ranks = {rank for rank, world_size in matches if world_size == self.world_size}
        if len(matches) != len(ranks):
            raise LmcError(f"{what}: {folder} mixes files of different world sizes; the log is damaged")
        if self.world_size % num_replicas(rule):
            raise LmcError(
                f"{what}: {folder} has files of {self.world_size} ranks, which partition '{rule}' cannot be of"
            )
        missing = sorted(set(range(self.world_size)) - ranks)
        if missing and not is_partial:
            raise LmcError(f"{what}: the file of rank {missing[0]} of {self.world_size} is missing in {folder}")
        self._open: dict[int, Any] = {}
        self._tables: dict[int, dict[str, tuple[torch.dtype, int, str]]] = {}
        self._compressions: dict[int, Any] = {}

    def path(self, rank: int) -> Path:
        return self.folder / rank_file(rank, self.world_size, self.kind)

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.path(rank)
            require_plain(path)
            try:
                handle = safe_open(path, framework="pt")
                header = handle.metadata() or {}
                table = json.loads(header.get("tensors", "{}"))
            except Exception as error:  # safetensors raises its own error type for a truncated or damaged header
                raise LmcError(f"{self.what}: {path} is damaged ({error})") from None
            if self.digests is not None and header_digest(header) != self.digests[rank]:
                raise LmcError(f"{self.what}: the header of {path} does not have the digest in the step table")
            if header.get("world_size") != str(self.world_size) or header.get("rank") != str(rank):
                raise LmcError(
                    f"{self.what}: {path} was written by rank {header.get('rank')} of "
                    f"{header.get('world_size')}, its name says rank {rank} of {self.world_size}"
                )
            compression = header.get("compression", "none")
            if compression not in COMPRESSIONS:
                raise LmcError(f"{self.what}: {path} has the unknown compression '{compression}'")
            if not isinstance(table, dict):
                raise LmcError(f"{self.what}: {path} is damaged (its table of tensors)")
            if odd := sorted(set(handle.keys()) ^ set(table)):
                problem = "lacks" if odd[0] in table else "does not name"
                raise LmcError(f"{self.what}: rank {rank}'s file {problem} tensor '{odd[0]}' ({path})")
            checked = {name: self._entry(rank, name, row) for name, row in table.items()}
            for name, (dtype, numel, _) in checked.items():
                view = handle.get_slice(name)
                expected = ("U8", view.get_shape()[:1]) if compression != "none" else (_NAMES[dtype], [numel])
                if (view.get_dtype(), view.get_shape()) != expected:
                    raise LmcError(
                        f"{self.what}: tensor '{name}' of rank {rank} is stored as {view.get_dtype()} of shape "
                        f"{view.get_shape()}, its header says {expected[0]} of shape {expected[1]} ({path})"
                    )
            self._open[rank], self._tables[rank], self._compressions[rank] = handle, checked, compression
        return self._open[rank]

    def _entry(self, rank: int, name: str, row: Any) -> tuple[torch.dtype, int, str]:
        """A line of a file's table, (dtype, elements, digest), where it is what a writer of this log could write."""
        where = f"{self.what}: tensor '{name}' of rank {rank}"
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(part, str) for part in (row[0], row[2]))):
            raise LmcError(f"{where} is not described as [dtype, elements, digest]: {str(row)[:80]}")
        base, mark, _ = name.partition("#")
        slot = self.layout.slots.get(base)
        if slot is None or (mark and name not in (base + FIX_INDEX, base + FIX_VALUE)):
            raise LmcError(f"{where} belongs to no parameter of the model")
        start, end = shard_bounds(slot.spec, rank, self.world_size, self.rule)
        if type(row[1]) is not int or (row[1] != end - start if not mark else not 0 < row[1] <= end - start):
            raise LmcError(
                f"{where} has {str(row[1])[:40]} elements, world size {self.world_size} needs "
                f"{'at most ' if mark else ''}{end - start}: a file of another world size?"
            )
        if name.endswith(FIX_INDEX):
            allowed = {"int64": torch.int64}
        elif self.stored is not None and not mark:
            allowed = {name: dtype for name, dtype in FLOATS.items() if dtype in self.stored}
        else:
            allowed = FLOATS
        if row[0] not in allowed:
            raise LmcError(f"{where} has elements of type {row[0][:40]}, needed is {' or '.join(allowed)}")
        return allowed[row[0]], row[1], row[2]

    def _overlaps(self, slot: Slot) -> list[tuple[int, int, int]]:
        """(writer rank, its start, its end) of every writer's shard that overlaps this rank's."""
        bounds = ((r, *shard_bounds(slot.spec, r, self.world_size, self.rule)) for r in range(self.world_size))
        return [(r, start, end) for r, start, end in bounds if start < slot.end and slot.start < end]

    def _elements(self, rank: int, name: str, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Elements [low, high) of a writer's tensor, whose digest is checked; all of them without bounds."""
        handle = self._file(rank)
        if name not in self._tables[rank]:
            raise LmcError(f"{self.what}: rank {rank}'s file lacks tensor '{name}'")
        dtype, numel, expected = self._tables[rank][name]
        high = numel if high is None else high
        try:
            if self._compressions[rank] != "none" or (low, high) == (0, numel) or numel <= _CHUNK:
                stored = handle.get_tensor(name)
                found = digest(stored)
                piece = (
                    decode(stored, dtype, numel, self._compressions[rank])[low:high] if found == expected else stored
                )
            else:
                piece, found = _streamed(handle.get_slice(name), dtype, numel, low, high)
        except LmcError as error:
            raise LmcError(f"{self.what}: tensor '{name}' of rank {rank}: {error}") from None
        except Exception as error:  # of safetensors
            raise LmcError(f"{self.what}: {self.path(rank)} is damaged ({error})") from None
        if found != expected:
            raise LmcError(
                f"{self.what}: the bytes of tensor '{name}' in {self.path(rank)} do not have their digest: the log is damaged"
            )
        return piece

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
            self.read_slot(slot, vector[slot.spec.name])
        return vector

    def read_slot(self, slot: Slot, target: torch.Tensor) -> None:
        """This rank's elements of one parameter into `target`, 1-D, converted to its type."""
        name = slot.spec.name
        for rank, start, end in self._overlaps(slot):
            low, high = max(start, slot.start), min(end, slot.end)
            target[low - slot.start : high - slot.start] = self._elements(rank, name, low - start, high - start)
        # Where an element is not finite the sum is not either, and it takes a tenth of the time.
        if not bool(torch.isfinite(target.sum())) and not bool(torch.isfinite(target).all()):
            raise LmcError(f"{self.what}: tensor '{name}' holds NaN or infinity in elements {slot.start}:{slot.end}")

    def dtype(self, name: str) -> torch.dtype:
        """What the writers stored a tensor as."""
        self._file(0)
        return self._tables[0][name][0]

    def fixes(self) -> list[Fix]:
        """The elements of this rank that θ + u does not reproduce exactly (see `difference.stored_update`)."""
        found = []
        for rank in range(self.world_size):
            self._file(rank)
            for key in [key for key in self._tables[rank] if key.endswith(FIX_INDEX)]:
                name = key.removesuffix(FIX_INDEX)
                slot = self.layout.slots[name]
                index, value = self._elements(rank, key), self._elements(rank, name + FIX_VALUE)
                start, end = shard_bounds(slot.spec, rank, self.world_size, self.rule)
                if len(index) != len(value) or not bool(((index >= start) & (index < end)).all()):
                    raise LmcError(f"{self.what}: '{key}' of rank {rank} names elements that the rank does not have")
                mine = (index >= slot.start) & (index < slot.end)
                found.append((name, index[mine] - slot.start, value[mine]))
        return found


def apply_fixes(vector: ShardedVector, fixes: Iterable[Fix]) -> None:
    """Sets the elements that θ + u does not reproduce exactly. Local."""
    for name, index, value in fixes:
        vector[name][index] = value.to(vector.flat.dtype)


def _streamed(view: Any, dtype: torch.dtype, numel: int, low: int, high: int) -> tuple[torch.Tensor, str]:
    """(elements [low, high) of a stored tensor, digest of all of it), with a piece of it in memory at a time."""
    hasher, found = xxhash.xxh3_128(), torch.empty(high - low, dtype=dtype)
    for start in range(0, numel, _CHUNK):
        piece = view[start : min(start + _CHUNK, numel)]
        hasher.update(raw_bytes(piece).data)
        first, last = max(start, low), min(start + len(piece), high)
        if first < last:
            found[first - low : last - low] = piece[first - start : last - start]
    return found, hasher.hexdigest()


def rank_files(folder: Path, kind: str = "") -> Iterator[tuple[int, int]]:
    """(rank, world size) of every file of a kind in a folder, by their names."""
    pattern = re.compile(re.escape(rank_file(0, 0, kind)).replace("00000", r"([0-9]{5})"))
    for path in sorted(folder.glob("*.safetensors")):
        if match := pattern.fullmatch(path.name):
            yield int(match.group(1)), int(match.group(2))
