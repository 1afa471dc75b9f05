"""Small exchanges between ranks that did local work of their own; without a process group there is one rank."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def this_rank() -> tuple[int, int]:
    """(rank, world size) of the default group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value: T) -> list[T]:
    """All ranks' values on all ranks, in rank order. Collective."""
    _, world_size = this_rank()
    if world_size == 1:
        return [value]
    box: list[Any] = [None] * world_size
    dist.all_gather_object(box, value)
    return box


def gather_to_first(value: T) -> list[T]:
    """All ranks' values on rank 0, [] elsewhere. Collective."""
    rank, world_size = this_rank()
    if world_size == 1:
        return [value]
    box: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(value, box, dst=0)
    return box or []


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """The tensor's sum over ranks, in place. Collective."""
    if this_rank()[1] > 1 and tensor.numel():
        dist.all_reduce(tensor)
