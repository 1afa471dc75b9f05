"""From what a training loop hands out to the objects that matter: optimizers out of wrappers, wrappers of modules."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmc_dist.errors import LmcError

# What DeepSpeed's optimizers are told by, each of another engine.
ZERO3, ZERO12, BF16, UNFUSED, FUSED = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups",
    "fp32_groups_flat",
)


def deepspeed_kind(optimizer: Any) -> str | None:
    """Which of DeepSpeed's optimizers this is, None for another's."""
    return next((kind for kind in (ZERO3, ZERO12, BF16, UNFUSED, FUSED) if hasattr(optimizer, kind)), None)


def unwrapped(optimizer: Any) -> Any:
    """DeepSpeed's or torch's own optimizer out of the wrappers of others."""
    while deepspeed_kind(optimizer) is None:
        is_torch = isinstance(optimizer, torch.optim.Optimizer)
        if is_torch and not type(optimizer).__module__.startswith("accelerate."):
            break
        inner = getattr(optimizer, "optimizer", None)
        if inner is optimizer or inner is None:
            break
        optimizer = inner
    return optimizer


def is_deepspeed_engine(model: Any) -> bool:
    return hasattr(model, "module") and hasattr(model, "set_gradient_accumulation_boundary")


def alive(*kinds: type) -> list[Any]:
    """All objects of some classes that are in use. Local; for those that nothing names, the garbage collector does."""
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), kinds)]


def find_wrapper(module: nn.Module, optimizer: Any = None) -> Any:
    """The DeepSpeedEngine or DistributedDataParallel around a module, None without one. Local.

    Trainers hand the inner module to callbacks, and it does not know what wraps it; the garbage collector does.

    Args:
        module: The module inside.
        optimizer: Tells several engines apart: a Trainer's earlier ones live on after they were destroyed.

    Raises:
        LmcError: Several wrap it.
    """
    kinds: list[type] = [DistributedDataParallel]
    if "deepspeed.runtime.engine" in sys.modules:
        kinds.append(sys.modules["deepspeed.runtime.engine"].DeepSpeedEngine)
    found = [o for o in alive(*kinds) if getattr(o, "module", None) is module]
    if len(found) > 1:
        number = len(found)
        found = [o for o in found if optimizer is not None and unwrapped(getattr(o, "optimizer", None)) is optimizer]
        if len(found) != 1:
            raise LmcError(
                f"{number} engines wrap the same model: pass the one that trains it, not the model inside it"
            )
    return found[0] if found else None


def accelerate_autocast(module: nn.Module) -> str | None:
    """What accelerate has put the model's forward under: `bfloat16`, `float16`, or None. Local."""
    if not hasattr(module, "_original_forward"):
        return None
    from accelerate.state import AcceleratorState

    return {"bf16": "bfloat16", "fp16": "float16"}.get(AcceleratorState().mixed_precision)
