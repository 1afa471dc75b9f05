"""Where a correction starts: b_s = ∇L_s(θ_s; w'_s) − ∇L_s(θ_s; w_s) (docs/method.md §3)."""

from __future__ import annotations

from typing import Literal

import torch

from lmc_dist.curvature import Loss, MicroBatch
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import EditedStep


def micro_batches(
    edited: EditedStep, batches: BatchSource, module: ShardedModule, weights: Literal["kept", "source"]
) -> list[MicroBatch]:
    """This rank's passes of a step, weighted as the counterfactual (`kept`) or as the source. Local.

    Passes are dealt out in the logged order, so at the logged world size each rank gets its own. Samples of weight
    zero are left out, except where dropout needs the whole pass to draw the logged masks.
    """
    layout = module.layout
    built = []
    for micro in edited.micro_batches[layout.rank :: layout.world_size]:
        coefficients = micro.weights if weights == "kept" else micro.source_weights
        ids = micro.record.sample_ids
        state = micro.record.random_state
        if state is None:
            chosen = [i for i, c in enumerate(coefficients) if c != 0.0]
            ids, coefficients = tuple(ids[i] for i in chosen), [coefficients[i] for i in chosen]
        if not ids or not any(coefficients):
            continue
        inputs, targets = batches.inputs(ids)
        built.append(
            MicroBatch(
                inputs,
                targets,
                torch.tensor(coefficients, dtype=torch.float64, device=targets.device),
                None if state is None else torch.frombuffer(bytearray(state), dtype=torch.uint8),
            )
        )
    return built


def source(
    edited: EditedStep, theta: ShardedVector, batches: BatchSource, module: ShardedModule, loss: Loss
) -> ShardedVector:
    """b_s at θ_s: one gradient with the weights w'_i/D' − w_i/D. Collective."""
    return weighted_gradient(module, loss, theta, micro_batches(edited, batches, module, "source"))


def share(edited: EditedStep, weights: Literal["kept", "source"]) -> float:
    """Fraction of the step's samples that a product with these weights works on: its cost in gradients."""
    chosen = [
        c != 0.0 or (m.record.random_state is not None)
        for m in edited.micro_batches
        for c in (m.weights if weights == "kept" else m.source_weights)
    ]
    return sum(chosen) / max(len(chosen), 1)
