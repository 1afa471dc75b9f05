"""The diagonal of a curvature, estimated by Hutchinson's probes (Bekas, Kokiopoulou & Saad 2007), as a curvature itself.

    d = E[z ∘ (C z)],  z uniform in {−1, 1}^p

The estimate is unbiased; its error falls with the square root of the number of probes, and its standard error is
reported with it. Probes are drawn for the whole vector and sliced, so the estimate does not depend on the world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmc_dist.curvature.ggn import Product
from lmc_dist.errors import LmcError
from lmc_dist.shards.vector import ShardedVector


@dataclass(frozen=True)
class DiagonalEstimate:
    """d and how sure it is.

    Attributes:
        diagonal: Estimate of diag C, sharded.
        standard_error: Of each element of it, from the spread of the probes; zeros for a single probe.
        probes: Their number; 0 is exact.
    """

    diagonal: ShardedVector
    standard_error: ShardedVector
    probes: int


def rademacher(like: ShardedVector, seed: int) -> ShardedVector:
    """A vector of random signs, the same at every world size. Local; each parameter is drawn on its own."""
    vector = like.like(torch.zeros_like(like.flat))
    for index, slot in enumerate(like.layout):
        generator = torch.Generator().manual_seed((seed << 20) + index)
        signs = torch.randint(0, 2, (slot.spec.numel,), generator=generator, dtype=torch.int8)
        vector[slot.spec.name].copy_(signs[slot.start : slot.end].to(like.flat) * 2 - 1)
    return vector


def estimate_diagonal(
    product: Product, like: ShardedVector, probes: int, seed: int = 0, block: int = 8
) -> DiagonalEstimate:
    """diag C from `probes` products, `block` of them at once. Collective.

    Args:
        product: The map [v_1 … v_m] ↦ [C v_1 … C v_m].
        like: A vector of the right layout, dtype and device.
        probes: Number of products, at least 1.
        seed: Of the signs.
        block: Vectors a product call gets.
    """
    total, squares = torch.zeros_like(like.flat), torch.zeros_like(like.flat)
    for start in range(0, probes, block):
        signs = [rademacher(like, (seed << 16) + i) for i in range(start, min(start + block, probes))]
        for z, cz in zip(signs, product(signs), strict=True):
            sample = z.flat * cz.flat
            total += sample
            squares += sample.square()
    mean = total / probes
    variance = (squares / probes - mean.square()).clamp(min=0) * (probes / max(probes - 1, 1))
    return DiagonalEstimate(like.like(mean), like.like((variance / probes).sqrt()), probes)


EXACT_LIMIT = 1 << 14  # parameters: the exact diagonal takes a product for each


def exact_diagonal(product: Product, like: ShardedVector, block: int = 32) -> DiagonalEstimate:
    """diag C from one product a parameter: for small models and tests. Collective.

    Raises:
        LmcError: More than `EXACT_LIMIT` parameters.
    """
    layout = like.layout
    if layout.total_numel > EXACT_LIMIT:
        raise LmcError(
            f"the exact diagonal of {layout.total_numel:,} parameters needs as many products, more than the limit of "
            f"{EXACT_LIMIT:,}: estimate it with probes ≥ 1"
        )
    diagonal = torch.zeros_like(like.flat)
    places: list[int | None] = []  # of each parameter's elements in this rank's flat buffer; None on other ranks
    for slot in layout:
        inside = range(slot.start, slot.end)
        places += [slot.offset + i - slot.start if i in inside else None for i in range(slot.spec.numel)]
    for start in range(0, len(places), block):
        chosen = places[start : start + block]
        units = []
        for place in chosen:
            unit = torch.zeros_like(like.flat)
            if place is not None:
                unit[place] = 1
            units.append(like.like(unit))
        for place, image in zip(chosen, product(units), strict=True):
            if place is not None:
                diagonal[place] = image.flat[place]
    return DiagonalEstimate(like.like(diagonal), like.like(torch.zeros_like(diagonal)), 0)


def make_diagonal_product(estimate: DiagonalEstimate) -> Product:
    """[v_1 … v_m] ↦ [d ∘ v_1 …]. Local."""

    def product(vectors: Sequence[ShardedVector]) -> list[ShardedVector]:
        return [v.like(estimate.diagonal.flat * v.flat) for v in vectors]

    return product
