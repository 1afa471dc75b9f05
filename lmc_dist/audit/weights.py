"""Whether the model of a run is the end of the log plus the correction that is stored beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from lmc_dist.audit.files import CORRECTION, MODEL
from lmc_dist.errors import LmcError, first_line
from lmc_dist.runtime import agreement
from lmc_dist.shards.checkpoint import read_checkpoint
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import load_correction


def weights_problems(log: TrajectoryLog, output: Path, is_replay: bool) -> tuple[str, ...]:
    """What differs between model/ and θ_τ + v, element by element. Collective.

    A replay stores the weights that it reached, and v is their rounded difference; every other method stores θ_τ + v to the
    bit, rounded to the model's types. An adapter has other names in its file and is left to its digest.

    Args:
        log: The run's.
        output: Of the run.
        is_replay: How it was found.

    Raises:
        LmcError: On every rank: files that cannot be read.
    """
    if (output / MODEL / "adapter_model.safetensors").exists():
        return ()
    theta = log.theta(log.num_steps)
    with agreement(log.layout.group):
        try:
            zeros = ShardedVector.zeros(log.layout, torch.promote_types(log.dtype, torch.float32))
            v = load_correction(output / CORRECTION, log.layout, zeros)
            found = read_checkpoint(output / MODEL, ShardedVector.zeros(log.layout))
        except (OSError, KeyError, SafetensorError) as error:
            raise LmcError(f"model or correction in {output} cannot be read: {first_line(error)}") from None
        expected, stored = theta + v, {row["name"]: row["dtype"] for row in log.manifest.parameters}
        eps = torch.finfo(torch.float32).eps
        for name, shard in expected.items():
            dtype = getattr(torch, stored[name])
            shard.copy_(shard.to(dtype))
            eps = max(eps, torch.finfo(dtype).eps)
    size, off = theta.norm(), (expected.to(torch.float32) - found).norm()
    if off <= (eps if is_replay else torch.finfo(torch.float32).eps) * size:
        return ()
    return (f"model/ is not the end of the log plus correction/: they are {off:.3g} apart, ‖v‖ is {v.norm():.3g}",)
