"""Gather once, work on the own micro-batches, reduce once: what all products of the engine share.

A product of a batch that is split over ranks is the sum of the ranks' products, so θ and the vectors are gathered
once, each rank works through however many micro-batches it has (none is fine: no collective is inside that loop)
and one reduce-scatter adds the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.shards.gather import reduce_scatter
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector

MicroProduct = Callable[[torch.Tensor, list[torch.Tensor], MicroBatch], torch.Tensor]


def accumulate(
    module: ShardedModule,
    theta: ShardedVector,
    vectors: Sequence[ShardedVector],
    micro_batches: Sequence[MicroBatch],
    product: MicroProduct,
) -> ShardedVector:
    """Σ over ranks and micro-batches of `product(θ, vectors, micro)`, all gathered (W, L). Collective."""
    device = module.device  # vectors may lie in host memory, the work is done where the model is
    full = module.gather(theta.flat.detach().to(device)).requires_grad_()
    full_vectors = [module.gather(vector.flat.detach().to(device)) for vector in vectors]
    total = torch.zeros_like(full, requires_grad=False)
    for micro in micro_batches:
        with module.randomness(micro.rng_state):
            total += product(full, full_vectors, micro)
    return theta.like(reduce_scatter(total, module.layout.group).to(theta.flat.device))


def weighted_gradient(
    module: ShardedModule, loss: Loss, theta: ShardedVector, micro_batches: Sequence[MicroBatch]
) -> ShardedVector:
    """∇ Σ_i weights_i ℓ_i(θ) over the micro-batches of all ranks; sharded like θ. Collective."""

    def product(full: torch.Tensor, _: list[torch.Tensor], micro: MicroBatch) -> torch.Tensor:
        value = loss.value(loss.outputs(module.call(full, micro.inputs)), micro)
        return torch.autograd.grad(value, full)[0]

    return accumulate(module, theta, [], micro_batches, product)


@torch.no_grad()
def summed_loss(
    module: ShardedModule, loss: Loss, theta: ShardedVector, micro_batches: Sequence[MicroBatch]
) -> tuple[float, int]:
    """(Σ_i ℓ_i, number of targets) over the micro-batches of all ranks, weights left out. Collective."""
    full = module.gather(theta.flat.detach().to(module.device))
    sums = torch.zeros(2, dtype=torch.float64, device=full.device)
    for micro in micro_batches:
        with module.randomness(micro.rng_state):
            values, counts = loss.sample_values(loss.outputs(module.call(full, micro.inputs)), micro)
        sums += torch.stack([values.double().sum(), counts.double().sum()])
    if module.layout.world_size > 1:
        torch.distributed.all_reduce(sums, group=module.layout.group)
    return float(sums[0]), int(sums[1])
