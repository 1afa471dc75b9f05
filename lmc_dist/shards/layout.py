"""How parameters lie across ranks: name → shape and this rank's [start, end) of the flattened parameter.

Three rules are known; in each a rank's part is contiguous in the flattened parameter:

* `zero3`: ceil(n/N) elements a rank (DeepSpeed ZeRO-3, small persistent parameters included);
* `fsdp2`: ceil(d0/N) rows a rank (torch FSDP2, `Shard(0)`);
* `hsdp-R`: R replicas of the model, each sharded by rows over S = N/R ranks; rank r·S + s holds shard s and owns the r-th
  of R equal runs of its elements. So every element is owned once, and what a rank owns is a slice of what it holds.

Every rank stores a parameter in a slot of the same padded length, slots back to back in one flat buffer: a run of
consecutive parameters is then gathered by one collective and without a copy. Padding is zero, always: engines leave
uninitialised memory there, which must never reach a norm, a hash or a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from re import fullmatch
from typing import Any

import torch
import torch.distributed as dist

PartitionRule = str  # "zero3", "fsdp2" or "hsdp-R"


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

    def held(self, name: str) -> tuple[int, int]:
        """[start, end) of a flattened parameter that this rank's engine holds: what the rank owns, or more (`hsdp-R`)."""
        return held_bounds(self.slots[name].spec, self.rank, self.world_size, self.rule)

    def owned(self, name: str, held: torch.Tensor) -> torch.Tensor:
        """What this rank owns of a parameter, as a view of the 1-D tensor of what its engine holds."""
        slot, (first, _) = self.slots[name], self.held(name)
        return held[slot.start - first : slot.end - first]


@cache
def num_replicas(rule: PartitionRule) -> int:
    """How many ranks hold each element under a rule.

    Raises:
        ValueError: There is no such rule.
    """
    if rule in ("zero3", "fsdp2"):
        return 1
    if (found := fullmatch(r"hsdp-([1-9][0-9]{0,4})", rule)) is None:
        raise ValueError(f"unknown partition rule '{rule[:40]}'")
    return int(found.group(1))


def is_rule(value: Any) -> bool:
    """Whether a value from a file names a partition rule."""
    try:
        return isinstance(value, str) and num_replicas(value) > 0
    except ValueError:
        return False


def shard_ranks(world_size: int, rule: PartitionRule) -> int:
    """Ranks that hold one whole model together.

    Raises:
        ValueError: The replicas do not divide the ranks.
    """
    replicas = num_replicas(rule)
    if world_size % replicas:
        raise ValueError(f"partition '{rule}' is for a multiple of {replicas} ranks, not for {world_size}")
    return world_size // replicas


def padded_numel(spec: ParamSpec, world_size: int, rule: PartitionRule) -> int:
    """Elements of a parameter's slot: the largest shard of any rank."""
    if rule == "zero3":
        return -(-spec.numel // world_size)
    rows = spec.shape[0] if spec.shape else 1
    held = -(-rows // shard_ranks(world_size, rule)) * (spec.numel // max(rows, 1))
    return -(-held // num_replicas(rule))


def held_bounds(spec: ParamSpec, rank: int, world_size: int, rule: PartitionRule) -> tuple[int, int]:
    """[start, end) of the flattened parameter that the engine of `rank` holds; empty for ranks past the end."""
    if num_replicas(rule) > 1:
        ranks = shard_ranks(world_size, rule)
        return shard_bounds(spec, rank % ranks, ranks, "fsdp2")
    return shard_bounds(spec, rank, world_size, rule)


def shard_bounds(spec: ParamSpec, rank: int, world_size: int, rule: PartitionRule) -> tuple[int, int]:
    """[start, end) of the flattened parameter that `rank` owns; empty for ranks past the end."""
    per_rank = padded_numel(spec, world_size, rule)
    if num_replicas(rule) > 1:
        first, last = held_bounds(spec, rank, world_size, rule)
        start = min(first + rank // shard_ranks(world_size, rule) * per_rank, last)
        return start, min(start + per_rank, last)
    start = min(rank * per_rank, spec.numel)
    return start, min(start + per_rank, spec.numel)


def group_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world size) within `group`; (0, 1) where torch.distributed is not initialised."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)
