"""A vector from one partition rule to another, without any rank holding more than its two shards."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout, Slot, shard_bounds
from lmc_dist.shards.vector import ShardedVector


def relayout(vector: ShardedVector, target: ShardLayout) -> ShardedVector:
    """The same vector laid out like `target`, over the same ranks; itself where the layouts are equal. Collective.

    One all-to-all: every rank sends each other the overlaps of its shards with theirs, parameter by parameter.

    Args:
        vector: In host memory.
        target: Of the same parameters, rank and world size.

    Raises:
        LmcError: Other parameters or another world size.
    """
    source = vector.layout
    if source == target:
        return vector
    if (source.params, source.rank, source.world_size) != (target.params, target.rank, target.world_size):
        raise LmcError("a vector can be laid out anew for the same parameters and ranks only")
    pairs = [(source.slots[slot.spec.name], slot) for slot in target]
    sent, received = [], []  # by rank: what goes there, where it came to lie
    for rank in range(source.world_size):
        sent.append([vector[mine.spec.name][_inside(mine, rank, target)] for mine, _ in pairs])
        received.append([(theirs.spec.name, _inside(theirs, rank, source)) for _, theirs in pairs])
    result = ShardedVector.zeros(target, vector.flat.dtype)
    out = torch.cat([piece for pieces in sent for piece in pieces])
    out_sizes = [sum(piece.numel() for piece in pieces) for pieces in sent]
    in_sizes = [sum(part.stop - part.start for _, part in parts) for parts in received]
    buffer = out.new_empty(sum(in_sizes))
    dist.all_to_all_single(buffer, out, in_sizes, out_sizes, group=source.group)
    place = 0
    for parts in received:
        for name, part in parts:
            length = part.stop - part.start
            result[name][part] = buffer[place : place + length]
            place += length
    return result


def _inside(slot: Slot, rank: int, other: ShardLayout) -> slice:
    """Which elements of this rank's shard another rank holds under the other layout."""
    start, end = shard_bounds(slot.spec, rank, other.world_size, other.rule)
    low, high = max(start, slot.start), min(end, slot.end)
    return slice(low - slot.start, max(low, high) - slot.start)
