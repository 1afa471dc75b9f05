"""Distance to retraining, and losses on forgotten and retained samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmc_dist.curvature import Loss, MicroBatch, TokenCrossEntropy
from lmc_dist.curvature.products import summed_loss
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource


def relative_error(theta_hat: ShardedVector, theta: ShardedVector, reference: ShardedVector) -> float:
    """‖θ̂ − θ_retrain‖ / ‖θ − θ_retrain‖ (docs/method.md §7): 0 is retraining, 1 is doing nothing. Collective.

    Raises:
        LmcError: The reference equals θ: forgetting changed nothing, so there is nothing to measure.
    """
    distance = (theta - reference).norm()
    if distance == 0:
        raise LmcError("the reference equals the trained model: rel_error is undefined")
    return (theta_hat - reference).norm() / distance


def mean_loss(
    module: ShardedModule,
    theta: ShardedVector,
    ids: Sequence[int],
    batches: BatchSource,
    batch_size: int = 16,
    loss: Loss | None = None,
) -> float:
    """Mean loss a target token over the samples `ids`, dealt out over the ranks, without dropout. Collective."""
    layout = module.layout
    mine = list(ids)[layout.rank :: layout.world_size]
    micros = []
    for i in range(0, len(mine), batch_size):
        inputs, targets = batches.inputs(mine[i : i + batch_size])
        micros.append(MicroBatch(inputs, targets, torch.ones(len(targets), device=targets.device)))
    total, count = summed_loss(module, loss or TokenCrossEntropy(), theta, micros)
    return total / max(count, 1)
