"""Run logged steps again on the engine that trained, with or without some samples.

At the logged world size the same samples meet the same random numbers in the same passes, and the result is that of
training to the bit; at another one passes are dealt out anew and only rounding differs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.engines.build import build_engine, engine_here
from lmc_dist.shards.engines.driven import NUMERIC
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.certify import begin
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step
from lmc_dist.trajectory.edits import LogEdit, first_touched, with_open_edits
from lmc_dist.trajectory.reader import FLOATS
from lmc_dist.trajectory.record import Segment, TrajectoryManifest
from lmc_dist.trajectory.repeat import can_be_exact, check_reproduced, run_step, stand_at, warm_up
from lmc_dist.trajectory.replay_marks import Reached, ReplayMarks
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.update_rules.settings import DEEPSPEED_ADAM


@dataclass(frozen=True)
class ReplayResult:
    """Where replay ended.

    Attributes:
        theta: θ after the last step, laid out like the log.
        steps: Gradients computed.
        verified: Steps whose checksum equalled the logged one (those before the first change).
        exact: Whether this engine and world size can be bit-exact, which takes that they ran all steps that were
            repeated; otherwise expect a relative difference up to 1e-5 (in float32), and only steps before the first
            other one are verified.
    """

    theta: ShardedVector
    steps: int
    verified: int
    exact: bool


def replay(
    engine: Any,
    log: TrajectoryLog,
    batches: BatchSource,
    counterfactual: Counterfactual | None = None,
    progress: Callable[[int], None] = lambda step: None,
    marks: ReplayMarks | None = None,
) -> ReplayResult:
    """Repeats the run from the last snapshot before the first changed step, without the forgotten data. Collective.

    Args:
        engine: An engine of the logged model with the same optimizer (`replay_engine`); its state is overwritten.
        log: The logged run.
        batches: Samples by id.
        counterfactual: What to leave out, and with it what earlier corrections of the run took out that it reaches past; None
            repeats the whole run as it was, its corrections included.
        progress: Called with each step done.
        marks: Of the same engine, where it keeps its state from time to time, to go on from after an interruption.

    Raises:
        LmcError: Snapshot missing, or, on the logged engine and world size, a step that does not reproduce its checksum.
        Stopped: With `marks`, where a stop was asked for.
    """
    shards = engine_shards(engine)
    first = 0
    passed: dict[int, LogEdit] = {}
    if counterfactual is not None:
        counterfactual, passed, first = first_change(log, counterfactual)
    start = replay_start(log, first)
    at = marks.load() if marks is not None else None
    if at is None:
        at = Reached(start, begin(shards, log, batches, start, counterfactual is not None and start >= first))
        if marks is not None:
            marks.newest = start
    elif 0 < at.step < log.num_steps:
        warm_up(shards, log, batches, at.step)
    steps, verified = at.steps, at.verified
    # Until a step was run in another way than this engine runs it, by the one that left the mark too.
    exact = at.exact and all(can_be_exact(shards, log.manifest.segment(step)) for step in range(start, at.step))
    for step in range(at.step, log.num_steps):
        record = log.record(step)
        exact = exact and can_be_exact(shards, log.manifest.segment(step))
        edited = edit_step(record, counterfactual, log.manifest.loss_normalization, batches.num_targets)
        if record.applied and not edited.skipped:
            run_step(shards, edited, batches, log.manifest)
            steps += 1
        if step < first or counterfactual is None:
            if exact:
                check_reproduced(shards, record)
            verified += exact
        if step + 1 in log.edits and step + 1 not in passed:  # a correction that stays
            stand_at(shards, log, step + 1)
        progress(step)
        if marks is not None:
            marks.leave(Reached(step + 1, steps, verified, exact), log.num_steps)
    return ReplayResult(relayout(shards.read(), log.layout), steps, verified, exact)


def first_change(log: TrajectoryLog, counterfactual: Counterfactual) -> tuple[Counterfactual, dict[int, LogEdit], int]:
    """(what is left out, earlier corrections that it reaches past, first step that changes; else their number). Local.

    A step that was not applied changes nothing, so corrections after it stay where no other step comes before them.
    """
    request, passed = with_open_edits(counterfactual, log.edits, log.records())
    first = first_touched(request, log.records())
    return request, passed, log.num_steps if first is None else first


def replay_start(log: TrajectoryLog, first: int) -> int:
    """The snapshot that a replay whose first changed step is `first` goes from. Local.

    Raises:
        LmcError: What it needs fell out of the ring.
    """
    log.require(first, updates=False)
    start = log.nearest_snapshot(first)
    if start == first and start > log.first_step and start not in log.edits:
        start = log.nearest_snapshot(start - 1)  # some unchanged steps, whose checksums certify the rest
    return start


def logged_optimizer(model: torch.nn.Module, manifest: TrajectoryManifest) -> torch.optim.Optimizer:
    """The optimizer of the logged run: its class, its groups, its hyper-parameters.

    Raises:
        LmcError: Neither an optimizer of torch nor one of DeepSpeed's Adams.
    """
    name, whole = manifest.optimizer["class"], {}
    kind: Any = getattr(torch.optim, name, None)
    if name in DEEPSPEED_ADAM:
        import deepspeed.ops.adam

        kind = getattr(deepspeed.ops.adam, name)
        whole = {DEEPSPEED_ADAM[name]: manifest.optimizer.get("adam_w_mode", True)}
    elif not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise LmcError(
            f"the log was trained with {name}, which is not torch's: build the engine and pass it to replay()"
        )
    accepted = set(inspect.signature(kind).parameters)
    named = dict(model.named_parameters())
    groups = []
    for i, settings in enumerate(manifest.optimizer["groups"]):
        members = [named[row["name"]] for row in manifest.parameters if row["group"] == i]
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in accepted}
        groups.append({"params": members, **values})
    return kind(groups, **whole)


def check_ranks(log: TrajectoryLog) -> None:
    """Checks that the engine that trained can be of the present ranks at all. Local.

    Raises:
        LmcError: It was one process, whose model nothing shares.
    """
    ranks = log.layout.world_size
    if ranks > 1 and log.manifest.segment(log.num_steps - 1).engine == "single":
        raise LmcError(
            f"log {log.path} was trained by one process and here are {ranks} ranks: replay it in one, or use replay_head auto "
            "or a number of steps, which need no engine"
        )


def replay_engine(model: torch.nn.Module | Unloaded, log: TrajectoryLog, settings: dict[str, Any] | None = None) -> Any:
    """An engine of the kind that trained, which repeats the logged run; `destroy()` ends it. Collective.

    Args:
        model: The logged architecture, with or without its weights: trainable ones are overwritten by replay, frozen ones
            must be those of the run.
        log: The logged run.
        settings: Settings of the engine in place of the logged ones (`EngineShards.settings`, DeepSpeed's configuration).

    Returns:
        A DeepSpeed engine, or the `EngineShards` of another one.

    Raises:
        LmcError: The logged engine cannot be made here: build one and pass it to `replay`.
    """
    check_ranks(log)
    manifest = log.manifest
    segment = manifest.segment(log.num_steps - 1)  # a replay goes to the end
    logged = logged_settings(segment) if settings is None else settings
    if segment.engine.startswith("deepspeed"):
        logged = deepspeed_settings(logged, segment.engine, manifest.max_grad_norm)
    name = engine_here(segment.engine)
    engine = build_engine(name, model, lambda module: logged_optimizer(module, manifest), logged)
    shards = engine_shards(engine)
    shards.declare_clipping(manifest.max_grad_norm)
    autocast = segment.run.get("autocast")
    if autocast is not None and autocast not in FLOATS:
        raise LmcError(f"the log computed under autocast {str(autocast)[:40]}, which is no type of torch")
    shards.autocast = None if autocast is None else FLOATS[autocast]
    return engine


def logged_settings(segment: Segment) -> dict[str, Any]:
    """The settings of a segment's engine that a log may decide: those of numbers, none that name files. Local.

    Raises:
        LmcError: A value is none that an engine leaves.
    """
    is_deepspeed = segment.engine.startswith("deepspeed")
    logged = segment.run.get("deepspeed" if is_deepspeed else "engine", {})
    if not isinstance(logged, dict):
        raise LmcError("the log's engine settings are no object")
    if is_deepspeed:
        logged = {key: logged[key] for key in NUMERIC if key in logged}
        if "nvme" in json.dumps(logged):
            raise LmcError("the log was trained with parts on NVMe: pass settings with a path of this machine")
        return logged
    for key in ("param_dtype", "reduce_dtype"):
        if logged.get(key) is not None and logged[key] not in FLOATS:
            raise LmcError(f"the log's engine setting {key} is {str(logged[key])[:40]}, which is no type of torch")
    return logged


def deepspeed_settings(logged: dict[str, Any], engine: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for a replay: the logged one, passes bounded and scaled one by one."""
    stage = int(engine[-1])
    base: dict[str, Any] = {"zero_optimization": {"stage": stage}, "steps_per_print": 1 << 30} | logged
    if (given := base["zero_optimization"].get("stage", 0)) != stage:
        raise LmcError(f"the log was trained under {engine}, the settings are of stage {given}")
    for key in ("train_batch_size", "optimizer", "scheduler"):
        base.pop(key, None)
    return base | {
        "train_micro_batch_size_per_gpu": 1,  # neither number is used
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
