"""The reference: a separate training run of the counterfactual, in processes of its own or done before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.training_apart import train_apart
from lmc_dist.trajectory.counterfactual import edit_step
from lmc_dist.trajectory.files import read_json
from lmc_dist.trajectory.rewritten import rewritings
from lmc_dist.trajectory.store import TrajectoryLog

if TYPE_CHECKING:
    from lmc_dist.unlearn.asked import AskedRun

COMPUTED = ("none", "retrain", "replay")  # what `reference` may say; anything else is the folder of a retrain's log


def check_reference(run: AskedRun) -> None:
    """Checks that the configured reference can be had. Local.

    Raises:
        LmcError: The log is none that can be retrained here, or the folder holds no log of a retrain for the request.
    """
    name = run.config.reference
    if name == "retrain":
        check_retrain(run)
    elif name not in COMPUTED:
        check_retrained(run, TrajectoryLog(name))


def check_retrain(run: AskedRun) -> None:
    """Checks that the log is of a run that the training command can repeat. Local."""
    log, world_size = run.log, run.runtime.world_size
    if "config" not in log.manifest.run:
        raise LmcError("reference 'retrain' repeats a run of launch/train.py, and this log is not of one: use 'replay'")
    if run.config.data.source == "log":
        raise LmcError(
            "reference 'retrain' reads the data anew, and data.source 'log' has none: give the data, or use 'replay'"
        )
    if rewritings(log.manifest):
        raise LmcError(
            "the log was rewritten without the data of earlier requests, which a retrain would take up again: use --reference "
            "replay, or the log of a retrain without all of it"
        )
    replicas = log.manifest.run["config"]["train"].get("replicas", 1)
    if world_size % replicas:
        raise LmcError(
            f"the log was trained with train.replicas={replicas}, which a retrain on {world_size} ranks cannot have: start a "
            f"multiple of {replicas}, or use --reference replay"
        )
    draws = any(m.random_state is not None for record in log.records() for m in record.micro_batches)
    sizes = [segment.world_size for segment in log.manifest.all_segments]
    if draws and sizes != [world_size] * len(sizes):
        ranks = ", then ".join(map(str, sizes))
        raise LmcError(
            f"the log was trained with dropout on {ranks} ranks: a retrain on {world_size} ranks would draw other "
            "random numbers; start as many ranks, or use --reference replay"
        )


def check_retrained(run: AskedRun, log: TrajectoryLog) -> None:
    """Checks that a log is that of the run without the forgotten data, step by step. Local.

    Raises:
        LmcError: It is of another model, another length, or saw other samples.
    """
    if log.layout.params != run.log.layout.params:
        raise LmcError(f"reference {log.path} is of another model: its parameters are not those of {run.log.path}")
    if log.num_steps != run.log.num_steps:
        raise LmcError(f"reference {log.path} has {log.num_steps} steps, log {run.log.path} {run.log.num_steps}")
    normalization = run.log.manifest.loss_normalization
    for record, other in zip(run.log.records(), log.records(), strict=True):
        edited = edit_step(record, run.request, normalization, run.batches.num_targets)
        passes = [] if edited.skipped or not record.applied else edited.micro_batches
        kept = sorted(i for p in passes for i, keep in zip(p.record.sample_ids, p.kept, strict=True) if keep)
        seen = other if other.applied else None
        found = sorted(seen.sample_ids) if seen else []
        divided = max((p.denominator for p in passes), default=0.0)
        if kept != found or (seen and record.applied and seen.denominator != divided):
            raise LmcError(
                f"reference {log.path} is not the retrain of this request: at step {record.step} it saw other samples, or "
                "counted them otherwise; `lmc train` with the same forget options makes one"
            )


def reference_of(
    run: AskedRun, folder: Path, replayed: Callable[[], tuple[ShardedVector, float]]
) -> tuple[ShardedVector | None, float | None]:
    """(θ_retrain, its seconds) as configured, None where it is not known. Collective.

    Args:
        run: The run, whose reference `check_reference` has passed.
        folder: For a retraining, where it is to be done here.
        replayed: Makes the reference by exact replay, or has it.
    """
    name = run.config.reference
    if name == "none":
        return None, None
    if name == "retrain":
        return retrain(run, folder)
    return replayed() if name == "replay" else retrained(run)


def retrained(run: AskedRun) -> tuple[ShardedVector, float | None]:
    """(θ_retrain, seconds where the run left them) of the retrain's log that `reference` names. Collective.

    Raises:
        LmcError: It did not start from the weights the log started from.
    """
    with agreement():
        log = TrajectoryLog(run.config.reference)
        summary = log.path / "train.json"
        seconds = float(read_json(summary)["seconds"]) if summary.exists() else None
    check_start(run, log)
    return log.theta(log.num_steps), seconds


def check_start(run: AskedRun, log: TrajectoryLog) -> None:
    """Checks that a reference started where the log did, as far as both know. Collective.

    Raises:
        LmcError: It did not.
    """
    if run.log.first_step == 0 and log.first_step == 0 and (run.log.theta(0) - log.theta(0)).norm() != 0:
        raise LmcError("the reference did not start from the logged initial weights: is model.path still the same?")


def retrain(run: AskedRun, folder: Path) -> tuple[ShardedVector, float]:
    """(θ_retrain at this rank's layout, seconds) from the training command with the forgotten data masked. Collective.

    Every rank starts the training process of the same rank, so the launcher of this run serves both, on any number of
    nodes. Nothing of replay's code is involved: the two can check each other.

    Raises:
        LmcError: Training failed, or did not start from the weights the log started from.
    """
    config = reference_config(run, folder / "log")
    started = time.perf_counter()
    train_apart(config, folder, run.runtime, "the reference training")
    seconds = time.perf_counter() - started
    with agreement():
        log = TrajectoryLog(folder / "log")
    check_start(run, log)
    return log.theta(log.num_steps), seconds


def reference_config(run: AskedRun, log_dir: Path) -> dict[str, Any]:
    """The logged run's own training settings, with the request added and nothing but the end kept."""
    logged = run.log.manifest.run["config"]
    present = asdict(run.config)
    return {
        "data": present["data"],
        "model": present["model"],
        "train": logged["train"],
        "log": {"storage": "replay", "save_interval": None, "max_steps": None},
        "forget": present["forget"] | {"counterfactual": run.request.kind},
        "log_dir": str(log_dir),
    }
