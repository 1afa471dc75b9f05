"""Standard normal numbers by name and place: any rank makes its own, and all ranks together the same vector.

    z[name, i] = Φ⁻¹(SHAKE-256(key ‖ name ‖ block)[i])           blocks of 2^16 elements of the flattened parameter

The stream is counter-based: a block is a function of the key, the parameter's name and the block's number, so that a
shard of any cut is made from the blocks it touches, without the rest. SHAKE-256 and not a generator for simulation,
since the noise must stay unpredictable for somebody who knows part of it. Of each 64 bits one is the sign and 63 the
probability of the tail, so that both tails reach 9 standard deviations with full precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lmc_dist.shards.layout import Slot
from lmc_dist.shards.vector import ShardedVector

BLOCK = 1 << 16  # elements; half a MiB of the stream


def derive_key(seed: bytes, purpose: str, context: Mapping[str, Any]) -> bytes:
    """32 bytes that only the seed's holder can make, different for every purpose and context. Local.

    Args:
        seed: At least 32 unpredictable bytes, 64 at most.
        purpose: What they are for.
        context: JSON: what must not get the same noise twice. Two models with one noise and different weights would give
            away their difference.
    """
    text = json.dumps([purpose, dict(context)], sort_keys=True).encode()
    return hashlib.blake2b(text, key=seed, digest_size=32).digest()


def normal_block(key: bytes, name: str, block: int, size: int = BLOCK) -> torch.Tensor:
    """The first `size` numbers of a block, (size,) float64. Local."""
    encoded = name.encode()
    head = key + len(encoded).to_bytes(4, "little") + encoded + block.to_bytes(8, "little")
    bits = np.frombuffer(hashlib.shake_256(head).digest(8 * size), dtype="<u8")
    tail = torch.from_numpy(((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64)  # (0, 1/2]
    sign = torch.from_numpy(1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64))
    return torch.special.ndtri(tail) * sign


def shard_blocks(key: bytes, slot: Slot) -> Iterator[tuple[int, torch.Tensor]]:
    """A rank's numbers of one parameter, block by block: (place in its shard, float64 values). Local."""
    for block in range(slot.start // BLOCK, -(-slot.end // BLOCK) if slot.end > slot.start else 0):
        first = block * BLOCK
        low, high = max(slot.start, first), min(slot.end, first + BLOCK)
        yield low - slot.start, normal_block(key, slot.spec.name, block, high - first)[low - first :]


def add_normal_(vector: ShardedVector, key: bytes, sigma: float) -> ShardedVector:
    """vector += σ z in place, each sum made in float64 and rounded once; padding stays zero. Local.

    No rank holds more of z than a block.
    """
    for slot in vector.layout:
        shard = vector[slot.spec.name]
        for place, values in shard_blocks(key, slot):
            part = shard[place : place + len(values)]
            part.copy_(part.double() + sigma * values.to(part.device))
    return vector
