"""Global-norm clipping as torch and DeepSpeed do it, and its tangent, which couples all shards by one scalar.

c = 1 / max((‖g‖ + 1e-6) / max_norm, 1)          the step is taken with c·g
"""

from __future__ import annotations

import torch
from torch.func import jvp

from lmc_dist.update_rules.rules import safe_sqrt


def coefficient(square: torch.Tensor, max_norm: float) -> torch.Tensor:
    """c as a function of ‖g‖² (a scalar in float64)."""
    return 1.0 / torch.clamp((safe_sqrt(square) + 1e-6) / max_norm, min=1.0)


def coefficient_at(square: float, max_norm: float) -> float:
    """c at ‖g‖²; 1 without clipping (`max_norm` 0)."""
    return float(coefficient(torch.tensor(square, dtype=torch.float64), max_norm)) if max_norm else 1.0


def coefficient_tangent(square: float, product: float, max_norm: float) -> float:
    """dc along dg, from ‖g‖² and ⟨g, dg⟩; 0 where nothing is clipped."""
    at, along = (torch.tensor(x, dtype=torch.float64) for x in (square, 2 * product))
    return float(jvp(lambda s: coefficient(s, max_norm), (at,), (along,))[1])
