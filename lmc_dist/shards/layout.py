"""How parameters lie across ranks: name → shape and this rank's [start, end) of the flattened parameter.

Two rules are known, both contiguous in the flattened parameter:

* `zero3`: ceil(n/N) elements a rank (DeepSpeed ZeRO-3, small persistent parameters included);
* `fsdp2`: ceil(d0/N) rows a rank (torch FSDP2, `Shard(0)`).

Every rank stores a parameter in a slot of the same padded length, slots back to back in one flat buffer: a run of
consecutive parameters is then gathered by one collective and without a copy. Padding is zero, always: engines leave
uninitialised memory there, which must never reach a norm, a hash or a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist

PartitionRule = Literal["zero3", "fsdp2"]


@dataclass(frozen=True)
class ParamSpec:
    """One trainable parameter, once, however many modules it is tied to."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: `[offset, offset + padded)` of the flat buffer holds `[start, end)` of the parameter."""

    spec: ParamSpec
    offset: int
    padded: int
    start: int
    end: int
    global_offset: int  # of the parameter in the concatenation of all parameters, the same on every rank

    @property
    def local_numel(self) -> int:
        return self.end - self.start


class ShardLayout:
    """The table of slots of one rank.

    Args:
        params: Parameters in model order.
        rank: This rank within `group`.
        world_size: Ranks that share one copy of the model.
        rule: Partition rule of the engine.
        group: Process group of those ranks; None is the default group.
    """

    def __init__(
        self,
        params: Iterable[ParamSpec],
        rank: int = 0,
        world_size: int = 1,
        rule: PartitionRule = "zero3",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.params = tuple(params)
        self.rank, self.world_size, self.rule, self.group = rank, world_size, rule, group
        self.slots: dict[str, Slot] = {}
        offset = global_offset = 0
        for spec in self.params:
            padded = padded_numel(spec, world_size, rule)
            start, end = shard_bounds(spec, rank, world_size, rule)
            self.slots[spec.name] = Slot(spec, offset, padded, start, end, global_offset)
            offset += padded
            global_offset += spec.numel
        self.flat_numel = offset
        self.total_numel = global_offset

    @classmethod
    def of_module(
        cls, module: torch.nn.Module, group: dist.ProcessGroup | None = None, rule: PartitionRule = "zero3"
    ) -> ShardLayout:
        """Layout of a module's trainable parameters (meta, whole or ZeRO-3 partitioned) over `group`."""
        params = [
            ParamSpec(name, tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in module.named_parameters()
            if p.requires_grad
        ]
        rank, world_size = group_rank(group)
        return cls(params, rank, world_size, rule, group)

    @classmethod
    def of_table(
        cls,
        table: Sequence[dict[str, Any]],
        group: dist.ProcessGroup | None = None,
        rule: PartitionRule = "zero3",
    ) -> ShardLayout:
        """Layout from the parameter table of a log's manifest, for the ranks of `group`."""
        rank, world_size = group_rank(group)
        return cls([ParamSpec(row["name"], tuple(row["shape"])) for row in table], rank, world_size, rule, group)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots.values())

    def __len__(self) -> int:
        return len(self.slots)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardLayout):
            return NotImplemented
        return (self.params, self.rank, self.world_size, self.rule) == (
            other.params,
            other.rank,
            other.world_size,
            other.rule,
        )

    def __hash__(self) -> int:
        return hash((self.params, self.rank, self.world_size, self.rule))

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """This rank's elements of a parameter as a 1-D view of `flat`, padding left out."""
        slot = self.slots[name]
        return flat[slot.offset : slot.offset + slot.local_numel]


def padded_numel(spec: ParamSpec, world_size: int, rule: PartitionRule) -> int:
    """Elements of a parameter's slot: the largest shard of any rank."""
    if rule == "zero3":
        return -(-spec.numel // world_size)
    rows = spec.shape[0] if spec.shape else 1
    return -(-rows // world_size) * (spec.numel // max(rows, 1))


def shard_bounds(spec: ParamSpec, rank: int, world_size: int, rule: PartitionRule) -> tuple[int, int]:
    """[start, end) of the flattened parameter that `rank` owns; empty for ranks past the end."""
    per_rank = padded_numel(spec, world_size, rule)
    start = min(rank * per_rank, spec.numel)
    return start, min(start + per_rank, spec.numel)


def group_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world size) within `group`; (0, 1) where torch.distributed is not initialised."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)
