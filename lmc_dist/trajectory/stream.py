"""Files of a log written piece by piece, so that whoever writes one holds a single parameter at a time.

A rank that writes other ranks' files would otherwise need as much memory as they have. A safetensors file is a header
and the tensors behind it; the header, which holds their digests and compressed sizes, is written last into room that
was left for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lmc_dist.shards.layout import ShardLayout
from lmc_dist.trajectory.codec import Compression, digest, encode, raw_bytes
from lmc_dist.trajectory.files import StagedFile, header_digest, part_path, rank_file

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_NO_DIGEST = "0" * 32


@dataclass(frozen=True)
class Piece:
    """A 1-D tensor that is made when its turn comes.

    Attributes:
        name: In the file.
        dtype: Its type.
        numel: Its elements.
        make: Returns it, in host memory.
    """

    name: str
    dtype: torch.dtype
    numel: int
    make: Callable[[], torch.Tensor]


def stream_shard_file(
    folder: Path,
    layout: ShardLayout,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    kind: str,
    compression: Compression,
) -> StagedFile:
    """What `files.stage_shard_file` does, for tensors that are made one by one. Local.

    Args:
        folder: Of all ranks' files; made when absent.
        layout: Of the rank whose file it is.
        pieces: Its tensors.
        metadata: More strings for the file's header.
        kind: What the file holds.
        compression: See `codec.encode`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(layout.rank, layout.world_size, kind)

    def header(digests: Mapping[str, str]) -> dict[str, str]:
        table = {p.name: [str(p.dtype).removeprefix("torch."), p.numel, digests[p.name]] for p in pieces}
        return {
            "format": "pt",
            "rank": str(layout.rank),
            "world_size": str(layout.world_size),
            "compression": compression,
            "tensors": json.dumps(table),
            **metadata,
        }

    written = write_safetensors(part_path(path), pieces, header, compression)
    return StagedFile(path, header_digest(written))


def write_safetensors(
    path: Path,
    pieces: Sequence[Piece],
    metadata: Callable[[Mapping[str, str]], dict[str, str]],
    compression: Compression = "none",
) -> dict[str, str]:
    """Writes a safetensors file tensor by tensor, neither renamed nor synced; returns its metadata. Local.

    Args:
        path: The file.
        pieces: Its tensors.
        metadata: From the tensors' digests; its length must not depend on their values.
        compression: See `codec.encode`.
    """
    ordered = sorted(pieces, key=lambda p: (-p.dtype.itemsize, p.name))  # every tensor is then aligned to its type
    # zstandard makes incompressible data at most this much longer
    bounds = {p.name: p.numel * p.dtype.itemsize * (1 if compression == "none" else 1.01) + 64 for p in ordered}
    room = len(header_bytes(ordered, bounds, metadata(dict.fromkeys(bounds, _NO_DIGEST)), compression))
    sizes, digests = {}, {}
    with path.open("wb") as file:
        file.seek(room)
        for piece in ordered:
            stored = encode(piece.make(), compression)
            digests[piece.name], sizes[piece.name] = digest(stored), stored.numel() * stored.element_size()
            if stored.numel():
                file.write(raw_bytes(stored).data)
        found = metadata(digests)
        file.seek(0)
        file.write(header_bytes(ordered, sizes, found, compression, room))
    return found


def header_bytes(
    pieces: Sequence[Piece],
    sizes: Mapping[str, float],
    metadata: Mapping[str, str],
    compression: Compression = "none",
    room: int = 0,
) -> bytes:
    """The head of a safetensors file, its length included, padded with blanks to a multiple of 8 and to `room`.

    Args:
        pieces: Tensors in the order in which they lie in the file.
        sizes: Bytes of each as stored.
        metadata: Strings of the header.
        compression: Compressed tensors are stored as bytes.
        room: Length to pad to.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for piece in pieces:
        size = int(sizes[piece.name])
        dtype, numel = (DTYPE_NAMES[piece.dtype], piece.numel) if compression == "none" else ("U8", size)
        entries[piece.name] = {"dtype": dtype, "shape": [numel], "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(-(-(8 + len(text)) // 8) * 8, room)
    return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)
