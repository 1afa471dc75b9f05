"""DeepSpeed ZeRO-3: shards out, shards in.

ZeRO-3 keeps three copies of a parameter that must agree: the float32 master shard the optimizer steps, the working
shard (`ds_tensor`) the forward pass gathers, and, for small "persistent" parameters, a whole working tensor.
DeepSpeed's own setter changes the master only; training and export then go on with the old weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.engines.driven import WrappedStepShards, as_counter, check_flat_state, read_counters
from lmc_dist.shards.engines.passes import even_passes, measuring, prepare_pass
from lmc_dist.shards.engines.protocol import State, check_precision
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

if TYPE_CHECKING:
    from lmc_dist.curvature.loss import Loss, MicroBatch


class ZeRO3Shards(WrappedStepShards):
    """The master shards and optimizer state of a DeepSpeed ZeRO-3 model. Every rank constructs one.

    Args:
        module: The module DeepSpeed partitioned (`engine.module`).
        optimizer: Its ZeRO-3 optimizer (`engine.optimizer`).
        engine: The engine itself, which gradients need.
    """

    name = "deepspeed-zero3"

    def __init__(self, module: nn.Module, optimizer: Any, engine: Any = None) -> None:
        self.module, self.optimizer, self.engine = module, optimizer, engine
        self.base = optimizer.optimizer
        self.parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        group = next(iter(self.parameters.values())).ds_process_group
        if dist.get_world_size(group) != dist.get_world_size():
            raise LmcError("ZeRO-3 over a part of the ranks (MiCS, hpZ) is not supported yet")
        if any(flat is None for flat in optimizer.fp16_partitioned_groups_flat) or optimizer.swap_optimizer:
            raise LmcError("ZeRO-3 with parameters or optimizer state on NVMe is not supported: offload to the CPU")
        self.layout = ShardLayout.of_module(module, cpu_group())

    def _position(self, name: str) -> tuple[int, int, int]:
        """(sub-group, offset in its flat buffers, unpadded length) of this rank's shard."""
        o, parameter = self.optimizer, self.parameters[name]
        group, offset, _ = o.grad_position[o.get_param_id(parameter)]
        return group, offset, self.layout.slots[name].local_numel

    def _master(self, name: str) -> torch.Tensor:
        """This rank's unpadded view of the float32 master."""
        group, offset, length = self._position(name)
        return self.optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, length)

    def _state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(state key, parameter name, this rank's unpadded view) of all per-element optimizer state."""
        o = self.optimizer
        for name in self.parameters:
            group, offset, length = self._position(name)
            flat = o.fp32_partitioned_groups_flat[group]
            for key, value in o.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    yield key, name, value.narrow(0, offset, length)

    def read(self) -> ShardedVector:
        """A copy of the float32 master shards in host memory. Local."""
        return ShardedVector.from_shards(self.layout, {name: self._master(name).cpu() for name in self.parameters})

    def _write_masters(self, theta: ShardedVector) -> None:
        for name, shard in theta.items():
            self._master(name).copy_(shard)
        self.refresh()

    def refresh(self) -> None:
        """Working shards and persistent parameters ← masters, as ZeRO-3 does after its own step. Collective."""
        o = self.optimizer
        o._partition_all_parameters()
        for i in range(len(o.fp16_groups)):
            o._reassign_or_swap_out_partitioned_parameters(i)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

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

    def held(self) -> list[torch.Tensor]:
        return [self._master(name) for name in self.parameters]

    def check_state(self) -> None:
        check_flat_state(self.optimizer.optimizer, self.optimizer.fp32_partitioned_groups_flat, "sub-group")

    def read_state(self) -> State:
        """(per-element optimizer state by key, scalar state by key), copied. Local."""
        self.check_state()
        shards: dict[str, dict[str, torch.Tensor]] = {}
        for key, name, view in self._state():
            shards.setdefault(key, {})[name] = view
        scalars = read_counters(self.optimizer.optimizer, self.optimizer.fp32_partitioned_groups_flat)
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
                state[key] = as_counter(optimizer, value, flat)
        for key, name, view in self._state():
            view.copy_(vectors[key][name])

    def gradient(self, theta: ShardedVector, micro_batches: Sequence[MicroBatch], loss: Loss) -> ShardedVector:
        self.check_layout(theta)
        with agreement(self.layout.group):
            self._check_gradient()
        micros = even_passes(micro_batches, self.layout.group)
        if not micros:
            return theta.clone().zero_()
        engine, o = self.engine, self.optimizer
        device, world_size = torch.device(engine.device), self.layout.world_size
        with self._displaced(theta), measuring(self.module, device):
            for i, host in enumerate(micros):
                micro = host.to(device)
                prepare_pass(self.module, micro, device)
                engine.set_gradient_accumulation_boundary(i == len(micros) - 1)
                value = loss.value(loss.outputs(engine(**micro.inputs)), micro)
                # ZeRO-3 averages over ranks; what is wanted is the sum.
                engine.backward(value * world_size, scale_wrt_gas=False)
            shards = {}
            for name, parameter in self.parameters.items():
                gradient = o.get_local_fp32_grad_for_param(parameter).view(-1)[: self.layout.slots[name].local_numel]
                shards[name] = gradient.div(float(o.loss_scale)).cpu()
        return ShardedVector.from_shards(self.layout, shards).to(theta.flat.dtype, theta.flat.device)

    def _check_gradient(self) -> None:
        engine, o = self.engine, self.optimizer
        if engine is None:
            raise LmcError("gradients need the DeepSpeed engine: pass it, and not its module, to engine_shards()")
        check_precision(self.dtype, "DeepSpeed computes")
        check_precision(o.gradient_accumulation_dtype, "DeepSpeed accumulates gradients")
        check_precision(engine.communication_data_type, "DeepSpeed reduces gradients")
        if engine.torch_autocast_enabled():
            check_precision(engine.torch_autocast_dtype(), "DeepSpeed computes (torch_autocast)")
        if o.micro_step_id or o._epilogue_ran_this_backward:
            raise LmcError("a gradient was asked for inside an accumulation window: call it after an optimizer step")

    @contextmanager
    def _displaced(self, theta: ShardedVector) -> Iterator[None]:
        """Working weights at θ; the masters, which are not touched, give them back. Collective."""
        engine, o = self.engine, self.optimizer
        boundary = engine._is_gradient_accumulation_boundary, o.is_gradient_accumulation_boundary()
        averaged = dict(o.averaged_gradients)
        offloaded = [(flat, flat.grad.clone()) for flat in o.fp32_partitioned_groups_flat if flat.grad is not None]
        o._partition_all_parameters()
        for name, parameter in self.parameters.items():
            parameter.ds_tensor.detach().view(-1)[: self.layout.slots[name].local_numel].copy_(theta[name])
        self._gather_persistent()
        o.zero_grad()  # or the gradients of these passes would be added to those of the last step
        try:
            yield
        finally:
            o.zero_grad()
            o.averaged_gradients = averaged
            for flat, gradient in offloaded:
                flat.grad.copy_(gradient)
            engine._is_gradient_accumulation_boundary = boundary[0]
            o.set_gradient_accumulation_boundary(boundary[1])
            self.refresh()

    def step_gradient(self) -> ShardedVector:
        """g_s in float32. Local."""
        o, pieces = self.optimizer, {}
        for name, parameter in self.parameters.items():
            gradient = o.get_local_fp32_grad_for_param(parameter).view(-1)[: self.layout.slots[name].local_numel]
            pieces[name] = gradient.float().div(float(o.loss_scale)).cpu()
        return ShardedVector.from_shards(self.layout, pieces)

    @property
    def group_of(self) -> dict[str, int]:
        """Parameter name → optimizer group; ZeRO-3 regroups parameters into sub-groups of these."""
        return {name: int(self.optimizer.sub_group_to_group_id[self._position(name)[0]]) for name in self.parameters}

    @property
    def has_state(self) -> bool:
        """Whether the optimizer keeps anything from one step to the next."""
        return any(self.optimizer.optimizer.state.get(f) for f in self.optimizer.fp32_partitioned_groups_flat)
