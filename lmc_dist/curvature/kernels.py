"""Kernels that can be differentiated as often as a product needs, in place of the fused ones, inside the product only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

DIFFERENTIABLE_ATTENTION = ("eager", "sdpa")
_told: set[str] = set()


def _silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x · sigmoid(x): `aten::silu_backward` has no forward-mode rule, the product of the two has."""
    return input * torch.sigmoid(input)


@contextmanager
def differentiable_kernels(module: nn.Module, second_order: bool = False) -> Iterator[None]:
    """Attention by the math kernel; with `second_order` also a silu whose derivative has a forward mode.

    Fused attention (flash, memory-efficient, also on CPU) has neither forward mode nor a second derivative
    (pytorch#116350, pytorch#128971). A model configured for another implementation runs scaled-dot-product attention
    inside the block; that is said once in the log.
    """
    config = getattr(module, "config", None)
    configured = getattr(config, "_attn_implementation", None)
    swap = configured is not None and configured not in DIFFERENTIABLE_ATTENTION
    tell(configured)
    silu = nn.functional.silu
    if swap:
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    if second_order:
        nn.functional.silu = _silu
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        nn.functional.silu = silu
        if swap:
            config._attn_implementation = configured  # type: ignore[union-attr]


def tell(configured: str | None) -> None:
    """Says once for each configured kernel what stands in for it."""
    if configured in (None, "eager") or configured in _told:
        return
    _told.add(str(configured))
    logger.info("inside curvature products attention runs by the math kernel instead of %s", configured)
