"""A vector from one division among ranks to another, without any rank holding more than its two parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout, shard_bounds
from lmc_dist.shards.vector import ShardedVector

# Parameter name → [start, end) of the flattened parameter that a rank holds; absent names it holds nothing of.
Ranges = Mapping[str, tuple[int, int]]


def relayout(vector: ShardedVector, target: ShardLayout) -> ShardedVector:
    """The same vector laid out like `target`, over the same ranks; itself where the layouts are equal. Collective.

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
    pieces = exchange(dict(vector.items()), layout_ranges(source), layout_ranges(target), source, vector.flat.dtype)
    result = ShardedVector.zeros(target, vector.flat.dtype)
    for name, piece in pieces.items():
        result[name].copy_(piece)
    return result


def layout_ranges(layout: ShardLayout) -> Callable[[int], Ranges]:
    """What each rank holds by the layout's rule."""

    def ranges(rank: int) -> Ranges:
        return {slot.spec.name: shard_bounds(slot.spec, rank, layout.world_size, layout.rule) for slot in layout}

    return ranges


def exchange(
    held: Mapping[str, torch.Tensor],
    source: Callable[[int], Ranges],
    target: Callable[[int], Ranges],
    layout: ShardLayout,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """This rank's 1-D pieces by the division `target`, from those by the division `source`. Collective.

    One all-to-all: every rank sends each other the overlaps of its ranges with theirs, parameter by parameter.

    Args:
        held: Pieces in host memory, as long as this rank's ranges in `source`.
        source: Rank → its ranges, the same function on every rank; every element is held once.
        target: Likewise.
        layout: For the parameters' order, the ranks and their group.
        dtype: Of all pieces.
    """
    rank, world_size = layout.rank, layout.world_size
    have, want = source(rank), target(rank)
    sent: list[torch.Tensor] = []
    out_sizes, received = [], []  # by rank: how much goes there; what comes from there and where it lies
    for other in range(world_size):
        theirs_want, theirs_have = target(other), source(other)
        before = len(sent)
        for name in layout.slots:
            low, high = overlap(have, theirs_want, name)
            if low < high:
                start = have[name][0]
                sent.append(held[name][low - start : high - start])
        out_sizes.append(sum(piece.numel() for piece in sent[before:]))
        received.append([(name, *overlap(theirs_have, want, name)) for name in layout.slots])
    out = torch.cat(sent) if sent else torch.empty(0, dtype=dtype)
    in_sizes = [sum(max(high - low, 0) for _, low, high in parts) for parts in received]
    buffer = out
    if world_size > 1:
        buffer = out.new_empty(sum(in_sizes))
        dist.all_to_all_single(buffer, out, in_sizes, out_sizes, group=layout.group)
    result = {name: torch.empty(end - start, dtype=dtype) for name, (start, end) in want.items()}
    place = 0
    for parts in received:
        for name, low, high in parts:
            if low < high:
                start = want[name][0]
                result[name][low - start : high - start] = buffer[place : place + high - low]
                place += high - low
    return result


def overlap(a: Ranges, b: Ranges, name: str) -> tuple[int, int]:
    """[low, high) that both hold of a parameter; empty where high ≤ low."""
    (low, high), (start, end) = a.get(name, (0, 0)), b.get(name, (0, 0))
    return max(low, start), min(high, end)
