"""torch FSDP2 (`fully_shard`): every parameter is a DTensor of rows, which the optimizer steps directly.

The sharded parameters are the masters; what the forward pass uses is gathered from them, in another dtype where the
mixed-precision policy says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Shard

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.engines.passes import even_passes, measuring, prepare_pass
from lmc_dist.shards.engines.protocol import check_precision
from lmc_dist.shards.engines.replicated import check_masters
from lmc_dist.shards.engines.torch_loop import trainable
from lmc_dist.shards.engines.torch_step import TorchStepShards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

if TYPE_CHECKING:
    from lmc_dist.curvature.loss import Loss, MicroBatch


class FSDP2Shards(TorchStepShards):
    """The shards of an FSDP2 model and its torch optimizer. Every rank constructs one.

    Args:
        module: The root that `fully_shard` was applied to.
        optimizer: A torch optimizer over its parameters.
        scaler: The loop's `GradScaler`.

    Raises:
        LmcError: Parameters in less than float32, outside FSDP2, over a part of the ranks, or sharded by another dimension than rows.
    """

    name = "fsdp2"
    placements: tuple[Placement, ...] = (Shard(0),)

    def __init__(self, module: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        self.module = self.wrapper = module
        self.optimizer, self.scaler = optimizer, scaler
        self._reshard()
        self.parameters = self.masters = trainable(module)
        with agreement(cpu_group()):
            for name, parameter in self.parameters.items():
                self._check_placement(name, parameter)
            self._set_optimizer(optimizer)
        self.layout = ShardLayout.of_module(module, cpu_group(), rule=self.name)
        with agreement(self.layout.group):
            for name, parameter in self.parameters.items():
                first, last = self.layout.held(name)
                if (length := self._held(parameter).numel()) != last - first:
                    raise LmcError(f"this rank holds {length} elements of {name}, its layout {last - first}")

    def _check_placement(self, name: str, parameter: Any) -> None:
        """Raises LmcError unless the parameter is sharded by rows over all ranks. Local."""
        if not isinstance(parameter, DTensor):
            raise LmcError(f"FSDP2: {name} is not sharded (ignored_params, or a submodule outside fully_shard)")
        mesh, world_size = parameter.device_mesh, dist.get_world_size()
        if mesh.ndim > 2 or mesh.size() != world_size:
            raise LmcError(
                f"FSDP2 over a mesh of {tuple(mesh.shape)} is not supported: shard over all {world_size} ranks, or over a "
                "mesh (replicas, shards) of all of them"
            )
        if parameter.placements != self.placements:
            raise LmcError(f"FSDP2: {name} is placed {parameter.placements}, supported is {self.placements}")

    def _units(self) -> Iterator[Any]:
        """The modules that `fully_shard` was applied to."""
        return (part for part in self.module.modules() if isinstance(part, FSDPModule))

    def _param_groups(self) -> Iterator[Any]:
        return (group for unit in self._units() for group in unit._get_fsdp_state()._fsdp_param_groups)

    def _reshard(self) -> None:
        """Whole parameters that a forward pass without a backward pass has left behind are dropped. Local."""
        for unit in self._units():
            unit.reshard()

    @torch.no_grad()
    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        """The 1-D view of what this rank holds of a tensor that lies like a parameter."""
        assert isinstance(tensor, DTensor)
        return tensor.to_local().view(-1)

    def _shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._held(tensor)

    def _fill(self, targets: Callable[[str], torch.Tensor], values: ShardedVector) -> None:
        for name, shard in values.items():
            self._shard(name, targets(name)).copy_(shard)

    def _write_masters(self, theta: ShardedVector) -> None:
        self._reshard()
        self._fill(lambda name: self.parameters[name].detach(), theta)

    def working(self) -> ShardedVector:
        """This rank's part of the parameters that each unit gathers for its forward pass. Collective."""
        names = {id(p): name for name, p in self.parameters.items()}
        shards = {}
        self._reshard()
        for unit in self._units():
            unit.unshard()
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                for param in group.fsdp_params:
                    if (name := names.get(id(param.sharded_param))) is not None:
                        slot = self.layout.slots[name]
                        whole = param.unsharded_param.detach().reshape(-1)
                        shards[name] = whole[slot.start : slot.end].to("cpu", copy=True)
            unit.reshard()
        return ShardedVector.from_shards(self.layout, {name: shards[name] for name in self.parameters})

    def gradient(self, theta: ShardedVector, micro_batches: Sequence[MicroBatch], loss: Loss) -> ShardedVector:
        self.check_layout(theta)
        with agreement(self.layout.group):
            self._check_gradient()
        micros = even_passes(micro_batches, self.layout.group)
        if not micros:
            return theta.clone().zero_()
        device = self.device
        # FSDP2 divides by this on the way; what is wanted is the sum over ranks.
        divisor = next(self._param_groups()).gradient_divide_factor or self.layout.world_size
        with self._displaced(theta), measuring(self.module, device):
            for host in micros:
                micro = host.to(device)
                prepare_pass(self.module, micro, device)
                value = loss.value(loss.outputs(self.module(**micro.inputs)), micro)
                (value * divisor).backward()
            found = self._vector(self._gradient_of)
        return found.to(theta.flat.dtype, theta.flat.device)

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs; with CPU offload the shards are elsewhere."""
        return next(self._param_groups()).device

    # --- logging and replay ----------------------------------------------------------------------------------------

    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        with agreement(self.layout.group):
            check_masters(self.name, self.masters)
            for group in self._param_groups():
                if group.gradient_divide_factor not in (None, float(self.layout.world_size)):
                    raise LmcError(
                        f"FSDP2 divides gradients by {group.gradient_divide_factor} (set_gradient_divide_factor): only "
                        "gradients averaged over the ranks can be logged"
                    )
                if group._all_reduce_hook is not None:
                    raise LmcError("FSDP2 with set_all_reduce_hook cannot be logged: a replay does not know the hook")
        return super().watch(before, after, keeps_gradient)

    def is_local_pass(self) -> bool:
        return not next(self._param_groups()).reduce_grads

    @contextmanager
    def _accumulating(self, is_local: bool) -> Iterator[None]:
        root: Any = self.module
        root.set_requires_gradient_sync(not is_local)
        yield

    @property
    def settings(self) -> dict[str, Any]:
        policies = {
            (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype, group.mp_policy.cast_forward_inputs)
            for group in self._param_groups()
        }
        param_dtype, reduce_dtype, cast_inputs = policies.pop()
        return {
            "units": [name for name, part in self.module.named_modules() if isinstance(part, FSDPModule)],
            "param_dtype": param_dtype and str(param_dtype).removeprefix("torch."),
            "reduce_dtype": reduce_dtype and str(reduce_dtype).removeprefix("torch."),
            "cast_forward_inputs": cast_inputs,
            "uniform": not policies,
        }

    def _check_gradient(self) -> None:
        groups = list(self._param_groups())
        for name, parameter in self.parameters.items():
            check_precision(parameter.dtype, f"FSDP2 holds {name}")
        for group in groups:
            if group.mp_policy.param_dtype is not None:
                check_precision(group.mp_policy.param_dtype, "FSDP2 computes (MixedPrecisionPolicy.param_dtype)")
            if group.mp_policy.reduce_dtype is not None:
                check_precision(
                    group.mp_policy.reduce_dtype, "FSDP2 reduces gradients (MixedPrecisionPolicy.reduce_dtype)"
                )
            waiting = any(param.unsharded_accumulated_grad is not None for param in group.fsdp_params)
            if waiting or not group.reduce_grads:
                raise LmcError(
                    "a gradient was asked for inside an accumulation window: call it after an optimizer step"
                )
        if len({group.gradient_divide_factor for group in groups}) > 1:
            raise LmcError("FSDP2 units with different gradient_divide_factor: gradients have no common scale")

    @contextmanager
    def _displaced(self, theta: ShardedVector) -> Iterator[None]:
        """The module at θ and without gradients; both are put back. Collective."""
        here = {name: self._held(p.detach()).to("cpu", copy=True) for name, p in self.parameters.items()}
        gradients = {name: p.grad for name, p in self.parameters.items()}
        self._write_masters(theta)
        for parameter in self.parameters.values():
            parameter.grad = None
        try:
            yield
        finally:
            self._reshard()
            for name, parameter in self.parameters.items():
                self._held(parameter.detach()).copy_(here[name])
                parameter.grad = gradients[name]
