"""The optimizer of a live engine, set to where the counterfactual run's would be: σ̂ = σ + dσ."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector, dots
from lmc_dist.trajectory.snapshots import vector_checksums
from lmc_dist.update_rules import SECOND_MOMENTS

logger = logging.getLogger(__name__)


def correct_state(shards: EngineShards, deviation: Mapping[str, ShardedVector], behind: int, step: int) -> None:
    """σ ← σ + dσ in a live engine, its counter `behind` steps less. Collective.

    An optimizer that has not trained (a fresh one, all of whose state is zero) is left as it is: it has nothing to be
    corrected. A second moment that would not stay positive, where the linearisation cannot hold, keeps its actual value.

    Args:
        shards: The engine, at θ_τ and σ_τ.
        deviation: dσ by kind, over the same ranks.
        behind: Steps that the counterfactual run skipped.
        step: The counter of σ_τ.

    Raises:
        LmcError: The optimizer is at another step, keeps other state, or does not hold afterwards what was written.
    """
    vectors, scalars = shards.read_state()
    present = [key for key in deviation if key in vectors]
    if not present or not any(dots([(vectors[key], vectors[key]) for key in present])):
        logger.info("the engine's optimizer has not trained: the correction changes its weights alone")
        return
    with agreement(shards.layout.group):
        if missing := [key for key in deviation if key not in vectors]:
            raise LmcError(
                f"the engine's optimizer keeps no '{missing[0]}', which the correction has: another optimizer"
            )
        if "step" in scalars and int(scalars["step"]) != step:
            raise LmcError(
                f"the engine's optimizer has taken {int(scalars['step'])} steps, the logged one {step}: load the optimizer "
                "state of the end of training, or pass correction.v to correct the weights alone"
            )
    for key, change in deviation.items():
        vector = vectors[key]
        moved = vector + relayout(change, vector.layout).to(vector.flat.dtype)
        if key in SECOND_MOMENTS:
            beyond = (moved.flat <= 0) & (vector.flat > 0)
            moved.flat = torch.where(beyond, vector.flat, moved.flat)
            _report(key, beyond, moved)
        vectors[key] = moved
    if "step" in scalars:
        scalars = {**scalars, "step": scalars["step"] - behind}
    shards.write_state(vectors, scalars)
    written, _ = shards.read_state()
    if vector_checksums(written) != vector_checksums(vectors):
        raise LmcError("the engine's optimizer does not hold the written state")


def _report(key: str, beyond: torch.Tensor, moved: ShardedVector) -> None:
    count = beyond.sum(dtype=torch.int64).cpu()
    if moved.layout.world_size > 1:
        dist.all_reduce(count, group=moved.layout.group)
    if int(count):
        logger.warning(
            "%d of %d elements of %s keep their actual value: corrected, they would not be positive",
            int(count),
            moved.layout.total_numel,
            key,
        )
