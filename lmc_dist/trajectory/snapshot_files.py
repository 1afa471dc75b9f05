"""The files of a snapshot without torch.distributed: read piece by piece, checked kind by kind, written for any rank.

torch.distributed.checkpoint keeps each tensor's place among the elements of the whole one in the header of the file, as
JSON under DCP_SHARDING_INFO. That is all that is needed to read a snapshot, and it needs no process group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import local_checksum
from lmc_dist.shards.layout import ShardLayout, Slot
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import fsync_path
from lmc_dist.trajectory.stream import Piece, write_safetensors

SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
VERSION = {"DCP_VERSION": "1.0", "format": "pt"}


class SnapshotReader:
    """Reads a snapshot's vectors, in any pieces, whatever world size wrote them. Local.

    Args:
        folder: Of the snapshot.

    Raises:
        LmcError: A file is damaged; or there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Any] = []
        self._chunks: dict[str, list[tuple[int, int, int]]] = {}  # KIND/NAME → (start, end, file)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                places = json.loads((file.metadata() or {})[SHARDING_INFO])
                for key in file.keys():  # noqa: SIM118
                    (start,), (numel,) = places[key][OFFSETS], file.get_slice(key).get_shape()
                    self._chunks.setdefault(key, []).append((start, start + numel, len(self._files)))
            except Exception as error:  # safetensors raises an error type of its own
                raise LmcError(f"snapshot {folder}: {path.name} is damaged ({error})") from None
            self._files.append(file)
        if not self._files:
            raise LmcError(f"snapshot {folder} holds no files")

    @property
    def world_size(self) -> int:
        """Files, one a writing rank."""
        return len(self._files)

    def dtype(self, kind: str, name: str) -> torch.dtype:
        chunks = self._chunks.get(f"{kind}/{name}")
        if not chunks:
            raise LmcError(f"snapshot {self.folder}: '{kind}' of {name} is missing")
        return self._files[chunks[0][2]].get_slice(f"{kind}/{name}")[:0].dtype

    def read_slot(self, kind: str, slot: Slot, target: torch.Tensor) -> None:
        """One parameter's elements of a slot into `target` (1-D, as long as the slot).

        Raises:
            LmcError: Not every element is there exactly once.
        """
        key, filled = f"{kind}/{slot.spec.name}", 0
        chunks = sorted(self._chunks.get(key, ()))
        covered = [edge for start, end, _ in chunks if start < end for edge in (start, end)]
        if covered[1:-1:2] != covered[2::2] or [*covered[:1], *covered[-1:]] != [0, slot.spec.numel]:
            raise LmcError(f"snapshot {self.folder}: '{kind}' of {slot.spec.name} is not there element for element")
        for start, end, file in chunks:
            low, high = max(start, slot.start), min(end, slot.end)
            if low < high:
                piece = self._files[file].get_slice(key)[low - start : high - start]
                target[low - slot.start : high - slot.start] = piece
                filled += high - low
        assert filled == slot.local_numel

    def read(self, kind: str, layout: ShardLayout, dtype: torch.dtype) -> ShardedVector:
        """One vector at the layout of a rank."""
        vector = ShardedVector.zeros(layout, dtype)
        for slot in layout:
            self.read_slot(kind, slot, vector[slot.spec.name])
        return vector


def snapshot_file(rank: int) -> str:
    """Name of a rank's file, as torch gives it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def snapshot_pieces(
    source: SnapshotReader, kinds: Sequence[str], layout: ShardLayout, sums: dict[str, list[int]]
) -> list[Piece]:
    """What the file of a layout's rank holds of a snapshot; ranks hold no empty tensors there.

    Args:
        source: The snapshot.
        kinds: Its vectors.
        layout: Of the rank.
        sums: Kind → the rank's share of the vector's checksum, to which each piece adds when it is made.
    """

    def make(kind: str, slot: Slot, dtype: torch.dtype) -> torch.Tensor:
        alone = ShardLayout([slot.spec], layout.rank, layout.world_size, layout.rule)
        vector = ShardedVector.zeros(alone, dtype)
        source.read_slot(kind, slot, vector[slot.spec.name])
        plain, weighted = local_checksum(vector).tolist()
        for i, share in enumerate((plain, weighted + slot.global_offset * plain)):
            sums[kind][i] += share
        return vector[slot.spec.name]

    pieces = []
    for kind in kinds:
        sums[kind] = [0, 0]
        for slot in layout:
            if slot.local_numel:
                dtype = source.dtype(kind, slot.spec.name)
                key = f"{kind}/{slot.spec.name}"
                pieces.append(
                    Piece(key, dtype, slot.local_numel, lambda k=kind, s=slot, d=dtype: make(k, s, d))  # type: ignore[misc]
                )
    return pieces


def snapshot_metadata(pieces: Sequence[Piece], layout: ShardLayout) -> dict[str, str]:
    """The header's strings of the file of a layout's rank."""
    places = {p.name: {OFFSETS: [layout.slots[p.name.split("/", 1)[1]].start]} for p in pieces}
    return {**VERSION, SHARDING_INFO: json.dumps(places)}


def write_snapshot_file(
    folder: Path, source: SnapshotReader, kinds: Sequence[str], layout: ShardLayout
) -> dict[str, list[int]]:
    """Writes one rank's file of a snapshot that is laid out anew, synced to disk. Local.

    Args:
        folder: Of the new snapshot; made when absent. It is no snapshot before `meta.json` is there.
        source: The snapshot as it is.
        kinds: Its vectors.
        layout: Of the rank whose file it is.

    Returns:
        Kind → the rank's share of the checksum of what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums: dict[str, list[int]] = {}
    pieces, path = snapshot_pieces(source, kinds, layout, sums), folder / snapshot_file(layout.rank)

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        return snapshot_metadata(pieces, layout)

    write_safetensors(path, pieces, metadata)
    fsync_path(path)
    return sums
