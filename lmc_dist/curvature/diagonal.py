"""The diagonal of a curvature, estimated by Hutchinson's probes (Bekas, Kokiopoulou & Saad 2007), as a curvature itself.

    d = E[z ∘ (C z)],  z uniform in {−1, 1}^p

The estimate is unbiased; its error falls with the square root of the number of probes, and its standard error is
reported with it. A sign depends on its element's number alone, so that each rank draws its own and the estimate does not
depend on the world size.
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


_CHUNK = 1 << 16  # elements whose 64-bit numbers stay in a CPU's cache
# SplitMix64 (Steele, Lea & Flood 2014), as signed numbers, which torch multiplies modulo 2^64
_STEP, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def rademacher(like: ShardedVector, seed: int) -> ShardedVector:
    """A vector of random signs, the same at every world size. Local; each rank draws its own elements alone."""
    vector = like.like(torch.zeros_like(like.flat))
    for index, slot in enumerate(like.layout):
        shard = vector[slot.spec.name]
        key = _mixed(torch.tensor([(seed << 20) + index])) ^ index
        for start in range(slot.start, slot.end, _CHUNK):
            stop = min(start + _CHUNK, slot.end)
            bits = _mixed(torch.arange(start, stop) + key)
            shard[start - slot.start : stop - slot.start].copy_(torch.where(bits < 0, -1.0, 1.0))
    return vector


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """64 bits that look random for each number, of which the first are the best. Pure."""
    z = numbers * _STEP
    for shift, factor in zip((30, 27), _MIX, strict=True):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor  # the mask makes the shift one of unsigned numbers
    return z


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
