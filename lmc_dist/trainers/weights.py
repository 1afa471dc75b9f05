"""The weights of a model before an engine takes it: whole on every rank, or partitioned as it was made (`zero.Init`)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.frozen import read_weights
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


def another(module: nn.Module) -> nn.Module:
    """A model of the same architecture and frozen weights, whole on every rank. Local.

    Raises:
        LmcError: The module is partitioned and has frozen weights.
    """
    if not is_partitioned(module):
        return deepcopy(module)
    if frozen := [name for name, p in module.named_parameters() if not p.requires_grad]:
        raise LmcError(
            f"replay_head='all' needs a second model, and the frozen weights of this one are partitioned ({frozen[0]}): "
            "load it before TrainingArguments(deepspeed=…), or choose a replay_head of some steps"
        )
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed as integration

    config: Any = module.config
    present = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()  # or it would be partitioned as well
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    finally:
        integration._hf_deepspeed_config_weak_ref = present
