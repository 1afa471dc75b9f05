"""Exact Hessian products ∇²L v, forward over reverse (Pearlmutter 1994), block by block.

The vector-Jacobian product of each block is differentiated along (v, tangent of its input, tangent of its cotangent), so
no graph of a graph is built and memory stays that of one block. Indefinite in general.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmc_dist.curvature.engine import ProductEngine
from lmc_dist.curvature.ggn import Product
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector


def make_hessian_product(
    module: ShardedModule,
    loss: Loss,
    theta: ShardedVector,
    micro_batches: Sequence[MicroBatch],
    keep: bool = False,
) -> Product:
    """[v_1 … v_m] ↦ [H v_1 … H v_m], H = ∇² Σ_i weights_i ℓ_i at θ. Collective, as `make_ggn_product`."""
    engine = ProductEngine(module, loss, theta, micro_batches, keep)
    return lambda vectors: engine.run(vectors, second_order=True)
