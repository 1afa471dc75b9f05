"""The differentiable all-gather: two linear maps that are each other's transpose.

`all_gather` maps a local (..., L) to (..., W, L), stacking the shards of the W ranks; `reduce_scatter` maps (..., W, L)
to (..., L), summing over ranks. Backward, forward-mode and vmap rules are written in terms of the two maps
themselves, so that any order of differentiation works. All ranks of the group must call, in the same order.

`torch.distributed`'s own autograd versions have neither a forward-mode nor a vmap rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.shards.layout import ShardLayout, group_rank

# torch 2.13 renames these two; both names exist there, older releases know the first only.
_all_gather_base = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_base = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def device_group(group: dist.ProcessGroup | None, device: torch.device) -> dist.ProcessGroup | None:
    """The group that moves a device's tensors among the same ranks: NCCL's where there is one, else the given group. Local.

    Where a launcher started NCCL alone, a layout's group is one of gloo, which would copy every tensor of a GPU through
    the host.
    """
    if device.type == "cpu" or not dist.is_initialized():
        return group
    world = dist.group.WORLD
    assert world is not None
    own = group or world
    slow = f"{device.type}:gloo" in str(dist.get_backend_config(own))
    is_same = dist.get_process_group_ranks(own) == dist.get_process_group_ranks(world)
    return world if slow and is_same else group


@dataclass
class Traffic:
    """Payload of the collectives of this rank since `count_traffic` began, in elements of whole vectors."""

    gathered: int = 0
    reduced: int = 0


_traffic: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what the gathers and reduce-scatters inside the block move."""
    counter = Traffic()
    _traffic.append(counter)
    try:
        yield counter
    finally:
        _traffic.remove(counter)


class PendingGather:
    """An all-gather of several vectors under way: k shards (L,) of each rank → k tensors (W, L).

    All ranks start them in the same order, with as many shards. On one rank the results are views of the shards.
    """

    def __init__(self, shards: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
        _, world_size = group_rank(group)
        for counter in _traffic:
            counter.gathered += sum(shard.numel() for shard in shards) * world_size
        self.work: Any = None
        self.out = [shard.unsqueeze(0) for shard in shards]
        if world_size > 1:
            if not sum(shard.numel() for shard in shards):  # a segment without trained parameters, on every rank
                self.out = [shard.new_empty(world_size, 0) for shard in shards]
                return
            self.shards = torch.stack(list(shards))  # alive until the collective is through
            out = self.shards.new_empty((world_size, *self.shards.shape))
            self.work = _all_gather_base(out.view(-1), self.shards.view(-1), group=group, async_op=True)
            self.out = list(out.unbind(1))

    def wait(self) -> list[torch.Tensor]:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.out


def _gather(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    _, world_size = group_rank(group)
    for counter in _traffic:
        counter.gathered += shard.numel() * world_size
    if world_size == 1:
        return shard.unsqueeze(-2)
    out = shard.new_empty((world_size, *shard.shape))
    _all_gather_base(out.view(-1), shard.contiguous().view(-1), group=group)
    return out.movedim(0, -2)


def _scatter(full: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    _, world_size = group_rank(group)
    for counter in _traffic:
        counter.reduced += full.numel()
    if world_size == 1:
        return full.squeeze(-2)
    if not full.numel():
        return full[..., 0, :]
    parts = full.movedim(-2, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    _reduce_scatter_base(out.view(-1), parts.view(-1), group=group)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        return _gather(shard, group).clone() if group_rank(group)[1] == 1 else _gather(shard, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return all_gather(tangent, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], shard: torch.Tensor, group: Any) -> tuple[torch.Tensor, int]:
        assert in_dims[0] is not None
        return all_gather(shard.movedim(in_dims[0], 0), group), 0


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(full: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        return _scatter(full, group).clone() if group_rank(group)[1] == 1 else _scatter(full, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return reduce_scatter(tangent, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], full: torch.Tensor, group: Any) -> tuple[torch.Tensor, int]:
        assert in_dims[0] is not None
        return reduce_scatter(full.movedim(in_dims[0], 0), group), 0


def all_gather(shard: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(..., L) on each rank → (..., W, L) on all; differentiable in any order. Collective."""
    return _AllGather.apply(shard, group)


def reduce_scatter(full: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(..., W, L) on each rank → this rank's (..., L) of the sum over ranks; differentiable. Collective."""
    return _ReduceScatter.apply(full, group)


def unpack(full: torch.Tensor, layout: ShardLayout) -> dict[str, torch.Tensor]:
    """Whole parameters from gathered flat buffers: (W, L) → name → tensor of the parameter's shape.

    One `split` and not a slice a parameter: the backward of a slice fills a whole buffer with zeros each time.
    """
    columns = torch.split(full, [slot.padded for slot in layout], dim=-1)
    return {
        slot.spec.name: flattened(column)[: slot.spec.numel].view(slot.spec.shape)
        for slot, column in zip(layout, columns, strict=True)
    }


def flattened(column: torch.Tensor) -> torch.Tensor:
    """(W, L) as (W·L,); a view on one rank, a copy on several.

    A column of single elements could be viewed as well, and would keep the whole buffer alive as long as a norm's weight.
    """
    return column.reshape(-1).contiguous()
