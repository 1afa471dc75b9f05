"""Live training engines: shards out, shards in (docs/engines.md)."""

from __future__ import annotations

from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.fsdp2 import FSDP2Shards
from lmc_dist.shards.engines.protocol import EngineShards
from lmc_dist.shards.engines.zero3 import ZeRO3Shards

__all__ = ["EngineShards", "FSDP2Shards", "ZeRO3Shards", "backward_micro_batch", "engine_shards"]


def engine_shards(model: Any, optimizer: Any = None) -> EngineShards:
    """The shards of a live engine. Collective.

    Args:
        model: A `DeepSpeedEngine`, the module inside one, or an FSDP2 module.
        optimizer: The optimizer; wrappers by accelerate are opened. A `DeepSpeedEngine` knows its own.

    Raises:
        LmcError: Not an engine whose shards can be read.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        return FSDP2Shards(model, unwrapped(optimizer))  # type: ignore[arg-type]
    engine = model if hasattr(model, "optimizer") and hasattr(model, "module") else None
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
    optimizer = unwrapped(optimizer)
    if not hasattr(optimizer, "fp32_partitioned_groups_flat") or not hasattr(optimizer, "grad_position"):
        raise LmcError(
            f"cannot read shards of {type(model).__name__} with optimizer {type(optimizer).__name__}: "
            "only DeepSpeed ZeRO-3 engines and FSDP2 modules are supported so far"
        )
    return ZeRO3Shards(model if engine is None else engine.module, optimizer, engine)


def unwrapped(optimizer: Any) -> Any:
    """DeepSpeed's or torch's own optimizer out of the wrappers of others."""
    while not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is optimizer or inner is None:
            break
        optimizer = inner
    return optimizer


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
