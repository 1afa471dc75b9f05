"""A model whose weights come one parameter at a time, when an engine takes it: no rank ever holds all of them.

How each engine takes them is in `engines.loading`, where they come from is said by `Weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Weights = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Unloaded:
    """A model without its weights.

    Attributes:
        module: Parameters on the meta device, of the types they are to have; buffers real, tied parameters one.
        weights: A parameter's value by its first name, of any floating-point type. All ranks call it for the same names in
            the same order, so that it may be collective.
    """

    module: nn.Module
    weights: Weights


def zeros(skeleton: nn.Module) -> Weights:
    """Weights for a model that is written to before it is used. Local."""
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}  # the skeleton's own do not stay
    return lambda name: torch.zeros(shapes[name])


def trained_later(skeleton: nn.Module, frozen: Weights) -> Weights:
    """Those of a model whose trainable weights are written before it is used: zeros, and frozen ones as they are. Local."""
    empty, trained = zeros(skeleton), {name for name, p in skeleton.named_parameters() if p.requires_grad}
    return lambda name: empty(name) if name in trained else frozen(name)
