"""The facts of a log and of a request, from the table, the file system and the data; or of a run that is only imagined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lmc_dist.curvature import TokenCrossEntropy
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.planner.facts import Edit, LogFacts, ModelFacts, Pass, Passes, RequestFacts
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.contents import folder_bytes
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedMicro, edit_step
from lmc_dist.trajectory.files import step_folder
from lmc_dist.trajectory.record import Segment
from lmc_dist.trajectory.replay import check_ranks
from lmc_dist.trajectory.snapshots import snapshot_folder
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import check_update_rule
from lmc_dist.unlearn.path import TrainingPath, logs_gradients

_PADDING = 8  # tokens that lengths are rounded up to, see data.collate
REDUCE_BUCKET = 500_000_000  # elements, DeepSpeed's default
ZERO = ("deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")


def log_facts(log: TrajectoryLog, model: ModelFacts, dataset: SampleDataset, first: int) -> LogFacts:
    """What a plan needs of a log. Local.

    Args:
        log: The log.
        model: Its model.
        dataset: The samples that it was trained on.
        first: First step that holds forgotten data.
    """
    length = _lengths(dataset)
    passes = tuple(
        tuple(_pass(m.sample_ids, length) for m in record.micro_batches if m.sample_ids) for record in log.records()
    )
    manifest = log.manifest
    state: tuple[str, ...] = ()
    is_coarse = False
    no_sweep: str | None = None
    try:
        log.require(first)
        check_update_rule(manifest, log.records(), first)
        path = TrainingPath(log, None, TokenCrossEntropy(), None)
        state, is_coarse = path.rule.keys, not path.is_precise(first)
    except LmcError as error:
        no_sweep = str(error)
    try:
        log.require(first, updates=False)
        check_ranks(log)
        name = manifest.optimizer["class"]
        no_replay = None if hasattr(torch.optim, name) else f"{name} is not torch's: call replay() on your own engine"
    except LmcError as error:
        no_replay = str(error)
    applied = next((s for s in range(log.num_steps - 1, -1, -1) if log.kinds(s)), None)
    folder = None if applied is None else log.path / step_folder(applied)
    return LogFacts(
        model,
        manifest.segment(log.num_steps - 1).engine,
        passes,
        tuple(record.applied for record in log.records()),
        tuple(log.snapshots),
        state,
        logs_gradients(manifest),
        _bytes(folder, "update") or _bytes(folder, "theta"),
        _bytes(folder, "gradient"),
        folder_bytes(log.path / snapshot_folder(log.snapshots[-1])) if log.snapshots else 0,
        is_coarse,
        no_sweep,
        no_replay,
        any(record.clip_coef < 1 for record in log.records()),
        bucket_bytes(manifest.segment(log.num_steps - 1)),
    )


def bucket_bytes(segment: Segment) -> int:
    """What DeepSpeed's engine of a segment sets aside for the gradients that it reduces together. Pure."""
    settings = segment.run.get("deepspeed")
    if not isinstance(settings, dict):
        return 0
    zero = settings.get("zero_optimization", {})
    if not zero.get("stage", 0) or not zero.get("contiguous_gradients", True):
        return 0
    is_half = any(settings.get(key, {}).get("enabled") for key in ("bf16", "bfloat16", "fp16"))
    return int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * (2 if is_half else 4)


def request_facts(
    log: TrajectoryLog, request: Counterfactual, batches: BatchSource, dataset: SampleDataset
) -> RequestFacts:
    """What a plan needs of a request that `check_request` has passed. Local."""
    length, edits = _lengths(dataset), {}
    for record in log.records():
        if not (record.applied and request.touches(record)):
            continue
        edited = edit_step(record, request, log.manifest.loss_normalization, batches.num_targets)
        kept = _edited(edited.micro_batches, [m.weights for m in edited.micro_batches], length)
        source = _edited(edited.micro_batches, [m.source_weights for m in edited.micro_batches], length)
        units = sorted({i for i in record.sample_ids if i in request.sample_ids}) or [record.batch_id]
        edits[record.step] = Edit(edited.skipped, kept, source, tuple(units))
    return RequestFacts(request.kind, len(request.batch_ids or request.sample_ids), edits)


def _edited(micros: Sequence[EditedMicro], weights: Sequence[Sequence[float]], length: Mapping[int, int]) -> Passes:
    """Passes over the samples of some weight; under dropout the whole pass is run."""
    found = []
    for micro, values in zip(micros, weights, strict=True):
        ids = micro.record.sample_ids
        if micro.record.random_state is None:
            ids = tuple(i for i, value in zip(ids, values, strict=True) if value)
        if ids and any(values):
            found.append(_pass(ids, length))
    return tuple(found)


def _lengths(dataset: SampleDataset) -> dict[int, int]:
    """Tokens of each sample, by id."""
    items = (dataset[position] for position in range(len(dataset)))
    return {item["index"]: len(item["input_ids"]) for item in items}


def _pass(ids: Sequence[int], length: Mapping[int, int]) -> Pass:
    longest = max(length[i] for i in ids)
    return Pass(len(ids), -(-longest // _PADDING) * _PADDING)


def _bytes(folder: Path | None, kind: str) -> int:
    """Of all ranks' files of a kind."""
    return 0 if folder is None else sum(path.stat().st_size for path in folder.glob(f"{kind}.*"))


def imagined(
    model: ModelFacts,
    engine: str,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    length: int,
    state: tuple[str, ...],
    save_interval: int | None,
    update_itemsize: int,
    forgotten: int,
) -> tuple[LogFacts, RequestFacts]:
    """A run of equal batches, and a request for samples that lie evenly over one epoch of it. Pure.

    Args:
        model: Its model.
        engine: That trains it.
        steps: Of the run.
        batch_size: Samples a step.
        micro_batch_size: Samples a pass.
        length: Tokens a sample.
        state: Of the optimizer.
        save_interval: Steps between snapshots; None keeps the first and the last.
        update_itemsize: Bytes of an element of u_s as stored.
        forgotten: Samples.
    """
    passes = _cut(batch_size, micro_batch_size, length)
    log = LogFacts(
        model,
        engine,
        (passes,) * steps,
        (True,) * steps,
        tuple(sorted({*range(0, steps, save_interval or steps), steps})),
        state,
        step_bytes=model.numel * update_itemsize,
        snapshot_bytes=model.numel * model.itemsize * (1 + len(state)),
        bucket_bytes=REDUCE_BUCKET * model.itemsize if engine in ZERO else 0,
    )
    by_step: dict[int, list[int]] = {}
    for i in range(forgotten):
        by_step.setdefault((2 * i + 1) * steps // (2 * forgotten), []).append(i)
    edits = {}
    for step, units in by_step.items():
        left = batch_size - len(units)
        edits[step] = Edit(left <= 0, _cut(max(left, 0), micro_batch_size, length), passes, tuple(units))
    return log, RequestFacts("renormalize", forgotten, edits)


def _cut(samples: int, size: int, length: int) -> Passes:
    return tuple(Pass(min(size, samples - i), length) for i in range(0, samples, size))
