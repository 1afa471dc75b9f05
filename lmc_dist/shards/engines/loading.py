"""How an engine takes the weights of a model that has none yet: one parameter at a time, each rank keeping its part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lmc_dist.shards.unloaded import Unloaded, Weights


def load_whole(model: Unloaded, device: torch.device | str = "cpu") -> nn.Module:
    """The module with all its weights, for engines that keep them whole on every rank. Collective as the weights are."""
    for name, parameter, places in _placed(model.module):
        value = model.weights(name).to(device, parameter.dtype, copy=True)
        _put(places, nn.Parameter(value, parameter.requires_grad))
    return model.module


def load_partitioned(model: Unloaded, settings: dict[str, Any]) -> nn.Module:
    """The module as ZeRO-3's `zero.Init` leaves one that was made inside it: every rank holds its part. Collective.

    Args:
        model: The weights are rounded to the type that DeepSpeed computes in, as `deepspeed.initialize` rounds a whole module's.
        settings: DeepSpeed's whole configuration.
    """
    from deepspeed import zero

    dtype = zero.Init(config_dict_or_path=settings).dtype
    for name, parameter, places in _placed(model.module):
        holder = nn.Module()
        holder.weight = nn.Parameter(model.weights(name).to(dtype, copy=True), parameter.requires_grad)
        zero.Init(module=holder, config_dict_or_path=settings)
        _put(places, holder.weight)
    return model.module


@torch.no_grad()
def load_sharded(module: nn.Module, weights: Weights, device: torch.device) -> None:
    """Gives an FSDP2 module that was sharded on the meta device its weights. Collective as the weights are."""
    from torch.distributed.tensor import distribute_tensor

    buffers = [(part, name, b) for part in module.modules() for name, b in part.named_buffers(recurse=False)]
    module.to_empty(device=device)
    for part, name, buffer in buffers:
        setattr(part, name, buffer.to(device))
    for name, parameter in module.named_parameters():
        shard: Any = parameter
        whole = weights(name).to(device, shard.dtype)
        mine: Any = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        shard.to_local().copy_(mine.to_local())


def _placed(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[tuple[nn.Module, str]]]]:
    """(first name, parameter, where it hangs, under every name it is tied to). Local."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((part, name))
    for name, parameter in list(module.named_parameters()):
        yield name, parameter, places[id(parameter)]


def _put(places: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    for part, name in places:
        setattr(part, name, parameter)
