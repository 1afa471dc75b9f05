"""Generalised Gauss-Newton products: Jᵀ H_ℓ J v (Schraudolph 2002; Martens 2020, "New insights and perspectives on
the natural gradient method").

Dual numbers carry Jv forward beside the primal; at the outputs H_ℓ J v becomes the cotangent of one ordinary reverse
pass. For the losses of language models H_ℓ is known in closed form, so no second derivative is ever taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmc_dist.curvature.engine import ProductEngine
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector

Product = Callable[[Sequence[ShardedVector]], list[ShardedVector]]


def make_ggn_product(
    module: ShardedModule,
    loss: Loss,
    theta: ShardedVector,
    micro_batches: Sequence[MicroBatch],
    keep: bool = False,
) -> Product:
    """[v_1 … v_m] ↦ [G v_1 … G v_m], G = Σ_i weights_i J_iᵀ H_i J_i at θ: symmetric, and PSD for weights ≥ 0.

    The m vectors share the gathers of θ and the primal pass. All ranks must call the returned function together, each
    with its own micro-batches.
    """
    engine = ProductEngine(module, loss, theta, micro_batches, keep)
    return lambda vectors: engine.run(vectors, second_order=False)
