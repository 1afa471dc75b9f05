"""A baseline: the request of an unlearning run, answered by fine-tuning; judged and left in the same form."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lmc_dist.baselines.objective import Objective, Plan, objective_of
from lmc_dist.baselines.start import Start, read_start
from lmc_dist.baselines.tuning import Tuned, Tuning
from lmc_dist.config import Config, TrainConfig
from lmc_dist.console import StepProgress
from lmc_dist.errors import LmcError
from lmc_dist.logged_run import starting_model
from lmc_dist.runtime import AgreedError, Runtime, agreement, promoted, remove_folder
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.tracking import Tracker, audit_summary
from lmc_dist.training import build_engine, check_train_config, engine_name
from lmc_dist.trajectory.logger import package_versions
from lmc_dist.unlearn.asked import AskedRun
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.correction import Correction
from lmc_dist.unlearn.reference import reference_of
from lmc_dist.unlearn.results import write_results


class BaselineRun(AskedRun):
    """Everything that a baseline needs, opened and checked; all ranks construct it together.

    Attributes:
        objective: What is minimised.
        train: Settings of the training loop.
        plan: Which samples each step sees.
    """

    objective: Objective
    train: TrainConfig
    plan: Plan

    def check_settings(self) -> None:
        config = self.config
        self.train = train_settings(config)
        check_baseline_config(config, self.runtime.world_size)
        check_train_config(replace(config, train=self.train), "baseline")
        self.objective = objective_of(config.baseline)

    def check_log(self) -> None:
        kept = self.kept_ids()
        if not kept and self.objective.retain_weight:
            raise LmcError(f"all samples are forgotten: nothing is left for the retain term of {self.objective.label}")
        self.plan = Plan(self.objective, self.forgotten_ids(), kept, self.config.baseline, self.train.seed)

    def start(self, theta: ShardedVector) -> Start:
        """Where fine-tuning starts, given θ_τ. Collective."""
        if self.config.baseline.start is None:
            return Start(theta)
        with agreement():
            return read_start(self, Path(self.config.baseline.start), theta)

    def tune(self, theta: ShardedVector, progress: Callable[[int], None]) -> tuple[ShardedVector, Tuned]:
        """(weights after fine-tuning from θ, laid out like the log; what it took). Collective."""
        engine = build_engine(
            starting_model(self.config, self.model_config, self.log), self.train, self.runtime.world_size
        )
        shards = engine_shards(engine)
        shards.write(relayout(theta.to(shards.master_dtype), shards.layout))
        tuned = Tuning(shards, self.batches, self.plan, self.train).run(progress)
        found = relayout(shards.read(), self.log.layout).to(theta.flat.dtype)
        shards.destroy()
        return found, tuned

    def replayed(self, theta: ShardedVector) -> tuple[ShardedVector, float]:
        """(θ_retrain, seconds) by exact replay. Collective."""
        started = time.perf_counter()
        with StepProgress("replay", self.touched[0].step, self.log.num_steps, self.progress) as progress:
            correction, _ = self.replay(theta, progress)
        return correction.corrected(theta), time.perf_counter() - started

    @property
    def batch_size(self) -> float:
        """Mean number of samples in a step of the logged training: the batch that costs are counted in."""
        sizes = [len(record.sample_ids) for record in self.log.records() if record.applied]
        return sum(sizes) / len(sizes)


def train_settings(config: Config) -> TrainConfig:
    """The training loop of a baseline: its own settings, the engine of `train`."""
    baseline = config.baseline
    return TrainConfig(
        epochs=baseline.epochs,
        max_steps=baseline.max_steps,
        batch_size=baseline.batch_size,
        micro_batch_size=baseline.micro_batch_size,
        optimizer=baseline.optimizer,
        learning_rate=baseline.learning_rate,
        weight_decay=baseline.weight_decay,
        schedule=baseline.schedule,
        warmup_steps=baseline.warmup_steps,
        max_grad_norm=baseline.max_grad_norm,
        seed=config.train.seed if baseline.seed is None else baseline.seed,
        engine=config.train.engine,
        deepspeed=config.train.deepspeed,
        replicas=config.train.replicas,
    )


def check_baseline_config(config: Config, world_size: int) -> None:
    """Bounds of the settings that training does not have. Local.

    Raises:
        LmcError: One is out of bounds.
    """
    from transformers import SchedulerType

    baseline = config.baseline
    if not (math.isfinite(baseline.beta) and baseline.beta > 0):
        raise LmcError(f"baseline.beta must be > 0, got {baseline.beta}; gradient ascent is its limit 0")
    if not (math.isfinite(baseline.retain_weight) and baseline.retain_weight >= 0):
        raise LmcError(f"baseline.retain_weight must be ≥ 0, got {baseline.retain_weight}")
    if baseline.schedule not in {kind.value for kind in SchedulerType}:
        names = ", ".join(sorted(kind.value for kind in SchedulerType))
        raise LmcError(f"baseline.schedule '{baseline.schedule}' is unknown; there are {names}")
    if config.train.engine == "single" and world_size > 1:
        raise LmcError(
            f"train.engine=single is for one process, and {world_size} were started: use deepspeed, fsdp2 or ddp"
        )
    engine_name(config.train, world_size)


def baseline(config: Config, runtime: Runtime, tracker: Tracker | None = None, ends: bool = True) -> dict[str, Any]:
    """Runs a baseline to the end and leaves `output_dir` as `unlearn` does; returns what result.json holds. Collective.

    Args:
        config: Settings.
        runtime: This rank.
        tracker: As of `unlearn`.
        ends: As there.
    """
    run = BaselineRun(config, runtime)
    with run.tracked_by(tracker):
        return _baseline(run, ends)


def _baseline(run: BaselineRun, ends: bool) -> dict[str, Any]:
    config, runtime = run.config, run.runtime
    log, method = run.log, config.baseline.method
    theta = log.theta(log.num_steps)
    start = run.start(theta)
    with promoted(run.output_dir) as part:
        # Before the baseline: replay must run in a process that has not run another engine (docs/engines.md).
        reference, retrain_seconds = reference_of(run, part / "reference", lambda: run.replayed(theta))
        started = time.perf_counter()
        with StepProgress(method, 0, run.plan.num_steps, run.progress, run.tracker.listeners) as progress:
            weights, tuned = run.tune(start.theta, progress)
        own_seconds, own_gradients = time.perf_counter() - started, tuned.gradients(run.batch_size)
        v = weights - theta
        v_norm = v.norm()
        if not math.isfinite(v_norm):
            raise AgreedError(
                "the weights are not finite at the end: lower baseline.learning_rate, or take fewer steps"
            )
        gradients, seconds = own_gradients + (start.gradients or 0.0), own_seconds + (start.seconds or 0.0)
        label = run.objective.label + (f" after {start.label}" if start.label else "")
        rows = [run.row("do_nothing", "do nothing", theta, 0.0, 0.0, theta, reference)] if ends else []
        if ends and start.folder is not None:
            cost = start.gradients or 0.0, start.seconds
            rows.append(run.row("start", start.label, start.theta, *cost, theta, reference))
        rows.append(run.row(method, label, weights, gradients, seconds, theta, reference))
        if ends and reference is not None and config.reference != "replay":
            steps = sum(record.applied for record in log.records())
            rows.append(
                run.row("retrain", "retrain from scratch", reference, float(steps), retrain_seconds, theta, reference)
            )
        audit = AuditRecord(
            unit="joint",
            tz=run.touched[0].step,
            tau=log.num_steps,
            K_used=0,
            v_norm=v_norm,
            v0_norm=0.0,
            hvp_calls=0,
            mode=method,
            damping=0.0,
            counterfactual=run.request.kind,
            replay_head=0,
            stopped_by="end",
            seconds=own_seconds,
            growth_max=None,
        )
        result = {
            "status": "done",
            "rel_error": next(row for row in rows if row["method"] == method)["rel_error"],
            "seconds_unlearn": seconds,
            "seconds_retrain": retrain_seconds,
            "gradients_equivalent": gradients,
            "v_norm": v_norm,
            "n_units": 1,
            "units": None,
            "world_size": runtime.world_size,
            "engine": log.manifest.engine,
            "config": asdict(config),
            "versions": package_versions(),
            "log_fingerprint": log.fingerprint,
            "request": run.asked(),
            "replay": None,
            "rows": rows,
            "baseline": {
                "method": method,
                "label": label,
                "engine": config.train.engine,
                "start": start.folder,
                "start_gradients": start.gradients,
                "start_seconds": start.seconds,
                "steps": tuned.steps,
                "skipped": tuned.skipped,
                "samples": tuned.samples,
                "gradients": own_gradients,
                "seconds": own_seconds,
                "losses": tuned.losses,
            },
        }
        correction = Correction(v, (audit,), gradients, weights)
        write_results(part, log, run.module, weights, correction, result, run.tokenizer)
    remove_folder(run.work_dir)
    names = ("rel_error", "seconds_unlearn", "seconds_retrain", "gradients_equivalent", "v_norm")
    methods = {row["method"]: row for row in rows}
    run.tracker.summary({**{name: result[name] for name in names}, "methods": methods, "audit": audit_summary([audit])})
    return result
