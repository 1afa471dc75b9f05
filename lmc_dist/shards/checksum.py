"""A checksum of a sharded vector that does not depend on how it is sharded.

Two sums modulo 2^64 over all elements, Σ bits_i and Σ i · bits_i with i the element's index in the concatenation of
all parameters (Fletcher's checksum). Both add up over shards, so any world size and any engine gives the same value,
and a single flipped bit always changes it. It guards against damage and rounding, not against an adversary.

Elements of up to four bytes are summed in blocks, whose sums float64 holds exactly: a matrix product does the work.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

_CHUNK = 1 << 16  # elements at a time, so that what is made of them stays in the cache
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Σ_{j < BLOCK} j · 2^31 < 2^52: no partial sum of a block is ever rounded, in whatever order it is added up.
BLOCK = 2048


def bit_sum(tensors: Iterable[torch.Tensor]) -> int:
    """Σ bits of tensors of four or eight bytes modulo 2^32, by which changes are noticed but for one of the order. Local.

    An addition an element, four times as fast as a comparison; for what is looked at in every step.
    """
    sums = [tensor.view(torch.int32).sum(dtype=torch.int32) for tensor in tensors]
    return sum(torch.stack(sums).tolist()) % 2**32 if sums else 0


class BlockSums:
    """Σ bits and Σ j · bits of each block of a flat buffer, j counted within the block; filled chunk by chunk.

    Args:
        flat: 1-D, elements of two or four bytes, padding zero.
    """

    def __init__(self, flat: torch.Tensor) -> None:
        self.bits = flat.view(BITS[flat.element_size()])
        num_blocks = -(-flat.numel() // BLOCK)
        self.sums = torch.zeros(num_blocks, 2, dtype=torch.float64, device=flat.device)
        weights = torch.ones(2, BLOCK, dtype=torch.float64, device=flat.device)
        weights[1] = torch.arange(BLOCK)
        self._weights = weights.T  # laid out so that the product is twice as fast

    def add(self, start: int, end: int, scratch: torch.Tensor) -> None:
        """Sums the elements [start, end); `start` is at a block's beginning, `end` too unless it is the buffer's.

        Args:
            start: First element.
            end: Behind the last one.
            scratch: float64, at least as many elements rounded up to whole blocks; overwritten.
        """
        first, last = start // BLOCK, -(-end // BLOCK)
        values = scratch[: (last - first) * BLOCK]
        values[: end - start].copy_(self.bits[start:end])
        values[end - start :].zero_()
        torch.mm(values.view(-1, BLOCK), self._weights, out=self.sums[first:last])

    def total(self, layout: ShardLayout) -> torch.Tensor:
        """int64 tensor (Σ bits, Σ i · bits), wrapping, of the elements of the layout's slots."""
        sums = self.sums.to(torch.int64)
        places = int(sums[:, 1].sum() + (torch.arange(len(sums), device=sums.device) * BLOCK * sums[:, 0]).sum())
        # So far an element counted by its place in the buffer; within a slot its index differs from that by a constant.
        slots = [slot for slot in layout if slot.local_numel]
        cuts = sorted({cut for slot in slots for cut in (slot.offset, slot.offset + slot.local_numel)})
        before = torch.cat([sums.new_zeros(1), sums[:, 0].cumsum(0)])[[cut // BLOCK for cut in cuts]]
        rests = [self.bits[cut - cut % BLOCK : cut].sum(dtype=torch.int64) for cut in cuts]
        prefix = dict(zip(cuts, (before + torch.stack(rests)).tolist() if cuts else [], strict=True))
        plain, weighted = 0, places - self._padding(layout)
        for slot in slots:
            of_slot = prefix[slot.offset + slot.local_numel] - prefix[slot.offset]
            plain += of_slot
            weighted += (slot.global_offset + slot.start - slot.offset) * of_slot
        wrapped = [(value + 2**63) % 2**64 - 2**63 for value in (plain, weighted)]
        return torch.tensor(wrapped, dtype=torch.int64, device=sums.device)

    def _padding(self, layout: ShardLayout) -> int:
        """What padding added to Σ place · bits: nothing, but for negative zeros."""
        found = 0
        for slot in layout:
            start, end = slot.offset + slot.local_numel, slot.offset + slot.padded
            if start < end and self.bits[start:end].any():
                found += int((self.bits[start:end] * torch.arange(start, end, device=self.bits.device)).sum())
        return found


def local_checksum(vector: ShardedVector) -> torch.Tensor:
    """This rank's share: int64 tensor (Σ bits, Σ index · bits), wrapping."""
    flat = vector.flat
    if flat.element_size() > 4:
        return _local_checksum_wide(vector)
    blocks = BlockSums(flat)
    scratch = torch.empty(_CHUNK, dtype=torch.float64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        blocks.add(start, min(start + _CHUNK, flat.numel()), scratch)
    return blocks.total(vector.layout)


def _local_checksum_wide(vector: ShardedVector) -> torch.Tensor:
    """The same with integers, which elements of eight bytes need."""
    total = torch.zeros(2, dtype=torch.int64, device=vector.flat.device)
    for slot in vector.layout:
        bits = vector[slot.spec.name].view(torch.int64)
        first = slot.global_offset + slot.start
        for i in range(0, bits.numel(), _CHUNK):
            chunk = bits[i : i + _CHUNK]
            index = torch.arange(first + i, first + i + chunk.numel(), device=chunk.device)
            total[0] += chunk.sum()
            total[1] += (chunk * index).sum()  # CUDA has no integer dot
    return total


def tensor_checksum(flat: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Σ bits and Σ i · bits of a 1-D tensor, i counted within it: (2,) int64 on its device, wrapping; nothing waits for it.

    Args:
        flat: 1-D, contiguous, elements of two, four or eight bytes.
        scratch: float64 on the same device, a whole number of blocks; overwritten.
    """
    if flat.element_size() > 4:
        bits = flat.view(torch.int64)
        total = torch.zeros(2, dtype=torch.int64, device=flat.device)
        for i in range(0, bits.numel(), _CHUNK):
            chunk = bits[i : i + _CHUNK]
            index = torch.arange(i, i + chunk.numel(), device=flat.device)
            total += torch.stack([chunk.sum(), (chunk * index).sum()])
        return total
    blocks = BlockSums(flat)
    for start in range(0, flat.numel(), scratch.numel()):
        blocks.add(start, min(start + scratch.numel(), flat.numel()), scratch)
    sums = blocks.sums.to(torch.int64)
    first = torch.arange(len(sums), device=flat.device) * BLOCK
    return torch.stack([sums[:, 0].sum(), sums[:, 1].sum() + (first * sums[:, 0]).sum()])


def format_checksum(total: torch.Tensor) -> str:
    """32 hexadecimal digits of a reduced (2,) checksum."""
    return "".join(f"{int(part) & 0xFFFFFFFFFFFFFFFF:016x}" for part in total)


def checksum(vector: ShardedVector) -> str:
    """Checksum of the whole vector, the same on every rank. Collective."""
    total = local_checksum(vector)
    if vector.layout.world_size > 1:
        dist.all_reduce(total, group=vector.layout.group)
    return format_checksum(total)
