"""Is everything there that a later deletion needs, and what could a given deletion do?

Each check looks at one thing and says what to do about it; none stops the others. Nothing is trained or computed on the
model, so that it can be run on any machine that sees the log and the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from lmc_dist.errors import LmcError, shorten
from lmc_dist.trajectory.batches import BatchSource, seen_batch
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step
from lmc_dist.trajectory.kept import DESCRIPTION, curvature_folder, kept_names
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.sealed import read_sealed
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import check_update_rule
from lmc_dist.unlearn.request import check_request
from lmc_dist.update_rules.settings import DEEPSPEED_ADAM

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: `failed` where a deletion would not be possible or not be right.
        found: What was found.
        advice: What to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def guarded(name: str, advice: str, look: Callable[[], Check]) -> Check:
    """The check, or a failed one with the error it met."""
    try:
        return look()
    except LmcError as error:
        return Check(name, "failed", str(error), advice)


# --- the log by itself -------------------------------------------------------------------------------------------------


def check_steps(log: TrajectoryLog) -> Check:
    """Whether the run came to its end."""
    applied = sum(record.applied for record in log.records())
    found = f"{log.num_steps} steps, {applied} of them changed the weights"
    if log.num_steps in log.snapshots:
        return Check("steps", "ok", found)
    latest = max(log.snapshots, default=None)
    return Check(
        "steps",
        "warning",
        f"{found}; there is no snapshot of the end (the last is {latest}): the run was cut off, or still runs",
        "continue it with lmc train --resume true, or count it as finished",
    )


def check_learning_rates(log: TrajectoryLog) -> Check:
    """The rates that the steps used, for each optimizer group."""
    groups = len(log.manifest.optimizer["groups"])
    applied = [record for record in log.records() if record.applied]
    if lacking := [r.step for r in applied if len(r.lr) != groups]:
        found = f"{len(lacking)} steps lack the rate of an optimizer group: {shorten(lacking)}"
        return Check("learning rates", "failed", found, "such steps cannot be propagated through; train again")
    rates = [rate for record in applied for rate in record.lr]
    zero = [r.step for r in applied if not all(r.lr)]
    found = f"{min(rates, default=0):g} to {max(rates, default=0):g}"
    if zero:
        found += f"; 0 in {len(zero)} steps ({shorten(zero)}), which leave no trace of their gradient"
    return Check("learning rates", "ok", found)


def check_updates(log: TrajectoryLog) -> Check:
    """No step that was applied with a rate and a gradient left the weights where they were."""
    still = [r.step for r in log.records() if r.applied and any(r.lr) and r.grad_norm != 0 and not r.u_norm]
    if still:
        found = f"{len(still)} steps were applied and changed nothing: {shorten(still)}"
        return Check("updates", "failed", found, "the logger did not see the weights that were trained; train again")
    return Check("updates", "ok", "every step that was applied changed the weights")


def check_random_states(log: TrajectoryLog, dropout_names: Sequence[str]) -> Check:
    """Where the model has dropout, every pass needs the state of its random numbers."""
    config = log.manifest.model_config
    rates = {name: config[name] for name in dropout_names if config.get(name)}
    passes = [m for r in log.records() if r.applied for m in r.micro_batches if m.sample_ids]
    lacking = sum(m.random_state is None for m in passes)
    if not rates:
        return Check("random states", "ok", "the model has no dropout: none are needed")
    named = ", ".join(f"{name}={value:g}" for name, value in rates.items())
    if lacking:
        return Check(
            "random states",
            "failed",
            f"the model has {named}, and {lacking} of {len(passes)} passes lack the state of their random numbers",
            "their masks are lost, so gradients cannot be made again; train again with the logger attached throughout",
        )
    return Check("random states", "ok", f"there for all {len(passes)} passes ({named})")


def check_correction(log: TrajectoryLog) -> Check:
    """From which step on corrections can be computed."""
    advice = "exact replay (unlearn.replay_head=all) does not need it"
    kinds = TIERS[log.manifest.storage]
    if not {"update", "theta"} & set(kinds):
        return Check("correction", "warning", "storage 'replay' keeps no updates to propagate along", advice)
    try:
        log.require(log.first_step)
        check_update_rule(log.manifest, log.records(), log.first_step)
    except LmcError as error:
        return Check("correction", "warning", str(error), advice)
    return Check("correction", "ok", f"possible for steps {log.first_step} to {log.num_steps - 1}")


def check_replay(log: TrajectoryLog, world_size: int) -> Check:
    """From which step on the run can be repeated, and how exactly."""
    if not log.snapshots:
        return Check("replay", "failed", "the log holds no snapshot to start from", "train again with save_interval")
    name = log.manifest.optimizer["class"]
    if not hasattr(torch.optim, name) and name not in DEEPSPEED_ADAM:
        found = f"the run was trained with {name}, which is not torch's"
        return Check("replay", "warning", found, "build the engine in a script of your own and pass it to replay()")
    found = f"possible for steps {log.first_step} to {log.num_steps - 1}, to the bit on {log.manifest.world_size} ranks"
    if world_size != log.manifest.world_size:
        found += f" (here are {world_size})"
    return Check("replay", "ok", found)


def check_curvature(log: TrajectoryLog) -> Check:
    """Which curvature is kept beside the log."""
    names = kept_names(log.path)
    foreign = [n for n in names if description(log, n).get("log_fingerprint") != log.fingerprint]
    if foreign:
        found = f"{', '.join(foreign)} was computed on another run than this log's"
        return Check("kept curvature", "warning", found, "compute it again: lmc log curvature --overwrite true")
    return Check("kept curvature", "ok", ", ".join(names) or "none (lmc log curvature computes one)")


def description(log: TrajectoryLog, name: str) -> dict[str, Any]:
    return read_sealed(curvature_folder(log.path, name) / DESCRIPTION)


# --- the log and the data ----------------------------------------------------------------------------------------------


def check_ids(log: TrajectoryLog, dataset_ids: Sequence[int]) -> Check:
    """Samples of the log are in the dataset, and the other way round."""
    seen = {i for record in log.records() for i in record.sample_ids}
    known = set(dataset_ids)
    if unknown := sorted(seen - known):
        return Check(
            "sample ids",
            "failed",
            f"{len(unknown)} samples of the log are not in the dataset: {shorten(unknown)}",
            "give the dataset that was trained on (data settings)",
        )
    if unseen := sorted(known - seen):
        found = f"{len(unseen)} of {len(known)} samples of the dataset were never trained on: {shorten(unseen)}"
        return Check("sample ids", "warning", found, "nothing: a request for them alone has nothing to do")
    return Check("sample ids", "ok", f"all {len(known)} samples of the dataset were trained on, and no others")


def check_denominators(log: TrajectoryLog, batches: BatchSource) -> Check:
    """D_s is what the data gives."""
    normalization = log.manifest.loss_normalization
    if normalization == "given":
        return Check(
            "denominators",
            "warning",
            "the loss was divided by numbers of unknown origin",
            "requests need --forget.counterfactual zero",
        )
    wrong, first = [], ""
    for record in log.records():
        if not record.applied:
            continue
        counts = [sum(batches.num_targets(m.sample_ids)) for m in record.micro_batches]
        if normalization == "global_token_mean":
            pairs = [(record.denominator, float(sum(counts)))]
        else:
            pairs = [(m.denominator, float(n * len(counts))) for m, n in zip(record.micro_batches, counts, strict=True)]
        if different := [(logged, given) for logged, given in pairs if logged != given]:
            first = (
                first or f"step {record.step} was divided by {different[0][0]:g}, the data gives {different[0][1]:g}"
            )
            wrong.append(record.step)
    if wrong:
        advice = "other tokenizer, prompt or max_length than in training: give the same"
        return Check("denominators", "failed", f"{len(wrong)} steps differ; {first}", advice)
    return Check("denominators", "ok", "those of all steps are what the data gives")


def check_batches(log: TrajectoryLog, batches: BatchSource) -> Check:
    """The tensors the model saw can be made again, padding included."""
    wrong, compared, unknown = [], 0, 0
    for record in log.records():
        for micro in record.micro_batches:
            if micro.digest is None:
                unknown += bool(micro.sample_ids) and not micro.blanks
                continue
            compared += 1
            try:
                seen_batch(micro, batches)
            except LmcError:
                wrong.append(record.step)
    if wrong:
        steps = sorted(set(wrong))
        return Check(
            "batches",
            "failed",
            f"{len(wrong)} of {compared} passes are not what the model saw, in {len(steps)} steps ({shorten(steps)})",
            "other data, tokenizer or collator than in training: give the same, or a BatchSource of your own",
        )
    if unknown:
        return Check("batches", "warning", f"{unknown} passes have no digest to compare with", "nothing can be done")
    return Check("batches", "ok", f"all {compared} passes can be made again as the model saw them")


# --- a request ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to fulfil a request.

    Attributes:
        name: correction, replay, or kept curvature.
        possible: Whether it can be taken.
        detail: What it takes, or the first reason why not.
        steps: Steps to propagate or to run again; 0 where it cannot be taken.
        snapshot: Where it starts reading.
    """

    name: str
    possible: bool
    detail: str
    steps: int = 0
    snapshot: int | None = None


@dataclass(frozen=True)
class Outlook:
    """What a request would touch and how it could be fulfilled.

    Attributes:
        what: The request in words.
        touched: Steps that hold forgotten data.
        ways: How it could be done.
        error: Why the request itself cannot be.
    """

    what: str
    touched: tuple[int, ...]
    ways: tuple[Way, ...]
    error: str | None = None

    @property
    def possible(self) -> bool:
        return any(way.possible for way in self.ways)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "possible": self.possible}


def outlook(log: TrajectoryLog, request: Counterfactual, batches: BatchSource | None) -> Outlook:
    """What a deletion would be able to do. Local."""
    count = len(request.batch_ids or request.sample_ids)
    one, many = ("batch", "batches") if request.batch_ids else ("sample", "samples")
    what = f"{count} {one if count == 1 else many}, counterfactual '{request.kind}'"
    normalization, records = log.manifest.loss_normalization, list(log.records())
    try:
        touched = check_request(request, records, batches, normalization)
        if not touched:
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        if batches is not None:
            for record in touched:
                edit_step(record, request, normalization, batches.num_targets)
    except LmcError as error:
        return Outlook(what, (), (), str(error))
    first = touched[0].step
    ways = [_correction(log, first), _replay(log, request, first)]
    ways += [_kept(log, name, first) for name in kept_names(log.path)]
    return Outlook(what, tuple(record.step for record in touched), tuple(ways))


def _correction(log: TrajectoryLog, first: int) -> Way:
    try:
        log.require(first)
        check_update_rule(log.manifest, log.records(), first)
    except LmcError as error:
        return Way("correction", False, str(error))
    steps, start = log.num_steps - 1 - first, log.nearest_anchor(first)
    return Way("correction", True, f"from snapshot {start}, propagated through {steps} steps", steps, start)


def _replay(log: TrajectoryLog, request: Counterfactual, first: int) -> Way:
    try:
        log.require(first, updates=False)
    except LmcError as error:
        return Way("replay", False, str(error))
    if not hasattr(torch.optim, log.manifest.optimizer["class"]):
        return Way(
            "replay", False, f"{log.manifest.optimizer['class']} is not torch's: call replay() on your own engine"
        )
    start = log.nearest_snapshot(first)
    if start == first and start > log.first_step:  # some unchanged steps, whose checksums certify the rest
        start = log.nearest_snapshot(start - 1)
    left_out = request.batch_ids
    steps = sum(r.applied and r.batch_id not in left_out for r in log.records() if r.step >= start)
    return Way("replay", True, f"from snapshot {start}, {steps} steps run again", steps, start)


def _kept(log: TrajectoryLog, name: str, first: int) -> Way:
    way = f"kept curvature '{name}'"
    try:
        found = description(log, name)
        if found["log_fingerprint"] != log.fingerprint:
            raise LmcError("it belongs to another run")
        low, high = found["windows"][0]["start"], found["windows"][-1]["stop"]
        if first < low or log.num_steps > high:
            raise LmcError(f"it covers steps {low} to {high - 1}, needed are {first} to {log.num_steps - 1}")
        log.require(first)
        check_update_rule(log.manifest, log.records(), first)
    except LmcError as error:
        return Way(way, False, str(error))
    steps = log.num_steps - 1 - first
    return Way(way, True, f"propagated through {steps} steps", steps, log.nearest_anchor(first))
