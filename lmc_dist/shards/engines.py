"""Live training engines: shards out, shards in.

DeepSpeed ZeRO-3 keeps three copies of a parameter that must agree: the float32 master shard the optimizer steps, the
working shard (`ds_tensor`) the forward pass gathers, and, for small "persistent" parameters, a whole working tensor.
DeepSpeed's own setter changes the master only; training and export then go on with the old weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector


class ZeRO3Shards:
    """The master shards and optimizer state of a DeepSpeed ZeRO-3 model. Every rank constructs one.

    Args:
        module: The module DeepSpeed partitioned (`engine.module`).
        optimizer: Its ZeRO-3 optimizer (`engine.optimizer`).
    """

    name = "deepspeed-zero3"

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self.module, self.optimizer = module, optimizer
        # Any: DeepSpeed gives parameters attributes (ds_tensor, ds_numel, ...) that torch's type does not know.
        self.parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        group = next(iter(self.parameters.values())).ds_process_group
        if dist.get_world_size(group) != dist.get_world_size():
            raise LmcError("ZeRO-3 over a part of the ranks (MiCS, hpZ) is not supported yet")
        self.layout = ShardLayout.of_module(module, cpu_group())

    def _master(self, name: str) -> tuple[int, torch.Tensor]:
        """(sub-group, this rank's unpadded view of the float32 master)."""
        o, parameter = self.optimizer, self.parameters[name]
        group, offset, _ = o.grad_position[o.get_param_id(parameter)]
        length = self.layout.slots[name].local_numel
        return group, o.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, length)

    def _state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(state key, parameter name, this rank's unpadded view) of all per-element optimizer state."""
        o = self.optimizer
        for name, parameter in self.parameters.items():
            group, offset, _ = o.grad_position[o.get_param_id(parameter)]
            flat = o.fp32_partitioned_groups_flat[group]
            for key, value in o.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    yield key, name, value.narrow(0, offset, self.layout.slots[name].local_numel)

    def read(self) -> ShardedVector:
        """A copy of the float32 master shards in host memory. Local."""
        return ShardedVector.from_shards(self.layout, {name: self._master(name)[1].cpu() for name in self.parameters})

    def write(self, theta: ShardedVector) -> None:
        """Sets masters, working shards and persistent parameters to θ, and checks that they agree. Collective.

        Raises:
            LmcError: θ is laid out differently, or a copy does not hold θ afterwards.
        """
        with agreement(self.layout.group):
            if theta.layout != self.layout:
                raise LmcError("the vector's layout is not the engine's: other parameters or another world size")
        for name, shard in theta.items():
            self._master(name)[1].copy_(shard)
        self.refresh()
        self.verify(theta)

    def refresh(self) -> None:
        """Working shards and persistent parameters ← masters, as ZeRO-3 does after its own step. Collective."""
        o = self.optimizer
        o._partition_all_parameters()
        for i in range(len(o.fp16_groups)):
            o._reassign_or_swap_out_partitioned_parameters(i)
        if o.persistent_parameters:
            o.persistent_parameters[0].all_gather(o.persistent_parameters)

    def working(self) -> ShardedVector:
        """The shards the forward pass uses, in their own dtype. Local."""
        shards = {}
        for name, parameter in self.parameters.items():
            slot = self.layout.slots[name]
            if tuple(parameter.shape) == slot.spec.shape and parameter.ds_persist:
                shards[name] = parameter.detach().reshape(-1)[slot.start : slot.end]
            else:
                shards[name] = parameter.ds_tensor.detach().view(-1)[: slot.local_numel]
        return ShardedVector.from_shards(self.layout, {name: shard.cpu() for name, shard in shards.items()})

    def verify(self, theta: ShardedVector) -> str:
        """Checks that masters and working shards hold θ (the latter rounded to their dtype); its checksum. Collective."""
        expected = checksum(theta)
        if checksum(self.read()) != expected:
            raise LmcError("the engine's master shards do not hold the written weights")
        working = self.working()
        if checksum(working) != checksum(theta.to(working.flat.dtype)):
            raise LmcError("the engine's working shards do not hold the written weights")
        return expected

    def read_state(self) -> tuple[dict[str, ShardedVector], dict[str, float]]:
        """(per-element optimizer state by key, scalar state by key), copied. Local."""
        shards: dict[str, dict[str, torch.Tensor]] = {}
        for key, name, view in self._state():
            shards.setdefault(key, {})[name] = view
        scalars: dict[str, float] = {}
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            for key, value in self.optimizer.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.numel() == 1 and key not in shards:
                    scalars[key] = float(value)
        vectors = {
            key: ShardedVector.from_shards(self.layout, {name: tensor.cpu() for name, tensor in tensors.items()})
            for key, tensors in shards.items()
        }
        return vectors, scalars

    def write_state(self, vectors: dict[str, ShardedVector], scalars: dict[str, float]) -> None:
        """Replaces all optimizer state by what `read_state` returned; an optimizer that never stepped has none. Local."""
        optimizer = self.optimizer.optimizer
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            state = optimizer.state[flat]
            state.clear()
            for key in vectors:
                state[key] = torch.zeros_like(flat)
            for key, value in scalars.items():
                state[key] = torch.tensor(value, dtype=torch.float32)
        for key, name, view in self._state():
            view.copy_(vectors[key][name])

    @property
    def has_state(self) -> bool:
        """Whether the optimizer keeps anything from one step to the next."""
        return any(self.optimizer.optimizer.state.get(f) for f in self.optimizer.fp32_partitioned_groups_flat)

    @property
    def applied(self) -> bool:
        """Whether the last step changed the weights (no overflow, no NaN gradient)."""
        return not bool(self.optimizer.overflow)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradient before clipping."""
        norm = getattr(self.optimizer, "_global_grad_norm", None)
        return None if norm is None else float(norm)

    @property
    def max_grad_norm(self) -> float:
        return float(self.optimizer.clip_grad)


def engine_shards(model: Any, optimizer: Any = None) -> ZeRO3Shards:
    """The shards of a live engine.

    Args:
        model: A `DeepSpeedEngine`, or the module inside one.
        optimizer: The engine's optimizer when `model` is the bare module; wrappers by accelerate are opened.

    Raises:
        LmcError: Not an engine whose shards can be read (so far: DeepSpeed ZeRO-3).
    """
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
    module = model.module if hasattr(model, "optimizer") and hasattr(model, "module") else model
    while optimizer is not None and not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is optimizer or inner is None:
            break
        optimizer = inner
    if not hasattr(optimizer, "fp32_partitioned_groups_flat") or not hasattr(optimizer, "grad_position"):
        raise LmcError(
            f"cannot read shards of {type(model).__name__} with optimizer {type(optimizer).__name__}: "
            "only DeepSpeed ZeRO-3 engines are supported so far"
        )
    return ZeRO3Shards(module, optimizer)


def backward_micro_batch(
    engine: Any, inputs: dict[str, torch.Tensor], num_items: float, scale: float, is_boundary: bool
) -> torch.Tensor:
    """One forward and backward pass under DeepSpeed of scale · Σ nll / num_items; returns Σ nll / num_items. Collective.

    DeepSpeed then averages over ranks, so a loss meant as a sum over W ranks needs scale = W. The order of these
    operations is the Hugging Face Trainer's, which makes its runs repeatable bit for bit.
    """
    engine.set_gradient_accumulation_boundary(is_boundary)
    loss = engine(**inputs, num_items_in_batch=torch.tensor(num_items, dtype=torch.float32, device=engine.device)).loss
    engine.backward(loss * scale, scale_wrt_gas=False)
    return loss.detach()
