"""What a sweep found: rows of cells → means over seeds, as text, JSON and CSV.

On what was forgotten the aim is the retrained model, so metrics of it are shown as distances, |value − that of the retrain|:
0 is the aim, and neither more nor less is better.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc_dist.log_commands.text import table
from lmc_dist.trajectory.files import write_atomic, write_json

if TYPE_CHECKING:
    from lmc_dist.sweeps.plan import SweepPlan

JSON, CSV, MARKDOWN = "sweep.json", "sweep.csv", "sweep.md"
ORDER = ("do_nothing", "retain", "ga", "graddiff", "npo", "tim", "lmcleaner", "replay", "retrain")
_FIGURES = ("rel_error", "loss_forget", "loss_retain", "gradients", "seconds", "v_norm", "growth_max")
_KEYS = (
    "method",
    "variant",
    "label",
    "split",
    "seed",
    "data_seed",
    "model",
    "hessian_mode",
    "K",
    "damping",
    "replay_head",
)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with half the width of its 95 % t interval; None where fewer than one or two seeds have it."""

    value: float | None
    half: float | None
    count: int


def mean_of(values: Iterable[float | None]) -> Mean:
    """Of the values that are known (Student's t: seeds are few)."""
    known = [x for x in values if x is not None and math.isfinite(x)]
    if len(known) < 2:
        return Mean(known[0] if known else None, None, len(known))
    from scipy.stats import t

    width = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    return Mean(statistics.fmean(known), width, len(known))


def distance_of(row: dict[str, Any], metric: str) -> float | None:
    """|value − that of the retrained model|."""
    found = (row["metrics"].get(metric) or {}).get("distance")
    return None if found is None else abs(found)


def value_of(row: dict[str, Any], metric: str) -> float | None:
    return (row["metrics"].get(metric) or {}).get("value")


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(split, what is the same for all seeds) → rows, from doing nothing to retraining."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["split"], ORDER.index(row["method"]))):
        several = f" ({row['model']})" if len({r["model"] for r in rows}) > 1 else ""
        found.setdefault((row["split"], row["label"] + several), []).append(row)
    return found


NOTE = "Mean ± half of a 95 % t interval over seeds. Δ: |difference to the retrained model|, whose row, 0, is the aim."
_METRICS = {
    "Δ probability": "forget.probability",
    "Δ truth ratio": "forget.truth_ratio",
    "Δ AUC, loss": "auc.loss",
    "Δ AUC, min-k": "auc.min_k",
    "Δ probability, retained": "retain.probability",
}


def summary_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Title and one row a split and method, as text: errors in weights, distances in what is said, cost."""
    found = [["", "seeds", "rel_error", *_METRICS, "KS statistic", "gradients", "seconds"]]
    for (split, label), same in grouped(rows).items():
        good = [row for row in same if row["failure"] is None and row["rel_error"] is not None]
        count = f"{len(good)} of {len(same)}" if len(good) < len(same) else str(len(same))
        distances = [mean_of(distance_of(row, metric) for row in good) for metric in _METRICS.values()]
        ks = mean_of(value_of(row, "forget_quality.ks_statistic") for row in good)
        costs = [mean_of(row[key] for row in good) for key in ("gradients", "seconds")]
        cells = [told(mean_of(row["rel_error"] for row in good)), *(told(x, ".4f") for x in (*distances, ks))]
        found.append([f"{split}: {label}", count, *cells, *(told(x, ".1f", with_half=False) for x in costs)])
    return found


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table on the terminal."""
    return "\n".join([*table(summary_rows(rows)), NOTE])


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same for a page."""
    title, *others = summary_rows(rows)
    lines = [title, ["---", *("---:" for _ in title[1:])], *others]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", NOTE, ""])


def told(found: Mean, form: str = ".3f", with_half: bool = True) -> str:
    """`0.123 ± 0.045`."""
    if found.value is None:
        return "-"
    half = "" if found.half is None or not with_half else f" ± {format(found.half, form)}"
    return format(found.value, form) + half


def failures_text(failed: Sequence[dict[str, Any]]) -> str:
    """The cells that failed, why, and where their output is."""
    lines = [f"failed: {len(failed)} of the cells; the same command runs them again"]
    for row in failed:
        lines.append(
            f"  {row['name']}: {row['failure']['reason'].splitlines()[0]}\n    output: {row['failure']['log']}"
        )
    return "\n".join(lines)


def write_summary(folder: Path, plan: SweepPlan, rows: Sequence[dict[str, Any]]) -> None:
    """Writes sweep.json, sweep.csv and sweep.md. Local."""
    dropped = [{"parameters": parameters, "same_as": name} for parameters, name in plan.dropped]
    files = [{"path": str(file.path), "content": file.content} for file in plan.files]
    write_json(folder / JSON, {"files": files, "cells": list(rows), "dropped": dropped})
    write_atomic(folder / CSV, comma_separated(rows))
    write_atomic(folder / MARKDOWN, markdown_table(rows))


def comma_separated(rows: Sequence[dict[str, Any]]) -> str:
    """One line a cell: what it is, its figures, every metric and its distance to the retrained model."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    metrics = [f"{name}{suffix}" for name in names for suffix in ("", " − retrain")]
    writer.writerow([*_KEYS, *_FIGURES, *metrics, "failure"])
    for row in rows:
        found = [(row["metrics"].get(name) or {}).get(key) for name in names for key in ("value", "distance")]
        values = [*(row.get(key) for key in (*_KEYS, *_FIGURES)), *found, (row["failure"] or {}).get("reason")]
        writer.writerow(["" if x is None else repr(x) if isinstance(x, float) else x for x in values])
    return out.getvalue()
