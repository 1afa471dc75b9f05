"""The weights of a model before an engine takes it: whole on every rank, or partitioned as it was made (`zero.Init`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.frozen import read_weights, skeleton_of
from lmc_dist.shards.unloaded import Unloaded, trained_later
from lmc_dist.shards.vector import ShardedVector


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the parameters."""
    return any(hasattr(p, "ds_tensor") for p in module.parameters())


def holds(module: nn.Module, theta: ShardedVector) -> bool:
    """Whether the module has these weights, rounded to its own types. Collective."""
    return checksum(read_weights(module, theta.layout).to(theta.flat.dtype)) == checksum(rounded(theta, module))


def rounded(theta: ShardedVector, module: nn.Module) -> ShardedVector:
    """θ as the module can hold it. Local."""
    found = theta.clone()
    for name, shard in found.items():
        shard.copy_(shard.to(module.get_parameter(name).dtype))
    return found


@torch.no_grad()
def write_weights(module: nn.Module, theta: ShardedVector) -> None:
    """Sets the module's weights, one parameter at a time, and checks them. Collective.

    Args:
        module: Whole on every rank or partitioned by ZeRO-3; no engine has taken it yet.
        theta: Laid out by rule `zero3`.

    Raises:
        LmcError: Sharded in another way, or the module does not hold θ afterwards.
    """
    layout = theta.layout
    for name, slot in layout.slots.items():
        parameter: Any = module.get_parameter(name)
        mine = theta.flat[slot.offset : slot.offset + slot.padded].contiguous()
        if isinstance(parameter, DTensor):
            raise LmcError(f"{name} is sharded by FSDP2 before the Trainer begins: correct in train(), not at init")
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.view(-1)[: slot.local_numel].copy_(mine[: slot.local_numel])
            continue
        pieces = [mine]
        if layout.world_size > 1:
            pieces = [torch.empty_like(mine) for _ in range(layout.world_size)]
            dist.all_gather(pieces, mine, group=layout.group)
        parameter.copy_(torch.cat(pieces)[: slot.spec.numel].view(parameter.shape))
    if not holds(module, theta):
        raise LmcError("the model does not hold the corrected weights after they were written")


def another(module: nn.Module) -> Unloaded:
    """A model of the same architecture and frozen weights, whose trained weights are written before it is used. Local.

    Its weights are collective where the module is partitioned.
    """
    skeleton = skeleton_of(module)
    return Unloaded(skeleton, trained_later(skeleton, lambda name: _whole(module.get_parameter(name))))


def _whole(parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        whole: torch.Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach()
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]
