"""Engines in which every rank holds the whole model: one process, DistributedDataParallel, DeepSpeed ZeRO-0 to 2.

A rank reads its slice of every parameter by rule `zero3`, and writes one parameter after the other, gathered from all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.engines.passes import measuring, prepare_pass
from lmc_dist.shards.engines.protocol import EngineShards, check_precision
from lmc_dist.shards.engines.torch_loop import TorchLoopShards, trainable
from lmc_dist.shards.engines.torch_step import TorchStepShards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

if TYPE_CHECKING:
    from lmc_dist.curvature.loss import Loss, MicroBatch


class ReplicatedShards(EngineShards):
    """Working weights are whole on every rank. Abstract."""

    def _slice(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's 1-D part of a whole tensor of the parameter's shape."""
        slot = self.layout.slots[name]
        return tensor.detach().reshape(-1)[slot.start : slot.end]

    def working(self) -> ShardedVector:
        """This rank's slices of the parameters, in their own dtype. Local."""
        return ShardedVector.from_shards(
            self.layout, {name: self._slice(name, p).cpu() for name, p in self.parameters.items()}
        )

    @torch.no_grad()
    def _spread(self, vector: ShardedVector, targets: Callable[[str], torch.Tensor]) -> None:
        """Fills whole tensors from all ranks' slices, one parameter at a time. Collective."""
        layout = self.layout
        for slot in layout:
            mine = vector.flat[slot.offset : slot.offset + slot.padded]
            pieces = [mine]
            if layout.world_size > 1:
                pieces = [torch.empty_like(mine) for _ in range(layout.world_size)]
                dist.all_gather(pieces, mine.contiguous(), group=layout.group)
            target = targets(slot.spec.name).detach()
            target.copy_(torch.cat(pieces)[: slot.spec.numel].view(target.shape))

    def gradient(self, theta: ShardedVector, micro_batches: Sequence[MicroBatch], loss: Loss) -> ShardedVector:
        self.check_layout(theta)
        with agreement(self.layout.group):
            check_precision(self.dtype, f"{self.name} computes")
        parameters = list(self.parameters.values())
        total = [torch.zeros_like(p) for p in parameters]
        device = parameters[0].device
        with self._displaced(theta), measuring(self.module, device), agreement(self.layout.group):
            for host in micro_batches:
                micro = host.to(device)
                prepare_pass(self.module, micro, device)
                value = loss.value(loss.outputs(self.module(**micro.inputs)), micro)
                # not backward(): gradients that wait for their step, and the engine's hooks, are left alone
                for part, found in zip(total, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                    if found is not None:
                        part.add_(found)
        shards = {}
        for name, part in zip(self.parameters, total, strict=True):
            whole = part.cpu()
            if self.layout.world_size > 1:
                dist.all_reduce(whole, group=self.layout.group)
            shards[name] = self._slice(name, whole)
        return ShardedVector.from_shards(self.layout, shards).to(theta.flat.dtype, theta.flat.device)

    @contextmanager
    def _displaced(self, theta: ShardedVector) -> Iterator[None]:
        """Working weights at θ, afterwards what they were. Collective."""
        here = self.working()
        self._spread(theta, self.parameters.__getitem__)
        try:
            yield
        finally:
            self._spread(here, self.parameters.__getitem__)


class ReplicatedMasters(ReplicatedShards, TorchLoopShards):
    """Masters and optimizer state are whole on every rank as well. Abstract."""

    def _set_model(self, module: nn.Module, optimizer: Any) -> None:
        """Takes the module and the optimizer of its parameters.

        Raises:
            LmcError: Parameters in less than float32, or an optimizer of others.
        """
        self.module, self.parameters = module, trainable(module)
        self.masters = self.parameters
        with agreement(cpu_group()):
            check_masters(self.name, self.masters)
            self._set_optimizer(optimizer)
        self.layout = ShardLayout.of_module(module, cpu_group())

    def _shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._slice(name, tensor)

    def _fill(self, targets: Callable[[str], torch.Tensor], values: ShardedVector) -> None:
        self._spread(values, targets)

    def _write_masters(self, theta: ShardedVector) -> None:
        self._spread(theta, self.masters.__getitem__)


class SingleShards(TorchStepShards, ReplicatedMasters):
    """A plain module and its torch optimizer in one process.

    Args:
        module: The model.
        optimizer: A torch optimizer over its parameters.
        scaler: The loop's `GradScaler`.

    Raises:
        LmcError: The process has others beside it, whose gradients nothing would reduce.
    """

    name = "single"

    def __init__(self, module: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        self.wrapper, self.scaler, self.optimizer = module, scaler, optimizer
        self._set_model(module, optimizer)
        if self.layout.world_size > 1:
            raise LmcError(
                f"a plain module in a group of {self.layout.world_size} ranks: nothing reduces its gradients. Wrap it in "
                "DistributedDataParallel, fully_shard or DeepSpeed; with the HF Trainer on CPU start "
                "PartialState(backend='gloo') first and pass accelerator_config={'use_configured_state': True}"
            )

    def is_local_pass(self) -> bool:
        return False

    @property
    def settings(self) -> dict[str, Any]:
        return {}


class DDPShards(TorchStepShards, ReplicatedMasters):
    """A module in `DistributedDataParallel` and its torch optimizer.

    Args:
        wrapper: The DistributedDataParallel module over all ranks.
        optimizer: A torch optimizer over its parameters.
        scaler: The loop's `GradScaler`.
    """

    name = "ddp"

    def __init__(self, wrapper: Any, optimizer: Any, scaler: Any = None) -> None:
        self.wrapper, self.scaler, self.optimizer = wrapper, scaler, optimizer
        self._set_model(wrapper.module, optimizer)
        if dist.get_world_size(wrapper.process_group) != self.layout.world_size:
            raise LmcError("DistributedDataParallel over a part of the ranks is not supported")

    def is_local_pass(self) -> bool:
        return not self.wrapper.require_backward_grad_sync

    def _accumulating(self, is_local: bool) -> Any:
        return self.wrapper.no_sync() if is_local else nullcontext()

    @property
    def settings(self) -> dict[str, Any]:
        wrapper = self.wrapper
        return {
            "bucket_cap_mb": wrapper.bucket_bytes_cap / 2**20,
            "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
            "find_unused_parameters": wrapper.find_unused_parameters,
            "static_graph": wrapper.static_graph,
        }

    @property
    def first_differs(self) -> bool:
        return self.layout.world_size > 2  # two numbers add up to the same in any order

    def warm_up(self, inputs: dict[str, torch.Tensor]) -> None:
        """One pass whose gradient is dropped: after its first backward pass DDP reduces in another order. Collective."""
        with measuring(self.module, self.device):
            self.module.train()
            self.run_pass(inputs, 1.0, 0.0, is_last=True, is_local=False)
        self.base.zero_grad()


def check_masters(name: str, masters: dict[str, Any]) -> None:
    """Raises LmcError unless all masters are float32, or all float64. Local."""
    found = {p.dtype for p in masters.values()}
    if len(found) > 1 or not found <= {torch.float32, torch.float64}:
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise LmcError(
            f"{name}: the optimizer steps parameters in {listed}; the log needs masters in float32 (or all in float64): "
            "load the model in float32 and compute in less by torch.autocast, a MixedPrecisionPolicy or DeepSpeed's bf16"
        )
