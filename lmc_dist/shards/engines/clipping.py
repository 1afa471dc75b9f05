"""Gradient clipping as a training loop does it by torch: seen where it happens, since it happens before the step.

`clip_grad_norm_` of torch, which accelerate and the Hugging Face Trainer call as well, scales the gradients through a
function that it looks up in its module; that function is replaced while steps are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad


def watch_clipping(seen: Callable[[list[torch.Tensor], float, torch.Tensor], None]) -> Callable[[], None]:
    """Calls `seen(parameters, max_norm, total_norm)` before gradients are scaled by their norm; returns what ends it."""
    original = clip_grad._clip_grads_with_norm_
    watching = True

    def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        listed: Sequence[torch.Tensor] = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if watching:
            seen(list(listed), float(max_norm), total_norm)
        original(listed, max_norm, total_norm, *args, **kwargs)  # type: ignore[arg-type]

    def undo() -> None:
        nonlocal watching
        watching = False  # where another watch lies above this one, it stays in the chain
        if clip_grad._clip_grads_with_norm_ is clip:
            clip_grad._clip_grads_with_norm_ = original

    clip_grad._clip_grads_with_norm_ = clip
    return undo
