"""Eigenpairs of a sharded symmetric curvature by block Lanczos iteration with full reorthogonalisation, and its trace.

What K, damping and learning rate can be judged by: the recursion is unstable where η·λ_max > 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmc_dist.curvature.diagonal import rademacher
from lmc_dist.curvature.ggn import Product
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector, gram

# Directions of a block below this fraction of its largest are rounding: nothing is left of the curvature there.
NULL = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Spectrum:
    """The eigenpairs of largest magnitude.

    Attributes:
        values: Ritz values, descending by magnitude.
        residuals: ‖C q − λ q‖ of each pair: an eigenvalue of C lies within that distance of the value.
        basis: (count, L) this rank's shards of the Ritz vectors, orthonormal.
        layout: Their layout.
        products: Products used.
    """

    values: list[float]
    residuals: list[float]
    basis: torch.Tensor
    layout: ShardLayout
    products: int

    @property
    def vectors(self) -> list[ShardedVector]:
        """The Ritz vectors."""
        return [ShardedVector(self.layout, row) for row in self.basis]


def lanczos(product: Product, like: ShardedVector, count: int, steps: int, seed: int = 0, block: int = 8) -> Spectrum:
    """The `count` eigenpairs of largest magnitude from about `steps` products (Golub & Underwood 1977). Collective.

    Blocks serve two ends: one product call shares its gathers and its primal pass among them, and eigenvalues that come
    in clusters are found. Every rank holds its shards of all basis vectors: memory is `steps` sharded vectors. Ends early
    when the Krylov space is exhausted; exact when that is the whole space.

    Args:
        product: The map [v_1 … v_m] ↦ [C v_1 … C v_m].
        like: A vector of the right layout, dtype and device.
        count: Eigenpairs wanted; fewer are returned where C has a smaller Krylov space.
        steps: Products, at least; rounded up to whole blocks, at most as many as there are parameters.
        seed: Of the start, which is the same at every world size.
        block: Vectors a product call gets.
    """
    layout, total = like.layout, like.layout.total_numel
    steps = min(max(steps, count), total)
    block = min(block, steps)
    start = torch.stack([rademacher(like, (seed << 16) + i).flat for i in range(block)])
    fresh, _ = orthonormal(start, layout)
    basis = fresh
    blocks: list[torch.Tensor] = []  # columns of T = Qᵀ C Q, from the top to the diagonal block
    while True:
        images = torch.stack([image.flat for image in product([like.like(row) for row in fresh])])
        column = torch.zeros(len(basis), len(fresh), dtype=torch.float64)
        for _ in range(2):  # twice is enough (Parlett 1998, §6.9)
            overlap = gram(basis, images, layout)
            images -= overlap.T.to(basis) @ basis
            column += overlap
        blocks.append(column)
        fresh, remainder = orthonormal(images, layout, scale=float(max(b.abs().max() for b in blocks)))
        fresh = fresh[: total - len(basis)]
        if len(basis) >= steps or not len(fresh):
            break
        fresh = reorthogonal(fresh, basis, layout)
        basis = torch.cat([basis, fresh])
    tridiagonal = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    done = 0
    for column in blocks:
        rows, width = column.shape
        tridiagonal[:rows, done : done + width] = column
        tridiagonal[done : done + width, :rows] = column.T
        done += width
    last = blocks[-1].shape[1]
    tridiagonal[-last:, -last:] = (blocks[-1][-last:] + blocks[-1][-last:].T) / 2
    values, coefficients = torch.linalg.eigh(tridiagonal)
    order = values.abs().argsort(descending=True)[:count]
    tails = coefficients[-last:, order]
    residuals = (tails * (remainder @ tails)).sum(0).clamp(min=0).sqrt()
    ritz = coefficients[:, order].T.to(basis) @ basis
    return Spectrum(values[order].tolist(), residuals.tolist(), ritz, layout, len(basis))


def orthonormal(
    vectors: torch.Tensor, layout: ShardLayout, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the span of some sharded vectors, and their Gram matrix. Collective.

    By eigenvectors of the Gram matrix, twice: squaring loses half the digits, the second pass brings them back. What is
    below rounding is dropped, relative to the largest vector or to `scale`, the size of what the vectors remained from.

    Returns:
        ((k, L) with k ≤ m, (m, m) float64).
    """
    inner = gram(vectors, vectors, layout)
    result, products = vectors, inner
    for attempt in range(2):
        values, directions = torch.linalg.eigh(products)
        floor = NULL[vectors.dtype] * max(float(values[-1]) ** 0.5 if values[-1] > 0 else 0.0, scale or 0.0)
        kept = values > max(floor, 1e-300) ** 2 if attempt == 0 else values > 0.5
        turn = directions[:, kept].flip(1) / values[kept].flip(0).sqrt()
        result = turn.T.to(vectors) @ result
        if not len(result):
            break
        products = gram(result, result, layout)
    return result, inner


def reorthogonal(fresh: torch.Tensor, basis: torch.Tensor, layout: ShardLayout) -> torch.Tensor:
    """New directions made orthogonal to the basis once more, after their normalisation blew up what was left. Collective."""
    fresh = fresh - gram(basis, fresh, layout).T.to(basis) @ basis
    return orthonormal(fresh, layout)[0]


@dataclass(frozen=True)
class TraceEstimate:
    """tr C and how sure it is: the mean of `probes` products zᵀ C z (Hutchinson 1990) and its standard error."""

    value: float
    standard_error: float
    probes: int


def estimate_trace(product: Product, like: ShardedVector, probes: int, seed: int = 0, block: int = 8) -> TraceEstimate:
    """The trace of C, without bias. Collective; memory of 2 · `block` sharded vectors."""
    samples: list[float] = []
    for start in range(0, probes, block):
        signs = [rademacher(like, (seed << 16) + (1 << 15) + i) for i in range(start, min(start + block, probes))]
        images = product(signs)
        z, cz = torch.stack([x.flat for x in signs]), torch.stack([x.flat for x in images])
        samples += gram(z, cz, like.layout).diagonal().tolist()
    spread = torch.tensor(samples, dtype=torch.float64)
    error = float(spread.std() / len(samples) ** 0.5) if probes > 1 else 0.0
    return TraceEstimate(float(spread.mean()), error, probes)
