"""Whether an engine, a model and data are those of a logged run: a step is taken as training took it, and compared.

A counterfactual run has nothing to be compared with. Where the steps before the first change are repeated, their checksums
certify it; where there are none, or where another number of ranks rounds otherwise, this does.
"""

from __future__ import annotations

import math

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.engines import EngineShards
from lmc_dist.trajectory.record import StepRecord

# How far the norm of a step's gradient may be from the logged one: float32 sums in another order are off by 1e-6 of it, in
# 16 bits by some of its roundings. A regulariser, noise or other data change it by more (docs/engines.md).
PRECISE, COARSE = 1e-3, 5e-2


def check_norm(shards: EngineShards, record: StepRecord, norm: float | None) -> None:
    """Compares the norm of a step's gradient, before clipping, with the logged one. Collective.

    Raises:
        LmcError: It is another one.
    """
    is_coarse = torch.float32 not in (shards.dtype,) or shards.autocast is not None
    allowed = COARSE if is_coarse else PRECISE
    logged = record.grad_norm
    with agreement(shards.layout.group):
        if norm is None or logged is None or not math.isfinite(logged):
            return
        if not abs(norm - logged) <= allowed * logged:
            raise LmcError(not_training(record.step, f"its gradient has norm {norm:.6g}, the logged one {logged:.6g}"))


def not_training(step: int, found: str) -> str:
    """What to say of a step that this engine, model and data do not take as training did."""
    return (
        f"step {step}, taken as training took it, comes out otherwise ({found}): the loss, the model or the data is not "
        "training's. A loss that is more than the model's own (a regulariser, label smoothing, noise on embeddings, a "
        "loss function of one's own), inputs beside tokens and mask, or weights changed outside the optimizer are not in the "
        "log, and no correction knows of them; `lmc log doctor` tells whether it is the data"
    )
