"""FLOPs and traffic of gradients and products (docs/scaling.md), from how the passes over blocks are made.

P: trained weights that a token is multiplied with, F: frozen ones. A multiplication takes 2 FLOPs a weight and token; its
tangent has two terms (one where the weight is frozen), its reverse pass two (one). With m vectors the primal is shared.
Attention counts as 2·T·heads·head_dim trained weights a block: its two products have two moving factors as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmc_dist.planner.facts import ModelFacts


@dataclass(frozen=True)
class Work:
    """Of a rank.

    Attributes:
        flops: For each token.
        gathered: Elements of whole vectors that are gathered, a product.
        reduced: Elements that are reduce-scattered.
    """

    flops: float
    gathered: float
    reduced: float


def training_work(model: ModelFacts, length: int) -> Work:
    """A step of training under ZeRO-3: graphs kept, parameters gathered forward and back."""
    p, f = _weights(model, length)
    whole = model.numel + model.frozen_numel
    return Work(6 * p + 4 * f, 2 * whole, model.numel)


def gradient_work(model: ModelFacts, length: int) -> Work:
    """A gradient of the module on shards: every block's forward runs twice."""
    p, f = _weights(model, length)
    return Work(8 * p + 6 * f, _gathers(model, 0, 0), model.numel)


def product_work(model: ModelFacts, mode: str, num_vectors: int, length: int) -> Work:
    """m products C v: `GGN` or `exact` with blocks recomputed; `fd` and `secant` from gradients."""
    m, (p, f) = num_vectors, _weights(model, length)
    if mode in ("fd", "secant"):
        count = m * (2 if mode == "fd" else 1)
        one = gradient_work(model, length)
        return Work(count * one.flops, count * one.gathered, count * one.reduced)
    primal, tangent = 2 * (p + f), 4 * p + 2 * f
    forward = primal + m * tangent
    if mode == "GGN":
        return Work(forward + primal + m * (4 * p + 2 * f), _gathers(model, m, 0), m * model.numel)
    back = primal + m * (tangent + 4 * p)  # cotangents, their tangents (two terms), and those of the weights' gradients
    return Work(2 * forward + back, _gathers(model, m, m), m * model.numel)


def _weights(model: ModelFacts, length: int) -> tuple[float, float]:
    attention = 2.0 * length * model.heads * model.head_dim * model.blocks
    return model.matmul + attention, model.frozen_matmul


def _gathers(model: ModelFacts, forward: int, back: int) -> float:
    """θ and `forward` tangents of everything, then θ and `back` tangents of the blocks; constants with each θ."""
    inside, frozen_inside = model.numel - model.outer_numel, model.frozen_numel - model.frozen_outer_numel
    first = (1 + forward) * model.numel + model.frozen_numel
    return first + (1 + back) * inside + frozen_inside
