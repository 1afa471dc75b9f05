"""DeepSpeed ZeRO-1 and ZeRO-2: working weights are whole on every rank, masters and optimizer state are partitioned.

DeepSpeed lays the parameters of an optimizer group end to end and cuts the whole into one flat partition for each rank,
across parameters. What a rank holds of each parameter follows from the order in a group and the partition's size, so
any rank knows it of all others; vectors are exchanged between this division and rule `zero3`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.engines.driven import WrappedStepShards, as_counter, check_flat_state, read_counters
from lmc_dist.shards.engines.protocol import State
from lmc_dist.shards.engines.replicated import ReplicatedShards
from lmc_dist.shards.engines.torch_loop import trainable
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.relayout import Ranges, exchange, layout_ranges
from lmc_dist.shards.vector import ShardedVector


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: at `offset` of its group laid end to end."""

    group: int
    offset: int
    numel: int


class ZeRO12Shards(WrappedStepShards, ReplicatedShards):
    """The masters and optimizer state of a DeepSpeed ZeRO-1 or ZeRO-2 model. Every rank constructs one.

    Args:
        module: The module of the engine.
        optimizer: Its `DeepSpeedZeroOptimizer`, or its `BF16_Optimizer` (ZeRO-1, bfloat16, float32 accumulation).
        engine: The engine itself.

    Raises:
        LmcError: Partitions over a part of the ranks, masters in less than float32.
    """

    def __init__(self, module: nn.Module, optimizer: Any, engine: Any = None) -> None:
        self.module, self.optimizer, self.engine = module, optimizer, engine
        self.base = optimizer.optimizer
        self.is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        self.name = f"deepspeed-zero{2 if getattr(optimizer, 'partition_gradients', False) else 1}"
        self.parameters = trainable(module)
        self.layout = ShardLayout.of_module(module, cpu_group())
        self.places = self._find_places()
        with agreement(self.layout.group):
            groups = optimizer.real_dp_process_group
            if any(dist.get_world_size(group) != self.layout.world_size for group in groups):
                raise LmcError(f"{self.name} over a part of the ranks (mixtures of experts) is not supported")
            if missing := [name for name in self.parameters if name not in self.places]:
                raise LmcError(f"trainable parameters that the optimizer has not, first {missing[0]}: freeze them")
            if odd := {flat.dtype for flat in self._flats} - {torch.float32}:
                raise LmcError(
                    f"{self.name} keeps masters in {odd.pop()} (fp16_ or bf16_master_weights_and_grads): the log needs "
                    "float32"
                )

    @property
    def _flats(self) -> list[torch.Tensor]:
        """This rank's flat float32 partition of each group."""
        o = self.optimizer
        return o.fp32_groups_flat_partition if self.is_bf16 else o.single_partition_of_fp32_groups

    def _find_places(self) -> dict[str, Place]:
        o, places = self.optimizer, {}
        names = {id(p): name for name, p in self.parameters.items()}
        for i, group in enumerate(o.bf16_groups if self.is_bf16 else o.round_robin_bit16_groups):
            offset = 0
            for k, p in enumerate(group):
                start = offset if self.is_bf16 else o.round_robin_bit16_offsets[i][k]
                if id(p) in names:
                    places[names[id(p)]] = Place(i, start, p.numel())
                offset += p.numel()
        return places

    def _ranges(self, rank: int) -> Ranges:
        """What a rank holds of each parameter."""
        sizes = [flat.numel() for flat in self._flats]  # equal on all ranks
        found = {}
        for name, place in self.places.items():
            size = sizes[place.group]
            low = max(place.offset, rank * size)
            high = min(place.offset + place.numel, (rank + 1) * size)
            if low < high:
                found[name] = (low - place.offset, high - place.offset)
        return found

    def _views(self, flats: Callable[[int], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, this rank's piece of it) of tensors that lie like the partitions, by group."""
        rank = self.layout.rank
        for name, (start, end) in self._ranges(rank).items():
            place = self.places[name]
            flat = flats(place.group)
            first = place.offset + start - rank * self._flats[place.group].numel()
            yield name, flat.detach().view(-1).narrow(0, first, end - start)

    def _gathered(self, flats: Callable[[int], torch.Tensor], dtype: torch.dtype = torch.float32) -> ShardedVector:
        """Such tensors as a vector by rule `zero3`. Collective."""
        held = {name: view.to("cpu", dtype) for name, view in self._views(flats)}
        shards = exchange(held, self._ranges, layout_ranges(self.layout), self.layout, dtype)
        return ShardedVector.from_shards(self.layout, shards)

    def _scatter(self, vector: ShardedVector, flats: Callable[[int], torch.Tensor]) -> None:
        """Writes a vector into such tensors. Collective."""
        held = dict(vector.items())
        pieces = exchange(held, layout_ranges(self.layout), self._ranges, self.layout, vector.flat.dtype)
        for name, view in self._views(flats):
            view.copy_(pieces[name])

    def read(self) -> ShardedVector:
        """A copy of the float32 masters in host memory. Collective."""
        return self._gathered(self._flats.__getitem__)

    def _write_masters(self, theta: ShardedVector) -> None:
        self._scatter(theta, self._flats.__getitem__)
        self.optimizer.update_lp_params()

    def _state_keys(self) -> list[str]:
        """Keys of the per-element state; the same on all ranks, whatever they hold."""
        found = {}
        for flat in self._flats:
            for key, value in self.optimizer.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape == flat.shape and value.dim():
                    found[key] = True
        return list(found)

    def _state_of(self, key: str) -> Callable[[int], torch.Tensor]:
        return lambda group: self.optimizer.optimizer.state[self._flats[group]][key]

    def held(self) -> list[torch.Tensor]:
        return [view for _, view in self._views(self._flats.__getitem__)]

    def check_state(self) -> None:
        check_flat_state(self.optimizer.optimizer, self._flats, "parameter group")

    def read_state(self) -> State:
        self.check_state()
        keys = self._state_keys()
        scalars = read_counters(self.optimizer.optimizer, self._flats)
        return {key: self._gathered(self._state_of(key)) for key in keys}, scalars

    def write_state(self, vectors: dict[str, ShardedVector], scalars: dict[str, float]) -> None:
        optimizer = self.optimizer.optimizer
        for flat in self._flats:
            state = optimizer.state[flat]
            state.clear()
            for key in vectors:
                state[key] = torch.zeros_like(flat.detach())
            for key, value in scalars.items():
                state[key] = as_counter(optimizer, value, flat)
        self.optimizer._hp_optimizer_states_linked = False  # DeepSpeed's own views of the state are made anew
        for key, vector in vectors.items():
            self._scatter(vector, self._state_of(key))

    def step_gradient(self) -> ShardedVector:
        """g_s in float32. Collective."""
        flats = [self._flat_gradient(i) for i in range(len(self._flats))]
        gradient = self._gathered(flats.__getitem__)
        gradient.flat.div_(self.loss_scale)
        return gradient

    def _flat_gradient(self, group: int) -> torch.Tensor:
        """This rank's part of a group's reduced gradient, which lies like its partition."""
        o = self.optimizer
        if self.is_bf16:
            return o.fp32_groups_gradient_flat_partition[group]
        if o.cpu_offload:
            return o.single_partition_of_fp32_groups[group].grad
        pieces = o.averaged_gradients.get(group)
        if pieces is None:
            return torch.zeros_like(self._flats[group].detach())
        return torch.cat([piece.reshape(-1) for piece in pieces])

    @property
    def group_of(self) -> dict[str, int]:
        return {name: self.places[name].group for name in self.parameters}

    @property
    def has_state(self) -> bool:
        return any(self.optimizer.optimizer.state.get(flat) for flat in self._flats)
