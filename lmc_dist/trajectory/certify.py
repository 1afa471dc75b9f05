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
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import edit_step
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.repeat import can_be_exact, check_reproduced, run_step, stand_at, warm_up
from lmc_dist.trajectory.store import TrajectoryLog

# How far the norm of a step's gradient may be from the logged one: float32 sums in another order are off by 1e-6 of it, in
# 16 bits by some of its roundings. A regulariser, noise or other data change it by more (docs/method.md §5).
PRECISE, COARSE = 1e-3, 5e-2


def check_norm(shards: EngineShards, record: StepRecord, norm: float | None) -> None:
    """Compares the norm of a step's gradient, before clipping, with the logged one. Collective.

    Raises:
        LmcError: It is another one.
    """
    is_coarse = shards.dtype in (torch.bfloat16, torch.float16) or shards.autocast is not None
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


def begin(shards: EngineShards, log: TrajectoryLog, batches: BatchSource, start: int, is_silent: bool) -> int:
    """Stands an engine at a snapshot to repeat what follows; gradients that took. Collective.

    Args:
        shards: Of the engine.
        log: The logged run.
        batches: Samples by id.
        start: The snapshot.
        is_silent: Whether no step that follows is repeated as it was, whose checksum would tell that this is another run.

    Raises:
        LmcError: Engine, model or data are not training's.
    """
    stand_at(shards, log, start)
    if 0 < start < log.num_steps:
        warm_up(shards, log, batches, start)
    if start == log.num_steps or (start == 0 and shards.first_differs):
        return 0
    if not is_silent and can_be_exact(shards, log.manifest.segment(start)):
        return 0
    taken = certify(shards, log, batches, start)
    stand_at(shards, log, start)
    return int(taken)


def certify(shards: EngineShards, log: TrajectoryLog, batches: BatchSource, start: int) -> bool:
    """Takes the first step from a snapshot on as training took it, and compares; whether there was one. Collective.

    The engine stands at the snapshot, and behind the step afterwards.

    Raises:
        LmcError: The step comes out otherwise: engine, model or data are not training's.
    """
    record = next((log.record(step) for step in range(start, log.num_steps) if log.record(step).applied), None)
    if record is None or any(start < step <= record.step for step in log.edits):
        return False
    edited = edit_step(record, None, log.manifest.loss_normalization, batches.num_targets)
    is_exact = can_be_exact(shards, log.manifest.segment(record.step))
    undo = (lambda: None) if is_exact else shards.watch(lambda: None, lambda: None, False)  # which tells the norm
    try:
        run_step(shards, edited, batches, log.manifest)
    finally:
        undo()
    if is_exact:
        check_reproduced(shards, record)
    else:
        check_norm(shards, record, shards.grad_norm)
    return True
