"""JSON files of a log that say whether they are whole: written with a digest of their content, read within bounds.

A log may be damaged, and it may come from somebody else. What is read here is a plain file inside the log, of a bounded
size, and exactly what was written.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.files import write_json

MAX_JSON_BYTES = 256 << 20  # parsed, about ten times that; a manifest takes some 150 bytes a parameter
DIGEST = "digest"


def content_digest(value: Mapping[str, Any]) -> str:
    """XXH3-128 of an object's JSON with sorted keys, its own digest left out."""
    content = {key: part for key, part in value.items() if key != DIGEST}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object with its digest, atomically. Local."""
    plain = json.loads(json.dumps(value))  # as it will be read: lists for tuples, texts for numbers as keys
    write_json(path, {**plain, DIGEST: content_digest(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """An object that `write_sealed` wrote, without its digest. Local.

    Raises:
        LmcError: It is missing, is not a plain file, is too large, or is not what was written.
    """
    return unsealed(path, read_bounded(path))


def unsealed(path: Path, value: Any) -> dict[str, Any]:
    """An object without its digest, which it must have. Local.

    Raises:
        LmcError: It has none, or that of another content.
    """
    if not isinstance(value, dict) or not isinstance(value.get(DIGEST), str):
        raise LmcError(f"{path} is damaged: it has no digest")
    if content_digest(value) != value.pop(DIGEST):
        raise LmcError(f"{path} is damaged: its content does not have its digest")
    return value


def read_bounded(path: Path) -> Any:
    """What a JSON file holds. Local.

    Raises:
        LmcError: It is missing, is not a plain file, is too large, or is no JSON.
    """
    require_plain(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise LmcError(f"{path} has {size} bytes: no log's description is as large")
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8 and of numbers with too many digits
        raise LmcError(f"{path} is damaged: {str(error)[:200]}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def require_plain(path: Path, may_be_missing: bool = False) -> None:
    """Checks that a path is a file or folder itself: links could lead out of the log, devices never end. Local.

    Raises:
        LmcError: It is of another kind, or missing where it may not be.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if may_be_missing:
            return
        raise LmcError(f"{path} is missing") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        raise LmcError(f"{path} is {kind}: a log holds files and folders alone")
