"""First-order products of a sharded model: weighted gradients and summed losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmc_dist.curvature.engine import ProductEngine
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector


def weighted_gradient(
    module: ShardedModule,
    loss: Loss,
    theta: ShardedVector,
    micro_batches: Sequence[MicroBatch],
    keep: bool = False,
) -> ShardedVector:
    """∇ Σ_i weights_i ℓ_i(θ) over the micro-batches of all ranks; sharded like θ. Collective.

    `keep` holds the forward graphs and the gathered parameters instead of recomputing each block.
    """
    return ProductEngine(module, loss, theta, micro_batches, keep).run([], second_order=False)[0]


@torch.no_grad()
def summed_loss(
    module: ShardedModule, loss: Loss, theta: ShardedVector, micro_batches: Sequence[MicroBatch]
) -> tuple[float, int]:
    """(Σ_i ℓ_i, number of targets) over the micro-batches of all ranks, weights left out. Collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)
    for values, counts in ProductEngine(module, loss, theta, micro_batches).sample_values():
        sums += torch.stack([values.double().sum(), counts.double().sum()])
    if module.layout.world_size > 1:
        torch.distributed.all_reduce(sums, group=module.group)
    return float(sums[0]), int(sums[1])
