"""C ≈ Q Λ Qᵀ: the largest eigenpairs of another curvature, kept and used in its place.

A product is two thin matrix products on this rank's shards and one all-reduce of r·m numbers, whatever the model and the
data. What the basis misses is measured when it is built. With plain SGD a span of steps is closed form (`propagate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmc_dist.curvature.diagonal import rademacher
from lmc_dist.curvature.ggn import Product
from lmc_dist.curvature.spectrum import lanczos
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector, gram


@dataclass(frozen=True)
class LowRank:
    """Q Λ Qᵀ, sharded.

    Attributes:
        basis: (r, L) this rank's shards of the eigenvectors.
        values: r eigenvalues, descending by magnitude.
        residuals: ‖C q − λ q‖ of each pair.
        missed: ‖(C − QΛQᵀ) z‖ / ‖C z‖ for a random z: what is left out, 0 to 1.
        products: Products of C that it took.
        layout: Of the vectors.
    """

    basis: torch.Tensor
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    missed: float
    products: int
    layout: ShardLayout

    def __call__(self, vectors: Sequence[ShardedVector]) -> list[ShardedVector]:
        """[v_1 … v_m] ↦ [QΛQᵀ v_1 …]. Collective: one all-reduce."""
        return self._combine(vectors, self._values[:, None] * self._coefficients(vectors))

    def propagate(
        self, v: ShardedVector, lrs: Sequence[float], damping: float = 0.0, weight_decay: float = 0.0
    ) -> ShardedVector:
        """v after SGD steps of these learning rates without sources, in closed form. Collective.

        Π_s (I − η_s (QΛQᵀ + (λ + w) I)) v: eigenvectors are scaled by Π_s (1 − η_s (λ_i + λ + w)), all else by
        Π_s (1 − η_s (λ + w)).
        """
        rates = torch.tensor(list(lrs), dtype=torch.float64)
        shift = damping + weight_decay
        rest = float((1 - rates * shift).prod())
        factors = (1 - rates[:, None] * (self._values + shift)).prod(0)
        inside = self._combine([v], (factors - rest)[:, None] * self._coefficients([v]))[0]
        return (v * rest).add_(inside)

    @property
    def _values(self) -> torch.Tensor:
        return torch.tensor(self.values, dtype=torch.float64)

    def _coefficients(self, vectors: Sequence[ShardedVector]) -> torch.Tensor:
        """(r, m) in float64: Qᵀ v."""
        return gram(self.basis, torch.stack([v.flat for v in vectors]), self.layout)

    def _combine(self, like: Sequence[ShardedVector], coefficients: torch.Tensor) -> list[ShardedVector]:
        rows = coefficients.T.to(self.basis) @ self.basis
        return [v.like(row.to(v.flat)) for v, row in zip(like, rows, strict=True)]


def low_rank(product: Product, like: ShardedVector, rank: int, products: int | None = None, seed: int = 0) -> LowRank:
    """The `rank` eigenpairs of largest magnitude of a symmetric C. Collective.

    Args:
        product: The map [v_1 … v_m] ↦ [C v_1 … C v_m].
        like: A vector of the right layout, dtype and device.
        rank: r; all of C when r is the number of parameters.
        products: Lanczos products; None is 2r + 8. One more measures what is missed.
        seed: Of the start.
    """
    found = lanczos(product, like, rank, products or 2 * rank + 8, seed)
    part = LowRank(found.basis, tuple(found.values), tuple(found.residuals), 0.0, found.products + 1, found.layout)
    z = rademacher(like, (seed << 16) + (1 << 14))
    (image,) = product([z])
    size = image.norm()
    missed = (image - part([z])[0]).norm() / size if size > 0 else 0.0
    return LowRank(part.basis, part.values, part.residuals, missed, part.products, part.layout)
