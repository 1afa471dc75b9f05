"""How long this machine takes for the parts of a correction: one logged step, timed under the present ranks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.planner.facts import LogFacts, busiest
from lmc_dist.planner.free_memory import free_memory
from lmc_dist.planner.machine import Measured
from lmc_dist.planner.work import gradient_work, product_work, training_work
from lmc_dist.runtime import broadcast_object
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.shards.vector import dots
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import edit_step
from lmc_dist.trajectory.repeat import run_step
from lmc_dist.trajectory.replay import replay_engine
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.path import TrainingPath
from lmc_dist.unlearn.source import micro_batches

MANY = 8  # vectors of the second product that is timed
ENGINE_LIMIT = 50_000_000  # parameters of a model for which building the engine takes seconds at most
_ALL = 22.0  # gradients that all timed products take together, once


def calibrate(
    log: TrajectoryLog,
    facts: LogFacts,
    module: ShardedModule,
    batches: BatchSource,
    first: int,
    model: Callable[[], torch.nn.Module | Unloaded] | None = None,
    seconds: float = 10.0,
) -> Measured:
    """Times a step near `first`: following it, its gradient, products of 1 and 8 vectors, and the engine's step. Collective.

    Args:
        log: The log, whose steps can be followed or at least replayed.
        facts: Of it.
        module: The model on shards.
        batches: Samples by id.
        first: First step that holds forgotten data.
        model: Makes the model that the engine is built around; None, or a large model, takes the engine's step from the
            log or from the gradient.
        seconds: To stay within, roughly; where a step is larger, products are timed on part of its samples.
    """
    notes = []
    start = log.nearest_anchor(first)
    path = TrainingPath(log, module, TokenCrossEntropy(), batches)
    began = time.perf_counter()
    path.seek(start)
    snapshot_seconds = _agreed(time.perf_counter() - began)
    steps = [s for s in range(start, log.num_steps) if log.record(s).applied][:4]
    edited = edit_step(log.record(steps[0]), None, log.manifest.loss_normalization, batches.num_targets)
    micros = micro_batches(edited, batches, module, "kept")
    theta, loss, ranks = path.theta, TokenCrossEntropy(), log.layout.world_size
    whole = busiest(facts.passes[steps[0]], ranks)

    gradient = timed(lambda: weighted_gradient(module, loss, theta, micros), seconds / 8)
    part = min(1.0, seconds / max(_ALL * gradient, 1e-9))
    if part < 1:
        micros = [_cut(micro, part) for micro in micros]
        notes.append(f"products were timed on {part:.0%} of a step's samples")
        gradient_of_part = timed(lambda: weighted_gradient(module, loss, theta, micros), 0.0)
    else:
        gradient_of_part = gradient
    direction = theta * 1e-3
    times: dict[str, tuple[float, float]] = {}
    for mode in ("GGN", "exact"):
        config = HVPConfig(mode)
        one = timed(lambda: hvp_apply(direction, config, module, loss, theta, micros), seconds / 8)  # noqa: B023
        if mode == "GGN" and 7 * one < seconds / 2:
            many = [direction] * MANY
            together = timed(lambda: hvp_apply(many, config, module, loss, theta, micros), seconds / 8)  # noqa: B023
            further = (together - one) / (MANY - 1)
        else:
            further = one * _further(facts, mode)
        scale = gradient / gradient_of_part
        times[mode] = one * scale, further * scale

    follow, tangent, bandwidth = 0.0, 0.0, None
    if facts.no_sweep is None:
        followed = []
        for step in steps:
            began = time.perf_counter()
            here, update = path.step(step)
            followed.append(_agreed(time.perf_counter() - began))
        follow = statistics.median(followed) - (gradient if facts.computes_path else 0.0)
        along = path.rule.no_deviation(update)
        along.v.add_(update)

        def move() -> None:
            (moved,) = path.rule.tangents(here, [(along, update)])
            dots([(x, x) for x in moved.vectors()])

        tangent = timed(move, seconds / 20)
        began = time.perf_counter()
        log.update(steps[0])
        bandwidth = facts.step_bytes / max(_agreed(time.perf_counter() - began), 1e-9) if facts.step_bytes else None

    step_seconds, start_seconds, note = _engine(log, facts, batches, steps[0], model, gradient)
    return Measured(
        ranks,
        whole,
        gradient,
        times,
        step_seconds,
        whole,
        start_seconds,
        max(follow, 0.0),
        tangent,
        snapshot_seconds,
        bandwidth,
        *free_memory(module.device),
        (f"timed on step {steps[0]}: {whole} tokens on the busiest of {ranks} ranks", note, *notes),
    )


def _further(facts: LogFacts, mode: str) -> float:
    """One more vector against the first, by FLOPs."""
    length = max((p.length for passes in facts.passes for p in passes), default=1)
    one, many = (product_work(facts.model, mode, m, length).flops for m in (1, MANY))
    return (many - one) / (MANY - 1) / one


def _engine(
    log: TrajectoryLog,
    facts: LogFacts,
    batches: BatchSource,
    step: int,
    model: Callable[[], torch.nn.Module | Unloaded] | None,
    gradient: float,
) -> tuple[float, float, str]:
    """(seconds of a step of the engine that trained, seconds of building it, where that is from). Collective."""
    if facts.no_replay is None and model is not None and facts.model.numel <= ENGINE_LIMIT:
        edited = edit_step(log.record(step), None, log.manifest.loss_normalization, batches.num_targets)
        began = time.perf_counter()
        engine = replay_engine(model(), log)
        shards = engine_shards(engine)
        run_step(shards, edited, batches, log.manifest)
        start = _agreed(time.perf_counter() - began)
        again = timed(lambda: run_step(shards, edited, batches, log.manifest), 1.0)
        engine.destroy()
        return again, start, f"the engine's step was timed on {facts.engine}"
    logged = broadcast_object(_training_seconds(log))
    if logged is not None:
        return logged, 0.0, "the engine's step is training's own, from train.json (with the log's share)"
    length = max(p.length for p in facts.passes[step])
    ratio = training_work(facts.model, length).flops / gradient_work(facts.model, length).flops
    return gradient * ratio, 0.0, "the engine's step was not timed: a gradient whose blocks are not recomputed"


def _training_seconds(log: TrajectoryLog) -> float | None:
    """Seconds of a training step, where training left them and ran on as many ranks."""
    try:
        summary = json.loads((log.path / "train.json").read_text())
        if summary["world_size"] == log.layout.world_size:
            return float(summary["seconds"]) / max(int(summary["steps"]), 1)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def timed(call: Callable[[], Any], budget: float) -> float:
    """Median seconds of a few calls after one to warm up; of that one alone where it uses up the budget. Collective."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        times.append(_agreed(time.perf_counter() - began))
        if sum(times) > budget:
            break
    return statistics.median(times[1:] or times)


def _agreed(seconds: float) -> float:
    """Rank 0's, so that all ranks do the same. Collective."""
    return broadcast_object(seconds)


def _cut(micro: MicroBatch, part: float) -> MicroBatch:
    samples = len(micro.targets)
    rows = slice(0, max(1, round(samples * part)))
    inputs = {key: x[rows] if x.dim() and len(x) == samples else x for key, x in micro.inputs.items()}
    return replace(micro, inputs=inputs, targets=micro.targets[rows], weights=micro.weights[rows])
