"""`lmc plan log`: how large a log will be and what writing it will cost, tier by tier, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmc_dist.config import Config
from lmc_dist.data import SampleDataset, split_batch
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, size, table, write_findings
from lmc_dist.shards.fingerprint import model_config, model_fingerprint, parameter_table
from lmc_dist.shards.layout import ParamSpec, is_rule
from lmc_dist.shards.module import build_skeleton, get_rng_state
from lmc_dist.training import (
    DROPOUT_NAMES,
    Schedule,
    build_config,
    build_dataset,
    build_optimizer,
    check_train_config,
    engine_name,
    freeze,
    micro_steps,
    pass_seed,
)
from lmc_dist.trajectory.calibrate import Calibration, calibrate
from lmc_dist.trajectory.logger import package_versions
from lmc_dist.trajectory.record import TIERS, MicroRecord, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.size import (
    LogShape,
    most_at_once,
    snapshot_bytes,
    snapshots_kept,
    stored_bytes,
    table_bytes,
    vector_bytes,
)

_SAMPLES = 500  # whose tokens are compressed to see how long they become


@dataclass(frozen=True)
class PlannedLog:
    """The prediction for one tier.

    Attributes:
        storage: Tier.
        configured: Whether it is the configuration's.
        step: Bytes of a step's files by kind.
        snapshot: Bytes of a snapshot.
        parts: Bytes of the finished log by kind.
        most: Bytes while a ring is fullest; those of the finished log where there is none.
        rank_step: Bytes of a step that one rank writes.
        seconds: Of a step: in training's way, and behind its back; None without calibration.
        overhead: Share that a step gets longer by; None without `plan.step_seconds`.
    """

    storage: str
    configured: bool
    step: dict[str, int]
    snapshot: int
    parts: dict[str, int]
    most: int
    rank_step: int
    seconds: tuple[float, float] | None = None
    overhead: float | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def plan_log(config: Config) -> str:
    """The prediction as text, and as JSON where asked for. Local.

    Raises:
        LmcError: Settings that do not fit, no data, no model.
    """
    check_target("json", config.json)
    planner = Planner(config)
    speed = planner.calibrate() if config.plan.calibrate else None
    plans = [planner.plan(storage, speed) for storage in TIERS]
    found = {
        "world_size": config.plan.world_size,
        "parameters": planner.shape("replay").numel,
        "steps": planner.num_steps,
        "snapshots": len(planner.snapshots),
        "compression": config.log.compression,
        "calibration": speed and asdict(speed),
        "tiers": [plan.to_json() for plan in plans],
    }
    write_findings(config.json, found)
    return plan_text(config, planner, plans, speed)


class Planner:
    """What is known of a run before it starts: model on meta, data, schedule.

    Raises:
        LmcError: See `plan_log`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        check_train_config(config)
        plan = config.plan
        if plan.world_size < 1 or (plan.steps is not None and plan.steps < 1):
            raise LmcError("plan.world_size and plan.steps must be at least 1")
        engine_name(config.train, plan.world_size)
        self.dataset: SampleDataset
        self.dataset, tokenizer = build_dataset(config)
        self.skeleton = build_skeleton(build_config(config.model, tokenizer), "cpu", config.model.attention)
        freeze(self.skeleton, config.model.trainable)
        train = config.train
        self.schedule = Schedule(self.dataset.ids, train.batch_size, train.epochs, train.max_steps, train.seed)
        self.num_steps = plan.steps or self.schedule.num_steps
        self.parameters = tuple(ParamSpec(row["name"], tuple(row["shape"])) for row in parameter_table(self.skeleton))
        self.state = optimizer_state(config)
        log = config.log
        self.snapshots = snapshots_kept(self.num_steps, log.save_interval, log.max_steps)
        values = model_config(self.skeleton)
        self.has_dropout = any(values.get(name) for name in DROPOUT_NAMES)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # taken to be training's
        self._batches = [ids for _, _, ids in self.schedule]

    def shape(self, storage: str) -> LogShape:
        """What the files of a tier look like; the configured types where the tier has such vectors."""
        log, kinds = self.config.log, TIERS[storage]
        engine = engine_name(self.config.train, self.config.plan.world_size)
        return LogShape(
            self.parameters,
            self.config.plan.world_size,
            engine if is_rule(engine) else "zero3",
            storage,
            update_dtype=getattr(torch, log.update_dtype if "update" in kinds else "float32"),
            gradient_dtype=getattr(torch, log.gradient_dtype if "gradient" in kinds else "float32"),
            compression=log.compression,
            state=self.state,
        )

    def plan(self, storage: str, speed: Calibration | None) -> PlannedLog:
        """The prediction for a tier. Local."""
        log, shape = self.config.log, self.shape(storage)
        step = {kind: round(vector_bytes(shape, kind)) for kind in TIERS[storage]}
        snapshot, first = round(snapshot_bytes(shape)), round(snapshot_bytes(shape, has_state=False))
        steps = range(self.snapshots[0], self.num_steps)
        samples = self._samples() if log.save_batch_data else []
        ranks, seen = shape.ranks, min(len(self.dataset), self.num_steps * self.config.train.batch_size)
        rows, tokens = table_bytes(self.record, self.num_steps, TIERS[storage], ranks, samples, seen)
        parts = {kind: round(stored_bytes(shape, kind, steps, log.save_interval)) for kind in step}
        parts["snapshots"] = sum(first if n == 0 else snapshot for n in self.snapshots)
        parts["table"], parts["samples"], parts["manifest"] = rows, tokens, self.manifest_bytes(storage)
        most_steps, most_snapshots = most_at_once(self.num_steps, log.save_interval, log.max_steps)
        kept = sum(parts.values())
        ring = (most_steps - len(steps)) * sum(step.values()) + (most_snapshots - len(self.snapshots)) * snapshot
        seconds = None if speed is None else speed.step_seconds(shape)
        between, overhead = self.config.plan.step_seconds, None
        if seconds is not None and between is not None and speed is not None:
            snapshots = speed.snapshot_seconds(shape) / (log.save_interval or self.num_steps)
            overhead = speed.overhead(seconds, between) + snapshots / between
        return PlannedLog(
            storage,
            storage == log.storage,
            step,
            snapshot,
            {kind: number for kind, number in parts.items() if number},
            max(kept + ring, kept),
            round(sum(step.values()) / ranks),
            seconds,
            overhead,
        )

    def record(self, step: int) -> StepRecord:
        """A step's row as long as training's will be: real ids and places, values with as many digits."""
        train, ranks = self.config.train, self.config.plan.world_size
        ids = self._batches[step % len(self._batches)]
        targets = float(sum(self.dataset.num_targets(i) for i in ids))
        micros = []
        for m, chunks in enumerate(split_batch(ids, ranks, micro_steps(train, ranks))):
            for rank, mine in enumerate(chunks):
                state = None
                if self.has_dropout:
                    torch.manual_seed(pass_seed(train.seed, step, m, rank))
                    state = get_rng_state(self.device).cpu().numpy().tobytes()
                micros.append(MicroRecord(rank, m, tuple(mine), targets, state, "0" * 16 if mine else None))
        rate = train.learning_rate if train.schedule == "constant" else train.learning_rate / 3
        groups = 2 if any(len(spec.shape) <= 1 for spec in self.parameters) else 1
        is_lossy = self.config.log.update_dtype != "float32"
        return StepRecord(
            step,
            step,
            tuple(micros),
            (rate,) * groups,
            targets,
            checksum="0" * 32,
            log_checksum="0" * 32 * is_lossy or None,
        )

    def _samples(self) -> list[dict[str, Any]]:
        pad = self.dataset.pad_token_id
        items = [self.dataset[i] for i in range(min(len(self.dataset), _SAMPLES))]
        return [{"id": i["index"], "input_ids": i["input_ids"], "labels": i["labels"], "pad": pad} for i in items]

    def manifest_bytes(self, storage: str) -> int:
        """Of the manifest, made up as training will write it."""
        config, log = self.config, self.config.log
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in build_optimizer(self.skeleton, config.train).param_groups
        ]
        manifest = TrajectoryManifest(
            model_config(self.skeleton),
            model_fingerprint(self.skeleton),
            [{**row, "group": 0} for row in parameter_table(self.skeleton)],
            {"class": "AdamW", "groups": groups},
            "global_token_mean",
            config.train.max_grad_norm,
            self.dataset.fingerprint,
            config.plan.world_size,
            engine_name(config.train, config.plan.world_size),
            storage,
            log.save_interval,
            log.max_steps,
            run={"config": asdict(replace(config, json=None)), "deepspeed": {"zero_optimization": {"stage": 3}}},
            versions=package_versions(),
        )
        return len(json.dumps(manifest.to_json(), indent=2)) + 400  # the engine's settings, the digest

    def calibrate(self) -> Calibration:
        """Times this machine and the disk that log_dir is on."""
        folder = Path(self.config.log_dir).absolute()
        while not folder.is_dir():
            folder = folder.parent
        return calibrate(folder, self.parameters, self.config.plan.world_size, self.config.log.compression)


def optimizer_state(config: Config) -> tuple[str, ...]:
    """Names of the per-element state that the configured optimizer keeps, found by stepping it once."""
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[model.weight]
    return tuple(sorted(k for k, v in state.items() if torch.is_tensor(v) and v.shape == model.weight.shape))


def plan_text(config: Config, planner: Planner, plans: Sequence[PlannedLog], speed: Calibration | None) -> str:
    """The prediction for a person."""
    log, shape = config.log, planner.shape("replay")
    every = f"every {log.save_interval} steps" if log.save_interval else "at the ends only"
    ring = f", ring of {log.max_steps} steps" if log.max_steps else ""
    lines = [
        f"{shape.numel:,} parameters, {count(planner.num_steps, 'step')} on {count(shape.ranks, 'rank')}; "
        f"snapshots {every}{ring}: {len(planner.snapshots)} of θ{''.join(f', {name}' for name in shape.state)}"
    ]
    head = ["tier", "a step", "B/parameter", "a rank's", "a snapshot", "the log", "at most"]
    if speed is not None:
        head += ["s/step in the way", "behind"]
    if any(plan.overhead is not None for plan in plans):
        head.append("overhead")
    rows = [head]
    for plan in plans:
        step = sum(plan.step.values())
        row = [
            ("→ " if plan.configured else "  ") + plan.storage,
            size(step),
            f"{step / shape.numel:.2f}",
            size(plan.rank_step),
            size(plan.snapshot),
            size(plan.total),
            size(plan.most),
        ]
        if plan.seconds is not None:
            row += [f"{seconds:.4f}" for seconds in plan.seconds]
        if plan.overhead is not None:
            row.append(f"{100 * plan.overhead:.1f} %")
        rows.append(row)
    lines += table(rows)
    own = next(plan for plan in plans if plan.configured)
    lines.append("of it: " + ", ".join(f"{kind} {size(number)}" for kind, number in own.parts.items()))
    if log.compression == "zstd":
        lines.append(
            "zstd is taken to leave 0.84 of float32 updates (a Llama on text under AdamW), 0.90 of gradients, 0.93 of "
            "weights (small models), 0.72 of bfloat16; vectors that hold many zeros shrink further"
        )
    if speed is not None:
        lines.append(speed.text)
    return "\n".join(lines)
