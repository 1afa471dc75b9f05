"""Generalised Gauss-Newton products: Jᵀ H_ℓ J v (Schraudolph 2002; Martens 2020, "New insights and perspectives on
the natural gradient method").

One forward pass with dual numbers gives the outputs and their tangent Jv; the reverse pass of the same graph, started
with H_ℓ J v, gives the product. Sharing the primal makes it cost about 1.8 gradients instead of the 2.4 of the double
reverse pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.curvature.products import accumulate
from lmc_dist.shards.gather import unpack
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector


def make_ggn_product(
    module: ShardedModule, loss: Loss, theta: ShardedVector, micro_batches: Sequence[MicroBatch]
) -> Callable[[ShardedVector], ShardedVector]:
    """v ↦ Σ_i weights_i J_iᵀ H_i J_i v at θ, sharded like θ; the map is symmetric and, for weights ≥ 0, PSD.

    All ranks must call the returned function together, each with its own micro-batches.
    """

    def micro_product(full: torch.Tensor, vectors: list[torch.Tensor], micro: MicroBatch) -> torch.Tensor:
        parameters, tangents = unpack(full, module.layout), unpack(vectors[0], module.layout)
        # Fused attention has no forward mode (pytorch#116350), so the math kernel serves inside the product.
        with fwAD.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {name: fwAD.make_dual(p, tangents[name]) for name, p in parameters.items()}
            outputs, tangent = fwAD.unpack_dual(loss.outputs(module.call_with(duals, micro.inputs)))
        if tangent is None:
            return torch.zeros_like(full)
        cotangent = loss.hessian_product(outputs.detach(), tangent.detach(), micro)
        return torch.autograd.grad(outputs, full, cotangent)[0]

    def product(v: ShardedVector) -> ShardedVector:
        return accumulate(module, theta, [v], micro_batches, micro_product)

    return product
