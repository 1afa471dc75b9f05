"""Live training engines: shards out, shards in (docs/engines.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.protocol import EngineShards
from lmc_dist.shards.engines.replicated import DDPShards, SingleShards
from lmc_dist.shards.engines.wrappers import (
    BF16,
    UNFUSED,
    ZERO3,
    ZERO12,
    deepspeed_kind,
    find_wrapper,
    is_deepspeed_engine,
    unwrapped,
)
from lmc_dist.shards.engines.zero0 import UnfusedShards, ZeRO0Shards
from lmc_dist.shards.engines.zero3 import ZeRO3Shards
from lmc_dist.shards.engines.zero12 import ZeRO12Shards

__all__ = [
    "DDPShards",
    "EngineShards",
    "SingleShards",
    "UnfusedShards",
    "ZeRO0Shards",
    "ZeRO3Shards",
    "ZeRO12Shards",
    "engine_shards",
    "is_engine",
]


def is_engine(model: Any) -> bool:
    """Whether this is something that trains, and no bare model. Local."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, (EngineShards, DistributedDataParallel, FSDPModule)) or is_deepspeed_engine(model)


def engine_shards(model: Any, optimizer: Any = None, scaler: Any = None) -> EngineShards:
    """The shards of a live engine. Collective.

    Args:
        model: A `DeepSpeedEngine`, a `DistributedDataParallel`, an FSDP2 or HSDP module, a plain module trained in one process,
            or the module inside one of these; or what this function returned.
        optimizer: The optimizer; wrappers by accelerate are opened. A `DeepSpeedEngine` knows its own.
        scaler: The `torch.amp.GradScaler` of the training loop; accelerate's optimizer knows its own.

    Raises:
        LmcError: Not an engine whose shards can be read.
    """
    if isinstance(model, EngineShards):
        return model
    # Here, since it brings torch's compiler with it: a plan without an engine does without.
    from torch.distributed.fsdp import FSDPModule

    from lmc_dist.shards.engines.hsdp import fsdp_shards

    scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
    engine = model if is_deepspeed_engine(model) else None
    optimizer = unwrapped(engine.optimizer if engine is not None else optimizer)
    if isinstance(model, FSDPModule):
        return fsdp_shards(model, optimizer, scaler)
    kind = deepspeed_kind(optimizer)
    if kind is not None:
        module = model if engine is None else engine.module
        if kind == ZERO3:
            return ZeRO3Shards(module, optimizer, engine)
        if kind in (ZERO12, BF16):
            return ZeRO12Shards(module, optimizer, engine)
        if kind == UNFUSED:
            return UnfusedShards(module, optimizer, engine)
        raise LmcError(
            f"DeepSpeed's {type(optimizer).__name__} around its fused optimizers is not supported: use an optimizer of "
            "torch, or ZeRO stage 1 to 3"
        )
    if not isinstance(model, torch.nn.Module):
        raise LmcError(f"cannot read shards of {type(model).__name__}: it is no engine that is known here")
    is_wrapper = engine is not None or isinstance(model, DistributedDataParallel)
    wrapper = model if is_wrapper else find_wrapper(model, optimizer)
    if wrapper is None:
        return SingleShards(model, optimizer, scaler)
    if isinstance(wrapper, DistributedDataParallel):
        return DDPShards(wrapper, optimizer, scaler)
    own = unwrapped(wrapper.optimizer)
    if optimizer is not None and own is not optimizer:
        raise LmcError(
            f"the DeepSpeed engine around the model steps its {type(own).__name__}, not the {type(optimizer).__name__} that "
            "was given: pass the engine itself. A Trainer's second train() under DeepSpeed comes here, and fails without a "
            "logger as well, since it goes on with the engine that it has destroyed: set trainer.model_wrapped = "
            "trainer.model before it"
        )
    if isinstance(own, torch.optim.Optimizer):
        return ZeRO0Shards(wrapper)
    raise LmcError(
        f"cannot read shards of a DeepSpeed engine with optimizer {type(wrapper.optimizer).__name__}: pass one to "
        "deepspeed.initialize"
    )
