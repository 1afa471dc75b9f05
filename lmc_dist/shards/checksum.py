"""A checksum of a sharded vector that does not depend on how it is sharded.

Two sums modulo 2^64 over all elements, Σ bits_i and Σ i · bits_i with i the element's index in the concatenation of
all parameters (Fletcher's checksum). Both add up over shards, so any world size and any engine gives the same value,
and a single flipped bit always changes it. It guards against damage and rounding, not against an adversary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lmc_dist.shards.vector import ShardedVector

_CHUNK = 1 << 18  # elements at a time; integers take eight bytes each
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def local_checksum(vector: ShardedVector) -> torch.Tensor:
    """This rank's share: int64 tensor (Σ bits, Σ index · bits), wrapping."""
    total = torch.zeros(2, dtype=torch.int64, device=vector.flat.device)
    for slot in vector.layout:
        bits = vector[slot.spec.name].view(BITS[vector.flat.element_size()])
        first = slot.global_offset + slot.start
        for i in range(0, bits.numel(), _CHUNK):
            chunk = bits[i : i + _CHUNK].to(torch.int64)
            index = torch.arange(first + i, first + i + chunk.numel(), device=chunk.device)
            total[0] += chunk.sum()
            total[1] += (chunk * index).sum()  # CUDA has no integer dot
    return total


def format_checksum(total: torch.Tensor) -> str:
    """32 hexadecimal digits of a reduced (2,) checksum."""
    return "".join(f"{int(part) & 0xFFFFFFFFFFFFFFFF:016x}" for part in total)


def checksum(vector: ShardedVector) -> str:
    """Checksum of the whole vector, the same on every rank. Collective."""
    total = local_checksum(vector)
    if vector.layout.world_size > 1:
        dist.all_reduce(total, group=vector.layout.group)
    return format_checksum(total)
