"""What a report says about a sweep: a section for each split, as text, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from lmc_dist.report import sweep_pictures
from lmc_dist.report.collect import Stat, at
from lmc_dist.report.content import Section
from lmc_dist.report.sweeps import EXACT, Cells, SweepRun
from lmc_dist.report.tables import NONE, Table, cost_form, distinct, value_text

FORGOTTEN = {
    "forget.probability": "Probability",
    "forget.truth_ratio": "Truth ratio",
    "forget.rouge_l": "ROUGE-L",
    "forget.extraction_strength": "Extraction",
    "forget.exact_memorization": "Memorised",
    "auc.loss": "AUC, loss",
    "auc.zlib": "AUC, zlib",
    "auc.min_k": "AUC, min-k",
    "auc.min_k_plus_plus": "AUC, min-k++",
}
STAYS = {
    "retain.probability": "Probability, retained",
    "retain.truth_ratio": "Truth ratio, retained",
    "real_authors.probability": "Probability, real authors",
    "world_facts.probability": "Probability, world facts",
    "model_utility": "Model utility",
}


def sweep_sections(sweep: SweepRun, key: str) -> list[Section]:
    """A section a split; the first also tells of the sweep as a whole."""
    return [_section(sweep, split, f"{key}-{i}", i == 0) for i, split in enumerate(sweep.splits)]


def _section(sweep: SweepRun, split: str, key: str, is_first: bool) -> Section:
    cells = sweep.cells(split)
    drawn = [sweep_pictures.error_against_cost(cells, f"{key}-cost"), sweep_pictures.trade_off(cells, f"{key}-trade")]
    tables = [methods_table(cells), forgotten_table(cells), stays_table(cells), failures_table(cells)]
    if is_first:
        tables.append(dropped_table(sweep))
    facts = {"What was asked": _asked(sweep, split), "What was done": _done(sweep, split)}
    settings = [(str(file.get("path")), _text(file.get("content"))) for file in sweep.files] if is_first else []
    return Section(
        f"Sweep: forgot {split}",
        summary(cells),
        facts,
        [table for table in tables if table is not None],
        [picture for picture in drawn if picture is not None],
        settings,
    )


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def summary(cells: Sequence[Cells]) -> str:
    """Who is closest to retraining, at what cost, and how many did harm."""
    judged = [c for c in cells if c.method not in EXACT and c.figure("rel_error").mean is not None]
    if not judged:
        return "No approximate method has an error against retraining here."
    best = min(judged, key=lambda c: c.figure("rel_error").mean or 0.0)
    retrain = next((c for c in cells if c.method == "retrain"), None)
    cost = retrain.figure("gradients").mean if retrain is not None else None
    told = f"Closest to retraining of {len(judged)} approximate methods: {_placed(best)}"
    cheaper = [c for c in judged if cost is not None and (c.figure("gradients").mean or 0.0) < cost]
    if cost is not None:
        told += f", where retraining takes {format(cost, cost_form(cost))}"
        if best not in cheaper and cheaper:
            told += f"; of those cheaper than that: {_placed(min(cheaper, key=lambda c: c.figure('rel_error').mean or 0.0))}"
    harmful = sum((c.figure("rel_error").mean or 0.0) > 1 for c in judged)
    return f"{told}. {harmful} of {len(judged)} did harm: doing nothing (1) is closer to retraining (0)."


def _placed(c: Cells) -> str:
    cost = c.figure("gradients").mean
    told = NONE if cost is None else format(cost, cost_form(cost))
    return f"{c.label}, rel_error {spread_text(c.figure('rel_error'))} at {told} gradients"


def _asked(sweep: SweepRun, split: str) -> list[tuple[str, str]]:
    rows = [row for row in sweep.rows if row["split"] == split]

    def asked(name: str) -> str:
        return distinct(x for row in rows if (x := at(row, "request", name)) is not None) or NONE

    failed = sum(row.get("failure") is not None for row in rows)
    return [
        ("Forgotten", split),
        ("Samples", asked("samples")),
        ("Steps that held them", f"{asked('steps')} of {asked('num_steps')}"),
        ("Counterfactual", asked("counterfactual")),
        ("Cells", f"{len(rows)}, {failed} failed" if failed else str(len(rows))),
        ("Seeds", ", ".join(map(str, sorted({row["seed"] for row in rows if isinstance(row.get("seed"), int)})))),
    ]


def _done(sweep: SweepRun, split: str) -> list[tuple[str, str]]:
    rows = [row for row in sweep.rows if row["split"] == split]

    def setting(*keys: str) -> str:
        return distinct(x for row in rows if (x := at(row, "settings", *keys)) is not None) or NONE

    return [
        ("Data", f"{setting('data', 'source')}, rows {setting('data', 'rows')}"),
        ("Model", setting("model", "path")),
        ("Optimizer", f"{setting('train', 'optimizer')}, η {setting('train', 'learning_rate')}"),
        ("Batch", setting("train", "batch_size")),
        ("Engine", setting("train", "engine")),
        ("World size", distinct(row["world_size"] for row in rows if row.get("world_size")) or NONE),
        ("Folder", sweep.folder),
    ]


# --- tables ------------------------------------------------------------------------------------------------------------


def methods_table(cells: Sequence[Cells]) -> Table:
    """Errors, losses and costs."""
    rows = []
    for c in cells:
        seeds = f"{len(c.good)} of {len(c.rows)}" if len(c.good) < len(c.rows) else str(len(c.rows))
        own = [spread_text(c.figure(key)) for key in ("rel_error", "loss_forget", "loss_retain", "v_norm")]
        costs = [
            NONE if (x := c.figure(key).mean) is None else format(x, cost_form(x)) for key in ("gradients", "seconds")
        ]
        rows.append([c.label, seeds, *own, *costs, _growth(c.figure("growth_max"))])
    header = [
        "Method",
        "Seeds",
        "rel_error",
        "Loss, forgotten",
        "Loss, retained",
        "‖v‖",
        "Gradients",
        "Seconds",
        "Growth",
    ]
    note = (
        "rel_error: distance of the weights to the retrained ones as a share of doing nothing: 0 is retraining, 1 doing "
        "nothing, above 1 harm. Gradients: of a training batch. Growth: the largest of ‖v‖ in a step. Mean ± standard deviation "
        "over seeds."
    )
    judged = [c for c in cells if c.method not in EXACT and c.figure("rel_error").mean is not None]
    best = min(judged, key=lambda c: c.figure("rel_error").mean or 0.0, default=None)
    return Table("Methods", header, rows, note, None if best is None else list(cells).index(best))


def forgotten_table(cells: Sequence[Cells]) -> Table | None:
    """How far what is said of forgotten questions is from what the retrained model says."""
    note = (
        "|difference to the retrained model| on the forgotten questions, mean ± s.d. over seeds: 0 is the aim. A model that "
        "knows less than the retrained one is as far off as one that knows more. KS: statistic of truth ratios against "
        "those of the retrained model; p: of that test (forget quality)."
    )
    columns: list[tuple[str, Callable[[Cells], Stat]]] = [
        (title, lambda c, name=name: c.distance(name))  # type: ignore[misc]
        for name, title in FORGOTTEN.items()
    ]
    columns += [
        ("KS", lambda c: c.value("forget_quality.ks_statistic")),
        ("p", lambda c: c.value("forget_quality.p_value")),
    ]
    return _metrics_table("Distance to the retrained model, on what was forgotten", columns, cells, note)


def stays_table(cells: Sequence[Cells]) -> Table | None:
    """What the models still know."""
    columns: list[tuple[str, Callable[[Cells], Stat]]] = [
        (title, lambda c, name=name: c.value(name))  # type: ignore[misc]
        for name, title in STAYS.items()
    ]
    return _metrics_table(
        "What stays", columns, cells, "Mean ± s.d. over seeds; the retrained model, last, is the aim."
    )


def _metrics_table(
    title: str, columns: list[tuple[str, Callable[[Cells], Stat]]], cells: Sequence[Cells], note: str
) -> Table | None:
    shown = [(name, of) for name, of in columns if any(of(c).mean is not None for c in cells)]
    if not shown:
        return None
    rows = [[c.label, *(spread_text(of(c)) for _, of in shown)] for c in cells]
    return Table(title, ["Method", *(name for name, _ in shown)], rows, note)


def failures_table(cells: Sequence[Cells]) -> Table | None:
    """Which cells failed, and why."""
    rows = []
    for c in cells:
        for row in c.rows:
            if row.get("failure") is not None:
                reason = value_text(at(row, "failure", "reason"))
                short = reason if len(reason) <= 300 else reason[:300] + "…"
                rows.append([c.label, value_text(row.get("seed")), short, value_text(at(row, "failure", "log"))])
    return Table("Cells that failed", ["Method", "Seed", "Reason", "Output"], rows) if rows else None


def dropped_table(sweep: SweepRun) -> Table | None:
    """Cells of the grid that would have done the same work as another."""
    counts: dict[str, int] = {}
    for entry in sweep.dropped:
        name = value_text(entry.get("same_as"))
        counts[name] = counts.get(name, 0) + 1
    if not counts:
        return None
    rows = [[name, str(number_of)] for name, number_of in counts.items()]
    return Table("Cells left out", ["The same work as", "Cells"], rows, "Settings that have no effect on the method.")


def spread_text(found: Stat) -> str:
    """Mean ± s.d. to two digits of the s.d., four of the mean where there is none, six decimals at most."""
    if found.mean is None:
        return NONE
    if not found.sd:
        return f"{found.mean:.4g}" + ("" if found.sd is None else " ± 0")
    decimals = min(max(1 - math.floor(math.log10(found.sd)), 0), 6)
    return f"{found.mean:,.{decimals}f} ± {found.sd:,.{decimals}f}"


def _growth(found: Stat) -> str:
    return NONE if found.mean is None else f"× {found.mean:.3f}"
