"""Shards → a Hugging Face checkpoint, without a gathered tensor anywhere.

A safetensors file is a header and the tensors' bytes one after the other, so every rank can write its own slices in
place. Ranks need a file system they share, as they do for the log.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.layout import Slot
from lmc_dist.shards.vector import ShardedVector

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_MAX_FILE_BYTES = 5 * 2**30


def write_checkpoint(
    folder: Path,
    theta: ShardedVector,
    dtypes: Mapping[str, torch.dtype],
    max_file_bytes: int = _MAX_FILE_BYTES,
    frozen: ShardedVector | None = None,
) -> str:
    """Writes model weights by their names in the module, and reads them back. Collective.

    Args:
        folder: Existing directory.
        theta: Trained weights; tied ones once.
        dtypes: Storage type of each parameter, frozen ones included.
        max_file_bytes: Weights are split into files of about this size.
        frozen: The other weights of the model, over the same ranks.

    Returns:
        The checksum that all ranks found in the files for the trained weights, equal to that of θ rounded to the
        storage type.
    """
    layout = theta.layout
    vectors = [theta] if frozen is None else [theta, frozen]
    slots = {slot.spec.name: slot for vector in vectors for slot in vector.layout}
    files = plan_files(slots, dtypes, max_file_bytes)
    with agreement(layout.group):
        if layout.rank == 0:
            for name, entries in files.items():
                header = encode_header(slots, dtypes, entries)
                with open(folder / name, "wb") as file:
                    file.write(header)
                    file.truncate(len(header) + sum(nbytes(slots, dtypes, n) for n in entries))
            if len(files) > 1:
                weight_map = {entry: name for name, entries in files.items() for entry in entries}
                total = sum(nbytes(slots, dtypes, entry) for entry in weight_map)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    with agreement(layout.group):
        for name, entries in files.items():
            offset = len(encode_header(slots, dtypes, entries))
            with open(folder / name, "r+b") as file:
                for entry in entries:
                    slot, size = slots[entry], dtypes[entry].itemsize
                    vector = theta if entry in layout.slots else vectors[-1]
                    data = vector[entry].detach().cpu().to(dtypes[entry]).contiguous()
                    file.seek(offset + slot.start * size)
                    file.write(data.view(torch.uint8).numpy().tobytes())
                    offset += nbytes(slots, dtypes, entry)
                file.flush()
                os.fsync(file.fileno())
    if layout.world_size > 1:
        dist.barrier(layout.group)
    found, *_ = [_verify(folder, vector, dtypes) for vector in vectors]
    return found


def _verify(folder: Path, vector: ShardedVector, dtypes: Mapping[str, torch.dtype]) -> str:
    """The checksum of a vector as the files hold it. Collective.

    Raises:
        LmcError: It is not that of the vector.
    """
    rounded = vector.clone()
    for name, shard in rounded.items():
        shard.copy_(shard.to(dtypes[name]))
    with agreement(vector.layout.group):
        stored = read_checkpoint(folder, vector)
    expected, found = checksum(rounded), checksum(stored)
    if found != expected:
        raise LmcError(f"checkpoint {folder} does not hold the weights that were written")
    return found


def read_checkpoint(folder: Path, like: ShardedVector) -> ShardedVector:
    """This rank's slices of a checkpoint's weights, in the dtype of `like`. Local."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    vector = like.like(torch.zeros_like(like.flat))
    for slot in like.layout:
        with safe_open(folder / where.get(slot.spec.name, "model.safetensors"), framework="pt") as file:
            tensor = file.get_slice(slot.spec.name)
            vector[slot.spec.name].copy_(slice_flat(tensor, slot.spec.shape, slot.start, slot.end))
    return vector


def slice_flat(tensor, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Elements [start, end) of a flattened stored tensor, reading only the rows they lie in."""
    if start == end or not shape:
        return torch.as_tensor(tensor[:]).reshape(-1)[start:end]
    row = max(1, int(torch.Size(shape[1:]).numel()))
    first, last = start // row, -(-end // row)
    return tensor[first:last].reshape(-1)[start - first * row : end - first * row]


def plan_files(
    slots: Mapping[str, Slot], dtypes: Mapping[str, torch.dtype], max_file_bytes: int
) -> dict[str, list[str]]:
    """File name → its parameters, in model order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in slots:
        bytes_ = nbytes(slots, dtypes, name)
        if groups[-1] and size + bytes_ > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def nbytes(slots: Mapping[str, Slot], dtypes: Mapping[str, torch.dtype], name: str) -> int:
    return slots[name].spec.numel * dtypes[name].itemsize


def encode_header(slots: Mapping[str, Slot], dtypes: Mapping[str, torch.dtype], names: list[str]) -> bytes:
    """The length-prefixed JSON header of a safetensors file, padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + nbytes(slots, dtypes, name)
        shape = list(slots[name].spec.shape)
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
