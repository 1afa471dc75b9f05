"""The shape of the noise: Σ = σ² S. What counts for privacy is ‖S^{-1/2} r‖ of the residual r, with this S and no
other.

Isotropic, S = I, or shaped by a subspace: with orthonormal rows Q of shape (r, p)

    S^{1/2} = o (I − QᵀQ) + Qᵀ diag(d) Q
    ‖S^{-1/2} r‖² = Σ_j (q_jᵀ r)² / d_j² + (‖r‖² − Σ_j (q_jᵀ r)²) / o²

Little noise outside the subspace, o small, is paid for by whatever part of the residual lies there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lmc_dist.errors import LmcError
from lmc_dist.privacy.noise import add_normal_
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector, gram

# Rows that are stored in float32 are as orthonormal as that: σ is made larger by what this may hide of a residual.
SLACK = 1e-6


class Shape(Protocol):
    """S of Σ = σ² S."""

    @property
    def least(self) -> float:
        """The smallest eigenvalue of S^{1/2}: ‖S^{-1/2} r‖ ≤ ‖r‖ / least, however r lies."""

    def distance(self, residual: ShardedVector) -> float:
        """‖S^{-1/2} r‖. Collective."""

    def noisy(self, theta: ShardedVector, key: bytes, sigma: float) -> ShardedVector:
        """θ + σ S^{1/2} z, z standard normal by `key` (`noise`); θ stays. Collective."""

    def describe(self) -> dict[str, Any]:
        """For result.json."""


class Isotropic:
    """S = I."""

    least = 1.0

    def distance(self, residual: ShardedVector) -> float:
        return residual.norm()

    def noisy(self, theta: ShardedVector, key: bytes, sigma: float) -> ShardedVector:
        """Local here; the same bits at every world size."""
        return add_normal_(theta.clone(), key, sigma)

    def describe(self) -> dict[str, Any]:
        return {"kind": "isotropic"}


class Subspace:
    """S^{1/2} = o (I − QᵀQ) + Qᵀ diag(d) Q. All ranks construct it together.

    A rank holds its shards of Q, and while it makes noise one more vector.

    Args:
        basis: (r, L) this rank's shards of linearly independent rows, orthonormal or nearly so; padding zero.
        layout: Their layout.
        inside: d, one number > 0 a row.
        outside: o > 0.

    Raises:
        LmcError: Numbers that are not positive, or rows that are far from orthonormal. On every rank.
    """

    def __init__(self, basis: torch.Tensor, layout: ShardLayout, inside: Sequence[float], outside: float) -> None:
        if len(inside) != len(basis) or not all(0 < d < math.inf for d in [*inside, outside]):
            raise LmcError(
                "noise shaped by a subspace needs a standard deviation > 0 for each direction and for the rest"
            )
        overlap = gram(basis, basis, layout)
        off = float((overlap - torch.eye(len(basis), dtype=torch.float64)).abs().max())
        if not off < 1e-2:
            raise LmcError(
                f"the directions of the noise are not orthonormal: scalar products are off by up to {off:.2g}"
            )
        # Sums of several ranks differ in their last bits by the number of ranks. Kept in float32 they are the same.
        lower = torch.linalg.cholesky(overlap)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(basis), dtype=torch.float64), upper=False)
        self.basis = inverse.float().to(basis) @ basis
        self.layout = layout
        self.inside = torch.tensor(list(inside), dtype=torch.float64)
        self.outside = float(outside)

    @property
    def least(self) -> float:
        return min(float(self.inside.min()), self.outside)

    def _coefficients(self, vector: ShardedVector) -> torch.Tensor:
        """Q x, (r,) in float64. Collective."""
        return gram(self.basis, vector.flat[None], self.layout)[:, 0]

    def distance(self, residual: ShardedVector) -> float:
        inside = self._coefficients(residual).square()
        outside = max(residual.dot(residual) - float(inside.sum()), 0.0)
        return math.sqrt(float((inside / self.inside.square()).sum()) + outside / self.outside**2)

    def noisy(self, theta: ShardedVector, key: bytes, sigma: float) -> ShardedVector:
        """σ (o z + Qᵀ diag(d − o) Q z); one all-reduce of r numbers."""
        z = add_normal_(theta.like(torch.zeros_like(theta.flat)), key, 1.0)
        weights = ((self.inside - self.outside) * self._coefficients(z)).float()
        z.scale_(self.outside).add_(z.like(weights.to(self.basis) @ self.basis))
        return z.scale_(sigma).add_(theta)

    def describe(self) -> dict[str, Any]:
        inside = self.inside.tolist()
        return {"kind": "subspace", "rank": len(inside), "inside": inside, "outside": self.outside}
