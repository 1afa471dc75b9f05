"""Digests of what a run leaves: of each file by its bytes, of a folder by its files."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from lmc_dist.audit.record import canonical, digest
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, broadcast_object

_BLOCK = 1 << 22  # bytes

# What a finished run is made of; other files may come and go beside them.
MODEL, CORRECTION, MARKS = "model", "correction", "audit/marks"
PARTS = (
    MODEL,
    CORRECTION,
    "result.json",
    "audit/audit_records.json",
    "audit/norms.json",
    "audit/privacy.json",
    MARKS,
)


def part_digests(root: Path, parts: Sequence[str] = PARTS) -> dict[str, str]:
    """Digest of each file or folder of `parts` that is there. Collective; each rank reads its share of the files.

    Raises:
        LmcError: On every rank: a file that cannot be read, or is none (a pipe, a device).
    """
    found: list[list[tuple[str, int]]] = []
    with agreement():
        if _rank() == 0:
            found = [_files(root, part) for part in parts]
    found = broadcast_object(found)
    rows = [row for files in found for row in files]
    by_size = sorted(range(len(rows)), key=lambda i: (-rows[i][1], i))  # dealt out like cards: shares of about one size
    mine: dict[str, str] = {}
    with agreement():
        for i in by_size[_rank() :: _world_size()]:
            mine[rows[i][0]] = file_digest(root / rows[i][0])
    shares = [mine]
    if _world_size() > 1:
        shares = [{} for _ in range(_world_size())]
        dist.all_gather_object(shares, mine)
    known = {name: value for share in shares for name, value in share.items()}
    listed = ([[name, size, known[name]] for name, size in files] for files in found)
    return {part: digest(canonical(rows)) for part, rows in zip(parts, listed, strict=True) if rows}


def file_digest(path: Path) -> str:
    """BLAKE2b of 256 bits of a file's bytes, as hex. Local."""
    found = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _files(root: Path, part: str) -> list[tuple[str, int]]:
    """(path below the root, bytes) of a file, or of all files of a folder, by name."""
    at = root / part
    paths = [path for path in sorted(at.rglob("*")) if not path.is_dir()] if at.is_dir() else [at]
    rows = []
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            if path == at and not path.is_symlink():
                return []
            raise LmcError(f"{path} leads nowhere") from None
        if not stat.S_ISREG(status.st_mode):
            raise LmcError(f"{path} is no file")
        rows.append((path.relative_to(root).as_posix(), status.st_size))
    return rows


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
