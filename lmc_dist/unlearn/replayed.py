"""The correction by exact replay: the difference of two ends of the run, weights and optimizer state."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import first_touched
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.replay_marks import ReplayMarks
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.correction import Correction


def replayed_correction(
    log: TrajectoryLog,
    model: torch.nn.Module | Unloaded,
    batches: BatchSource,
    request: Counterfactual,
    theta: ShardedVector,
    progress: Callable[[int], None] = lambda step: None,
    work: Path | None = None,
    mark_every: int | None = None,
) -> tuple[Correction, dict[str, Any]]:
    """v and dσ by repeating the run without the data, and how far the replay was certified. Collective.

    Args:
        log: The logged run.
        model: The logged architecture, whole on every rank or without its weights; trainable weights are overwritten.
        batches: Samples by id.
        request: What to leave out; it touches the log.
        theta: θ_τ.
        progress: Called with each step done.
        work: Where marks are left, of this log and request alone; what an earlier run left there is used.
        mark_every: Steps between two marks; None leaves none.

    Raises:
        LmcError: As `replay` and `replay_engine`.
        Stopped: With marks, where a stop was asked for.
    """
    started = time.perf_counter()
    engine = replay_engine(model, log)
    marks = None
    if work is not None and mark_every is not None:
        marks = ReplayMarks(work, engine_shards(engine), mark_every)
    result = replay(engine, log, batches, request, progress, marks)
    vectors, scalars = engine_shards(engine).read_state()
    engine.destroy()
    # A log that was cut off has θ_τ by its updates, but not the optimizer's state there.
    actual, counters = log.snapshot(log.num_steps) if log.num_steps in log.snapshots else ({}, {})
    state = {key: relayout(vector, log.layout) - actual[key] for key, vector in vectors.items() if key in actual}
    end = int(counters.get("step", 0))
    theta_hat = result.theta.to(device=theta.flat.device)
    v = theta_hat - theta
    first = first_touched(request, log.records())
    assert first is not None
    audit = AuditRecord(
        unit="joint",
        tz=first,
        tau=log.num_steps,
        K_used=log.num_steps - 1 - first,
        v_norm=v.norm(),
        v0_norm=0.0,
        hvp_calls=0,
        mode="replay",
        damping=0.0,
        counterfactual=request.kind,
        replay_head="all",
        stopped_by="end",
        seconds=time.perf_counter() - started,
        growth_max=None,
    )
    behind = end - int(scalars.get("step", end)) if "step" in counters else 0
    correction = Correction(v, (audit,), float(result.steps), theta_hat, state, behind, end)
    return correction, {"verified_steps": result.verified, "bit_exact_world_size": result.exact}
