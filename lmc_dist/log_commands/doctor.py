"""`lmc log doctor`: everything a later deletion needs, checked against the log, the data and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmc_dist.config import Config
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, spans, table, write_findings
from lmc_dist.logged_run import logged_skeleton, other_model
from lmc_dist.runtime import Runtime, agreement, broadcast_object
from lmc_dist.training import DROPOUT_NAMES, build_config, build_dataset, read_request
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.contents import read_contents
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.verify import Verification, total_units, verify
from lmc_dist.unlearn.doctor import (
    Check,
    Outlook,
    check_batches,
    check_correction,
    check_curvature,
    check_denominators,
    check_ids,
    check_learning_rates,
    check_random_states,
    check_replay,
    check_steps,
    check_updates,
    guarded,
    outlook,
)


def examine(config: Config, runtime: Runtime) -> tuple[str, int]:
    """(the checks as text, exit status: 1 if any failed). Collective.

    Raises:
        LmcError: On every rank: no log, or nowhere to write to.
    """
    with agreement():
        check_target("json", config.json)
        read_contents(config.log_dir)
    checks, request = diagnose(config, runtime)
    if runtime.is_main:
        found = {"log_dir": config.log_dir, "checks": [c.to_json() for c in checks]}
        write_findings(config.json, found | {"request": request and request.to_json()})
    failed = any(check.status == "failed" for check in checks) or (request is not None and not request.possible)
    return diagnosis_text(checks, request), int(failed)


def diagnose(config: Config, runtime: Runtime) -> tuple[list[Check], Outlook | None]:
    """All checks, and what the configured request could do. Collective; equal on all ranks."""
    contents = [_contents(config, runtime)]
    found: tuple[list[Check], Outlook | None] = ([], None)
    with agreement():
        if runtime.is_main:  # the rest reads the table and the data only
            found = _diagnose(config, runtime)
    checks, request = broadcast_object(found)
    return contents + checks, request


def _contents(config: Config, runtime: Runtime) -> Check:
    """All that `lmc log verify` looks at: θ_s + u_s = θ_{s+1} at every step is part of it."""
    from tqdm import tqdm

    if not config.doctor.read_tensors:
        return Check("contents", "warning", "not read (doctor.read_tensors=false)", "lmc log verify reads them")
    with agreement():
        units = total_units(read_contents(config.log_dir)) if runtime.is_main else 0
    with tqdm(total=units, desc="contents", unit="part", disable=not runtime.is_main) as bar:
        found: Verification = verify(config.log_dir, bar.update)
    checked = ", ".join(f"{number:,} {kind}" for kind, number in found.counts.items())
    if not found.problems:
        return Check("contents", "ok", f"all is as it was written and leads from θ to θ ({checked})")
    first = found.problems[0]
    return Check(
        "contents",
        "failed",
        f"{len(found.problems)} places are damaged, the first: {first.place}: {first.message}",
        "lmc log verify lists them; restore them from a copy, or resume or train again",
    )


def _diagnose(config: Config, runtime: Runtime) -> tuple[list[Check], Outlook | None]:
    try:
        log = TrajectoryLog(config.log_dir)
    except LmcError as error:
        return [Check("log", "failed", str(error), "restore it from a copy, or train again")], None
    looks: list[tuple[str, str, Callable[[], Check]]] = [
        ("steps", "", lambda: check_steps(log)),
        ("learning rates", "", lambda: check_learning_rates(log)),
        ("updates", "", lambda: check_updates(log)),
        ("random states", "", lambda: check_random_states(log, DROPOUT_NAMES)),
        ("correction", "", lambda: check_correction(log)),
        ("replay", "", lambda: check_replay(log, runtime.world_size)),
        ("kept curvature", "compute it again", lambda: check_curvature(log)),
    ]
    checks = [guarded(name, advice, look) for name, advice, look in looks]
    dataset: SampleDataset | None = None
    tokenizer: Any = None
    try:
        dataset, tokenizer = build_dataset(config)
    except LmcError as error:
        if log.manifest.save_batch_data:
            dataset = log.samples()
            found = f"{error}; the samples in the log itself are used"
            checks.append(Check("dataset", "warning", found, "give the data settings of training"))
        else:
            checks.append(Check("dataset", "failed", str(error), "give the data settings of training"))
    if tokenizer is not None:
        checks.append(guarded("model", "give the model settings of training", lambda: _model(config, log, tokenizer)))
    if dataset is None:
        return checks, None
    batches = DatasetBatches(dataset)
    if tokenizer is not None:
        checks.append(_fingerprint(log, dataset, config.data.source))
    ids, advice = dataset.ids, "give the dataset that was trained on"
    checks.append(check_ids(log, ids))
    checks.append(guarded("denominators", advice, lambda: check_denominators(log, batches)))
    checks.append(guarded("batches", advice, lambda: check_batches(log, batches)))
    try:
        request = read_request(config, dataset)
    except LmcError as error:
        return [*checks, Check("request", "failed", str(error), "see the options --forget.…")], None
    return checks, None if request is None else outlook(log, request, batches)


def _fingerprint(log: TrajectoryLog, dataset: SampleDataset, source: str) -> Check:
    if source == "log":
        return Check("dataset", "ok", f"the {len(dataset):,} samples that the log keeps")
    logged = log.manifest.dataset_fingerprint
    if logged is None:
        return Check("dataset", "warning", "the log does not say which dataset it was trained on", "compare by hand")
    if logged != dataset.fingerprint:
        found = f"not the logged one: fingerprint {dataset.fingerprint[:12]} against {logged[:12]}"
        advice = "data settings, tokenizer or files changed since training: give the same"
        return Check("dataset", "failed", found, advice)
    return Check("dataset", "ok", f"the logged one, {len(dataset):,} samples (fingerprint {logged[:12]})")


def _model(config: Config, log: TrajectoryLog, tokenizer: Any) -> Check:
    model_config = build_config(config.model, tokenizer)
    skeleton = logged_skeleton(config, model_config, log, "cpu")
    if (other := other_model(log.manifest, skeleton)) is not None:
        return Check("model", "failed", *other)
    found = f"the logged one, {model_config.model_type} (fingerprint {log.manifest.model_fingerprint[:12]})"
    return Check("model", "ok", found)


def diagnosis_text(checks: list[Check], request: Outlook | None) -> str:
    """The checks for a person."""
    lines = table([(check.name, check.status, check.found) for check in checks], left=3)
    told = [f"{check.name}: {check.advice}" for check in checks if check.advice]
    if told:
        lines += ["", "what to do", *(f"  {line}" for line in told)]
    if request is not None:
        lines += ["", f"to forget {request.what}"]
        if request.error is not None:
            lines.append(f"  not possible: {request.error}")
        else:
            lines.append(f"  touches steps {spans(list(request.touched))}")
            rows = [(f"  {way.name}", "yes" if way.possible else "no", way.detail) for way in request.ways]
            lines += table(rows, left=3)
    return "\n".join(lines)
