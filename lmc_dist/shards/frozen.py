"""Parameters that are not trained: constants of the model, sharded like the others.

A log holds trained parameters only. What a frozen one is, the model that was fine-tuned says: a live engine, or the
checkpoint that training started from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lmc_dist.shards.layout import ParamSpec, ShardLayout, num_replicas
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.shards.vector import ShardedVector

# Attributes that DeepSpeed and FSDP2 hang on modules: their own state, with process groups in it.
_ENGINES = ("ds_", "_ds_", "_original_parameters", "_external_params", "__composable_api")


def frozen_layout(module: nn.Module, like: ShardLayout) -> ShardLayout | None:
    """Where the frozen parameters of a module lie, by the rule and over the ranks of `like`; None where it has none."""
    specs = [
        ParamSpec(name, tuple(getattr(p, "ds_shape", p.shape)))
        for name, p in module.named_parameters()
        if not p.requires_grad
    ]
    return ShardLayout(specs, like.rank, like.world_size, like.rule, like.group) if specs else None


@torch.no_grad()
def read_frozen(module: nn.Module | Unloaded, like: ShardLayout) -> ShardedVector | None:
    """This rank's shards of the frozen parameters, in host memory; None where there are none. Collective.

    They lie by the rule of `like`, or, where that is one of replicas, by `zero3`, so that a sharded module can gather them.

    Args:
        module: Whole, partitioned by ZeRO-3, sharded by FSDP2, or without its weights.
        like: Layout of the trained parameters in the same module.
    """
    layout = frozen_layout(module.module if isinstance(module, Unloaded) else module, like)
    if layout is None:
        return None
    weights = read_weights(module, layout)
    if num_replicas(layout.rule) == 1:
        return weights
    return relayout(weights, ShardLayout(layout.params, layout.rank, layout.world_size, "zero3", layout.group))


@torch.no_grad()
def read_weights(module: nn.Module | Unloaded, layout: ShardLayout) -> ShardedVector:
    """This rank's shards of a module's own weights, float32 or better, in host memory. Local.

    Args:
        module: Whole, partitioned by ZeRO-3, sharded by FSDP2, or without its weights.
        layout: Of the parameters to read, by the rule that the module is divided by.
    """
    shards = {}
    for slot in layout:
        name = slot.spec.name
        parameter: Any = module.weights(name) if isinstance(module, Unloaded) else module.get_parameter(name)
        if hasattr(parameter, "ds_tensor"):
            shard = parameter.ds_tensor.detach().view(-1)[: slot.local_numel]
        elif isinstance(parameter, DTensor):
            shard = layout.owned(slot.spec.name, parameter.to_local().reshape(-1))
        else:
            shard = parameter.detach().reshape(-1)[slot.start : slot.end]
        shards[slot.spec.name] = shard.to("cpu", torch.promote_types(shard.dtype, torch.float32), copy=True)
    return ShardedVector.from_shards(layout, shards)


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy of a module in eval mode, parameters on the meta device, buffers copied, hooks left out.

    For models that their config alone does not describe, such as one with adapters. The module may be partitioned.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        own = {name: _meta(p, memo) for name, p in part._parameters.items()}
        memo[id(part._parameters)] = own
        for name, value in vars(part).items():
            if "_hooks" in name:
                memo[id(value)] = OrderedDict()
            elif name.startswith(_ENGINES) and not isinstance(value, (int, str)):
                memo[id(value)] = None
    with _plain_classes(module):
        skeleton = deepcopy(module, memo).eval()
    for part in skeleton.modules():
        if "_original_forward" in vars(part):  # accelerate's, under mixed precision: autocast around the class's own
            del part.forward, part._original_forward
    if (config := getattr(skeleton, "config", None)) is not None:
        config.use_cache = False  # a block that runs again would meet its own keys of the first time
    return skeleton


@contextmanager
def _plain_classes(module: nn.Module) -> Iterator[None]:
    """The modules that `fully_shard` gave another class, which refuses to be copied, as what they were."""
    from torch.distributed.fsdp import FSDPModule

    changed = [(part, type(part)) for part in module.modules() if isinstance(part, FSDPModule)]
    for part, kind in changed:
        part.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind


def _meta(parameter: Any, memo: dict[int, Any]) -> Any:
    """A parameter's stand-in, the same for every name it is tied to."""
    if parameter is None:
        return None
    if id(parameter) not in memo:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        stand_in = torch.empty(shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
    return memo[id(parameter)]
