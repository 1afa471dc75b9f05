"""The batch-gradient Fisher ĝĝᵀ: the curvature of the published algorithm. No model call and no data.

ĝ is the mean gradient of the whole batch, so this is a matrix of rank one, and not the Fisher information: its product
was measured at a cosine of 0.02 to the Gauss-Newton product of the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmc_dist.curvature.ggn import Product
from lmc_dist.shards.vector import ShardedVector, dots


def make_fisher_product(gradient: ShardedVector) -> Product:
    """[v_1 … v_m] ↦ [ĝ (ĝᵀv_1) …]; one all-reduce for all m. Collective."""

    def product(vectors: Sequence[ShardedVector]) -> list[ShardedVector]:
        return [gradient * coefficient for coefficient in dots([(gradient, v) for v in vectors])]

    return product
