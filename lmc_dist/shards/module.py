"""Run an unmodified nn.Module on flat shards.

The module is a skeleton: its trainable parameters are on the meta device and never hold a value; its buffers are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lmc_dist.errors import LmcError
from lmc_dist.shards.gather import all_gather, device_group, unpack
from lmc_dist.shards.layout import ShardLayout, num_replicas
from lmc_dist.shards.segments import SegmentedModule
from lmc_dist.shards.vector import ShardedVector


class ShardedModule:
    """A module whose parameters exist as the shards of `layout`.

    Args:
        module: Any nn.Module; its own trainable parameter values are ignored.
        layout: Where the parameters lie.
        device: Where it computes; its buffers are moved there.
        blocked: Gather one block at a time inside products; False gathers the whole model.
        frozen: This rank's shards of the parameters that are not trained (`shards.frozen`), over the same ranks.

    Attributes:
        group: The layout's ranks, by what moves tensors of `device`.

    Raises:
        LmcError: The layouts do not hold exactly the module's parameters, or lie by a rule of replicas.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ShardLayout,
        device: torch.device | str = "cpu",
        blocked: bool = True,
        frozen: ShardedVector | None = None,
    ) -> None:
        trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        if trainable != set(layout.slots):
            raise LmcError(
                "the model's trainable parameters are not those of the layout: "
                f"only in the model {sorted(trainable - set(layout.slots))[:3]}, "
                f"only in the layout {sorted(set(layout.slots) - trainable)[:3]}"
            )
        if any(num_replicas(each.rule) > 1 for each in (layout, layout if frozen is None else frozen.layout)):
            raise LmcError(
                f"a sharded module cannot gather what lies by rule '{layout.rule}': lay it out by zero3 (shards.relayout)"
            )
        constants = set() if frozen is None else set(frozen.layout.slots)
        on_meta = [name for name, p in module.named_parameters() if not p.requires_grad and p.is_meta]
        if missing := sorted(set(on_meta) - constants):
            raise LmcError(f"frozen parameters need values (frozen=), and {missing[:3]} have none")
        self.module, self.layout, self.device, self.frozen = module, layout, torch.device(device), frozen
        self.group = device_group(layout.group, self.device)
        move_buffers(module, self.device)
        self.segments = SegmentedModule(module, layout, blocked, None if frozen is None else frozen.layout)

    def gather(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat shards (L,) → all ranks' flat shards (W, L); differentiable. Collective."""
        return all_gather(flat, self.group)

    def call(self, full: torch.Tensor, inputs: Mapping[str, Any]) -> Any:
        """Forward pass with the parameters unpacked from gathered shards (W, L). Local."""
        return self.call_with(unpack(full, self.layout), inputs)

    def call_with(self, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> Any:
        """Forward pass with whole parameters given by name (dual numbers included). Collective where some are frozen."""
        constants = {} if self.frozen is None else unpack(self.gather(self.frozen.flat), self.frozen.layout)
        with plain_linear():
            return functional_call(self.module, {**constants, **parameters}, args=(), kwargs=dict(inputs))

    def __call__(self, flat: torch.Tensor, **inputs: Any) -> Any:
        """Forward pass from this rank's flat shards; differentiable in any order with respect to `flat`. Collective."""
        return self.call(self.gather(flat), inputs)


@contextmanager
def plain_linear() -> Iterator[None]:
    """torch's own `linear` for the time of a forward pass.

    DeepSpeed ZeRO-3 replaces `torch.nn.functional.linear` for the whole process by a version without forward mode.
    """
    present = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = present


def get_rng_state(device: torch.device) -> torch.Tensor:
    """State of the generator that dropout draws from on `device`, as bytes."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def attention_refused() -> Iterator[None]:
    """Names the setting where transformers has no such attention kernel for a model. Local.

    Raises:
        LmcError: It has not.
    """
    try:
        yield
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        why = str(error).split(". ")[0].split(" yet.")[0]
        raise LmcError(f"{why}: choose another kernel, --model.attn_implementation eager") from None


def build_skeleton(
    config: Any, device: torch.device | str = "cpu", attn_implementation: str | None = "sdpa"
) -> nn.Module:
    """A causal language model from its Hugging Face config: float32 parameters on meta, buffers real, in eval mode.

    Args:
        config: Of the model.
        device: Of the buffers.
        attn_implementation: Attention kernel; None leaves it to transformers, which knows what the model has.

    Raises:
        LmcError: The model has no such kernel.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with attention_refused(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    model.tie_weights()
    model.config.use_cache = False
    move_buffers(model, torch.device(device))
    return model.eval()


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Puts a module's buffers on a device. Local."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.device != device:
                setattr(part, name, buffer.to(device))
