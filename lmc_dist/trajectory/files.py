"""The files of a log: atomic writes and per-rank shard files. No pickle anywhere.

A shard file is a safetensors file of 1-D tensors, one a rank; names, bounds and world size make it readable at any
other world size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from lmc_dist.errors import LmcError
from lmc_dist.paths import named
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.trajectory.codec import Compression, digest, encode

MANIFEST_FILE = "manifest.json"
FIX_INDEX, FIX_VALUE = "#fix_index", "#fix_value"


def step_folder(step: int) -> str:
    return f"steps/step-{step:08d}"


def ledger_folder(log_dir: str | Path) -> Path:
    """Where the requests of a log are: beside it, since they may be there before the log and outlive it. Local."""
    path = named(log_dir)
    return path.with_name(path.name + ".requests")


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
    part.write_text(text, encoding="utf-8")
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
    """Writes this rank's tensors, atomically and synced to disk; returns the file's digest (`stage_shard_file`). Local."""
    staged = stage_shard_file(folder, layout, tensors, metadata, kind, compression)
    publish_files([staged])
    return staged.digest


@dataclass(frozen=True)
class StagedFile:
    """A file that is written under a temporary name and not yet synced.

    Attributes:
        path: Its name to be.
        digest: Of its header, which holds those of the tensors.
    """

    path: Path
    digest: str


def stage_shard_file(
    folder: Path,
    layout: ShardLayout,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    kind: str = "",
    compression: Compression = "none",
) -> StagedFile:
    """Writes this rank's tensors under a temporary name, for `publish_files`. Local.

    Args:
        folder: Of all ranks' files; made when absent.
        layout: Of the vectors.
        tensors: Unpadded 1-D shards in host memory, named as the layout's slots, and any others.
        metadata: More strings for the file's header.
        kind: What the file holds, the first part of its name.
        compression: See `codec.encode`.
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
    save_file(stored, part_path(path), metadata=header)
    return StagedFile(path, header_digest(header))


def part_path(path: Path) -> Path:
    """Where a shard file is written before it is whole."""
    return path.with_suffix(".part")


def publish_files(staged: Iterable[StagedFile]) -> None:
    """Syncs files to disk, gives them their names and makes those last, the folders' too. Local.

    Several at once cost little more than one: a file system writes its journal for all of them together.
    """
    paths = [file.path for file in staged]
    for path in paths:
        fsync_path(part_path(path))
    for path in paths:
        part_path(path).replace(path)
    folders = dict.fromkeys(path.parent for path in paths)
    for folder in folders:
        fsync_path(folder)
    for parent in dict.fromkeys(folder.parent for folder in folders):
        fsync_path(parent)


def header_digest(header: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(header, sort_keys=True).encode())
