"""How a tensor becomes the bytes of a log file and back: byte shuffle, zstandard, digests.

Shuffling puts the first bytes of all elements together, then the second bytes, and so on. Of a float the byte with sign
and exponent repeats, the mantissa's low bytes do not, so only apart from each other do they compress.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import xxhash
import zstandard

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import BITS

Compression = Literal["none", "zstd"]
COMPRESSIONS = ("none", "zstd")
# Levels above 1 take two to six times as long and save nothing on float updates (0.842 of the size at 1, 0.855 at 3).
ZSTD_LEVEL = 1


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, (n, itemsize) uint8, sharing its memory."""
    bits = tensor.view(BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor
    return bits.numpy().view(np.uint8).reshape(-1, tensor.element_size())


def digest(tensor: torch.Tensor) -> str:
    """XXH3-128 of a contiguous CPU tensor's bytes, 32 hexadecimal digits: finds damage, not forgery."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor).data if tensor.numel() else b"")


def encode(tensor: torch.Tensor, compression: Compression) -> torch.Tensor:
    """What a file stores of a 1-D CPU tensor: itself, or its shuffled and compressed bytes as uint8."""
    tensor = tensor.contiguous()
    if compression == "none":
        return tensor
    shuffled = np.ascontiguousarray(raw_bytes(tensor).T)
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(shuffled.data if tensor.numel() else b"")
    return torch.frombuffer(bytearray(compressed), dtype=torch.uint8)


def decode(stored: torch.Tensor, dtype: torch.dtype, numel: int, compression: Compression) -> torch.Tensor:
    """The 1-D tensor that `encode` was given.

    Raises:
        LmcError: The bytes do not decompress to `numel` elements.
    """
    if compression == "none":
        return stored
    size = dtype.itemsize
    try:
        packed = stored.numpy().data
        if (claimed := zstandard.frame_content_size(packed)) != numel * size:  # that much memory would be taken
            raise LmcError(f"it decompresses to {claimed} bytes, {numel} elements need {numel * size}")
        data = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise LmcError(f"its compressed bytes are damaged ({error})") from None
    if len(data) != numel * size:
        raise LmcError(f"it decompresses to {len(data)} bytes, {numel} elements need {numel * size}")
    if not numel:
        return torch.empty(0, dtype=dtype)
    plain = np.array(np.frombuffer(data, np.uint8).reshape(size, numel).T, order="C")  # a copy, also of one byte
    return torch.from_numpy(plain.reshape(-1)).view(dtype)
