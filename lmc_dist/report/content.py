"""What a report says about groups of runs, as text, tables and pictures, which `render` sets as HTML and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmc_dist.report import pictures
from lmc_dist.report.collect import Group, Run, at, number
from lmc_dist.report.pictures import Picture
from lmc_dist.report.tables import (
    NONE,
    Table,
    audit_table,
    distinct,
    evaluation_tables,
    growth_ends,
    layer_numbers,
    layers_table,
    methods_table,
    stat_text,
    value_text,
)


@dataclass(frozen=True)
class Section:
    """What there is to say about a group.

    Attributes:
        title: What was forgotten.
        summary: The outcome in one or two sentences.
        facts: Title → (name, value) of a list.
        tables: In order; the first is that of methods.
        pictures: In order.
        settings: (run, its whole configuration as text).
    """

    title: str
    summary: str
    facts: dict[str, list[tuple[str, str]]]
    tables: list[Table]
    pictures: list[Picture] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)


def sections(groups: Sequence[Group]) -> list[Section]:
    return [section(group, f"s{i}") for i, group in enumerate(groups, 1)]


def section(group: Group, key: str) -> Section:
    """Everything about a group; `key` tells its pictures' ids from others'."""
    asked = distinct(run.at("request", "what") for run in group.runs)
    layered = next((run for run in group.runs if run.layers), group.first)
    drawn = [
        pictures.error_against_cost(group, f"{key}-cost"),
        pictures.trade_off(group, f"{key}-trade"),
        pictures.growth(growth_ends(group), f"{key}-growth"),
        pictures.layers([layer_numbers(row) for row in layered.layers], f"{key}-layers"),
    ]
    tables = [
        methods_table(group),
        audit_table(group),
        layers_table(layered, len(group.runs)),
        *evaluation_tables(group),
    ]
    return Section(
        f"Forgot {asked}" if asked not in ("", NONE) else "An unlearning run",
        summary(group),
        {"What was asked": asked_facts(group), "What was done": done_facts(group), "Audit": audit_facts(group)},
        [table for table in tables if table is not None],
        [picture for picture in drawn if picture is not None],
        [(run.name, json.dumps(run.at("config"), indent=2, sort_keys=True, ensure_ascii=False)) for run in group.runs],
    )


def summary(group: Group) -> str:
    """The outcome of the method that was asked for."""
    main, runs = group.main, len(group.runs)
    if main is None:
        if undone := undone_units(group.first):
            return f"Units were taken out of this run or put back; without {undone} there is no reference."
        return "These results do not say which method they are of."
    error, seconds = main.numbers["rel_error"], main.numbers["seconds"]
    told = f"{main.label}: "
    if error.mean is None:
        told += "no reference was computed, so its error is not known"
    else:
        told += f"rel_error {stat_text(error, 'rel_error', runs)} (doing nothing is 1, retraining 0)"
        told += ". It did harm: doing nothing is closer to retraining" if error.mean > 1 else ""
    told += f"; {stat_text(main.numbers['gradients'], 'gradients', runs)} gradients, {stat_text(seconds, 'seconds', runs)} s"
    reference = next((m for m in group.methods if m.method == "retrain"), None)
    if reference is not None and reference.numbers["seconds"].mean is not None:
        told += f" (retraining {stat_text(reference.numbers['seconds'], 'seconds', runs)} s)"
    return told + (f"; mean ± s.d. over {runs} runs." if runs > 1 else ".")


def asked_facts(group: Group) -> list[tuple[str, str]]:
    def request(key: str) -> str:
        return distinct(run.at("request", key) for run in group.runs)

    run = group.first
    facts = [
        ("Forgotten", request("what")),
        ("Samples", request("samples")),
        ("Steps that held them", f"{request('steps')} of {request('num_steps')}"),
        ("Counterfactual", request("counterfactual")),
    ]
    for key in ("samples", "split", "batches"):
        if (given := run.at("config", "forget", key)) is not None:
            text = str(given)
            facts.append((f"forget.{key}", text if len(text) <= 160 else f"{text[:160]}…"))
    facts.append(("Log", distinct(run.at("config", "log_dir") for run in group.runs)))
    return facts


def done_facts(group: Group) -> list[tuple[str, str]]:
    run, main = group.first, group.main
    facts = [
        ("Method", NONE if main is None else main.label),
        *(correction_facts(run) if run.at("baseline") is None else baseline_facts(group)),
        ("World size", distinct(run.at("world_size") for run in group.runs)),
        ("Engine", distinct(run.at("engine") for run in group.runs)),
        ("Reference", distinct(run.at("config", "reference") for run in group.runs)),
        ("‖v‖", distinct(run.at("v_norm") for run in group.runs)),
    ]
    if (replay := run.at("replay")) is not None:
        exact = "to the bit" if at(replay, "bit_exact_world_size") else "within rounding: another world size"
        facts.append(("Replay", f"{value_text(at(replay, 'verified_steps'))} steps verified, {exact}"))
    facts.append(("Run" if len(group.runs) == 1 else "Runs", ", ".join(_named(run) for run in group.runs)))
    return facts


def correction_facts(run: Run) -> list[tuple[str, str]]:
    """How a correction was computed."""
    head, K = run.at("config", "unlearn", "replay_head"), run.at("config", "unlearn", "K")
    return [
        ("Curvature", value_text(run.at("config", "unlearn", "hessian_mode")) if head != "all" else "none: replayed"),
        ("K", "all steps" if K is None else value_text(K)),
        ("Damping λ", value_text(run.at("config", "unlearn", "damping"))),
        ("Replayed head", {0: "none", "all": "all steps"}.get(head) or value_text(head) if _is_plain(head) else NONE),
        ("Units", units_text(run)),
    ]


def baseline_facts(group: Group) -> list[tuple[str, str]]:
    """How a baseline was trained."""

    def found(*keys: str) -> str:
        return distinct(run.at(*keys) for run in group.runs)

    start = group.first.at("baseline", "start")
    return [
        ("Started from", "the end of the log" if start is None else found("baseline", "start")),
        ("Fine-tuning", f"{found('baseline', 'steps')} steps, {found('baseline', 'samples')} samples"),
        ("Optimizer", f"{found('config', 'baseline', 'optimizer')}, at {found('config', 'baseline', 'learning_rate')}"),
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, str))


def _named(run: Run) -> str:
    training, data = run.seeds
    known = [f"{name} {seed}" for name, seed in (("seed", training), ("data seed", data)) if seed is not None]
    return run.folder + (f" ({', '.join(known)})" if known else "")


def units_text(run: Run) -> str:
    number_of, undone = run.at("n_units"), undone_units(run)
    if run.at("units") is None:
        return "joint: one vector for all" if number_of == 1 else f"joint, {value_text(number_of)} windows"
    out = f"; taken out: {undone}" if undone else ""
    return f"{value_text(number_of)} by {value_text(run.at('config', 'unlearn', 'units'))}{out}"


def undone_units(run: Run) -> str:
    """Units that were taken out, as text."""
    undone = run.at("units", "undone")
    return ", ".join(map(str, undone)) if isinstance(undone, list) else ""


def audit_facts(group: Group) -> list[tuple[str, str]]:
    """The audit records in numbers."""
    records = [record for run in group.runs for record in run.audit]

    def values(key: str) -> list[float]:
        return [x for x in (number(record.get(key)) for record in records) if x is not None]

    def span(key: str) -> str:
        found = values(key)
        if not found:
            return NONE
        low, high = f"{min(found):.4g}", f"{max(found):.4g}"
        return low if low == high else f"{low} to {high}, median {statistics.median(found):.4g}"

    stops = Counter(value_text(record.get("stopped_by")) for record in records)
    facts = [
        ("Records", f"{len(records):,}"),
        ("Modes", distinct(record.get("mode") for record in records)),
        ("Curvature products", f"{sum(values('hvp_calls')):,.0f}"),
        ("Steps propagated", span("K_used")),
        ("‖v‖ at the end", span("v_norm")),
        ("Largest growth in a step", span("growth_max")),
        ("Stopped by", ", ".join(f"{name} ({number_of:,})" for name, number_of in stops.items())),
    ]
    for key, name in (
        ("missed", "Left out by the basis"),
        ("head_error", "Recursion and replay apart at the end of the head"),
    ):
        if values(key):
            facts.append((name, span(key)))
    return facts
