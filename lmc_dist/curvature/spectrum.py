"""Eigenvalues of a sharded symmetric curvature by Lanczos iteration with full reorthogonalisation.

What K, damping and learning rate can be judged by: the recursion is unstable where η·λ_max > 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmc_dist.curvature.diagonal import rademacher
from lmc_dist.curvature.ggn import Product
from lmc_dist.shards.vector import ShardedVector, dots


@dataclass(frozen=True)
class Spectrum:
    """The largest eigenvalues in magnitude.

    Attributes:
        values: Ritz values, descending by magnitude.
        residuals: ‖C q − λ q‖ of each pair: an eigenvalue of C lies within that distance of the value.
        vectors: Ritz vectors, sharded.
        steps: Products used.
    """

    values: list[float]
    residuals: list[float]
    vectors: list[ShardedVector]
    steps: int


def lanczos(product: Product, like: ShardedVector, count: int, steps: int, seed: int = 0) -> Spectrum:
    """The `count` eigenpairs of largest magnitude from `steps` products (Saad 2011, ch. 6). Collective.

    Every rank holds its shards of all basis vectors: memory is `steps` sharded vectors. Stops early when the Krylov
    space is exhausted.
    """
    steps = min(steps, like.layout.total_numel)
    q = rademacher(like, seed)
    q.scale_(1 / q.norm())
    basis: list[ShardedVector] = []
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(steps):
        basis.append(q)
        w = product([q])[0]
        alphas.append(q.dot(w))
        for _ in range(2):  # twice is enough (Parlett)
            for b, coefficient in zip(basis, dots([(b, w) for b in basis]), strict=True):
                w.add_(b, alpha=-coefficient)
        beta = w.norm()
        betas.append(beta)
        if beta <= 1e-12 * max(map(abs, alphas)):
            break
        q = w.scale_(1 / beta)
    k = len(basis)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: k - 1], dtype=torch.float64)
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, coefficients = torch.linalg.eigh(tridiagonal)
    order = values.abs().argsort(descending=True)[:count].tolist()
    vectors = []
    for j in order:
        ritz = like.like(torch.zeros_like(like.flat))
        for i, b in enumerate(basis):
            ritz.add_(b, alpha=float(coefficients[i, j]))
        vectors.append(ritz)
    residuals = [abs(betas[-1] * float(coefficients[k - 1, j])) for j in order]
    return Spectrum([float(values[j]) for j in order], residuals, vectors, k)
