"""The report's tables: groups of runs → cells of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmc_dist.report.collect import Group, Run, Stat, number

if TYPE_CHECKING:
    from lmc_dist.report.sweeps import SweepRun

MOST_ROWS = 20  # of a table of units; a request may have thousands
NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names its rows.

    Attributes:
        title: Above it.
        header: Names of the columns.
        rows: Cells, as many as the header has.
        note: Below it, or empty.
        marked: Index of the row to look at first.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    marked: int | None = None


# --- numbers -----------------------------------------------------------------------------------------------------------


def error_form(value: float) -> str:
    return ".3g" if value < 0.1 else ".3f"


def loss_form(value: float) -> str:
    return ".4f"


def cost_form(value: float) -> str:
    return ",.2f" if value < 10 else ",.1f"


FORMS = {
    "rel_error": error_form,
    "loss_forget": loss_form,
    "loss_retain": loss_form,
    "gradients": cost_form,
    "seconds": cost_form,
}


def stat_text(found: Stat, key: str, runs: int = 1) -> str:
    """`0.231 ± 0.012`; how many runs have it, where not all do."""
    if found.mean is None:
        return NONE
    form = FORMS[key](found.mean)
    text = format(found.mean, form) + ("" if found.sd is None else f" ± {format(found.sd, form)}")
    return text if found.count == runs else f"{text} ({found.count} of {runs} runs)"


def value_text(value: Any) -> str:
    """A number in four digits, or whatever it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else "too large"
    return (NONE if number(value) is None else f"{value:.4g}") if isinstance(value, float) else str(value)


def distinct(values: Iterable[Any]) -> str:
    """The different values, in order."""
    return ", ".join(dict.fromkeys(value_text(value) for value in values))


# --- tables ------------------------------------------------------------------------------------------------------------


def methods_table(group: Group) -> Table | None:
    """The methods between doing nothing and retraining."""
    methods, runs, main = group.methods, len(group.runs), group.main
    if not methods:
        return None
    header = ["Method", "rel_error", "Loss, forgotten", "Loss, retained", "Gradients", "Seconds"]
    rows = [[m.label, *(stat_text(found, key, runs) for key, found in m.numbers.items())] for m in methods]
    note = "rel_error: distance to the reference as a share of doing nothing. Doing nothing is 1, retraining 0."
    if runs > 1:
        note += f" Mean ± standard deviation over {runs} runs."
    marked = next((i for i, m in enumerate(methods) if main is not None and m.method == main.method), None)
    return Table("Methods", header, rows, note, marked)


def growth_ends(group: Group) -> list[tuple[str, float | None, float | None]]:
    """(unit, ‖v‖ at the start, at the end) of the records that are shown."""
    return [(name, number(r.get("v0_norm")), number(r.get("v_norm"))) for name, r in _shown(group)]


def _shown(group: Group) -> list[tuple[str, dict[str, Any]]]:
    """(name, record) of the units with the largest ‖v‖ at the end, in their own order."""
    several = len(group.runs) > 1
    found = [
        (f"{run.name}: {value_text(r.get('unit'))}" if several else value_text(r.get("unit")), r)
        for run in group.runs
        for r in run.audit
    ]
    largest = sorted(range(len(found)), key=lambda i: -(number(found[i][1].get("v_norm")) or 0.0))[:MOST_ROWS]
    return [found[i] for i in sorted(largest)]


def audit_table(group: Group) -> Table | None:
    """‖v‖ of each unit or window from its first source to the end."""
    shown, total = _shown(group), sum(len(run.audit) for run in group.runs)
    if not shown:
        return None
    header = [
        "Unit",
        "First step",
        "Steps",
        "‖v‖ at the start",
        "‖v‖ at the end",
        "Growth",
        "Largest step",
        "Stopped by",
    ]
    rows = []
    for name, record in shown:
        start, end = number(record.get("v0_norm")), number(record.get("v_norm"))
        grown = NONE if not start or end is None else f"× {end / start:.3g}"
        cells = [value_text(record.get(key)) for key in ("tz", "K_used", "v0_norm", "v_norm")]
        largest = number(record.get("growth_max"))
        stopped = value_text(record.get("stopped_by"))
        rows.append([name, *cells, grown, NONE if largest is None else f"× {largest:.4g}", stopped])
    note = f"The {len(shown)} of {total:,} records with the largest ‖v‖." if total > len(shown) else ""
    return Table("Growth of the correction", header, rows, note)


def layer_numbers(row: dict[str, Any]) -> tuple[str, float | None, float | None]:
    return value_text(row.get("name")), number(row.get("v_norm")), number(row.get("distance"))


def layers_table(run: Run, runs: int) -> Table | None:
    """The parameters that are farthest from the reference, or moved most where there is none."""
    found = [(*layer_numbers(row), number(row.get("weight_norm"))) for row in run.layers]
    if not found:
        return None
    order = sorted(range(len(found)), key=lambda i: (-(found[i][2] or 0.0), -(found[i][1] or 0.0)))[:MOST_ROWS]
    rows = []
    for name, v, distance, weights in (found[i] for i in order):
        share = None if v is None or not weights else v / weights
        rows.append(
            [
                name,
                value_text(v),
                value_text(share),
                NONE if distance is None else format(distance, error_form(distance)),
            ]
        )
    note = f"{len(rows)} of {len(found):,} parameters, farthest first; 1 is as far as doing nothing."
    title = "By parameter" if runs == 1 else f"By parameter, {run.name}"
    return Table(title, ["Parameter", "‖v‖", "‖v‖ / ‖θ‖", "Distance to the reference"], rows, note)


def evaluation_tables(group: Group) -> list[Table]:
    """What the models do when asked, one table a run."""
    tables = []
    for run in group.runs:
        if not run.evaluation:
            continue
        names = dict.fromkeys(name for leaves in run.evaluation.values() for name in leaves)
        rows = [[name, *(_interval(leaves.get(name)) for leaves in run.evaluation.values())] for name in names]
        title = "Evaluation" if len(group.runs) == 1 else f"Evaluation of {run.name}"
        tables.append(Table(title, ["Metric", *map(str, run.evaluation)], rows, "Value [interval]."))
    return tables


def _interval(found: tuple[float | None, float | None, float | None] | None) -> str:
    if found is None or found[0] is None:
        return NONE
    value, low, high = (NONE if x is None else f"{x:.4g}" for x in found)
    return value if found[1] is None and found[2] is None else f"{value} [{low}, {high}]"


def overview(groups: Sequence[Group]) -> Table | None:
    """One row a group, where there are several."""
    if len(groups) < 2:
        return None
    rows = []
    for i, group in enumerate(groups, 1):
        main, runs = group.main, len(group.runs)
        cells = (
            [NONE] * 3
            if main is None
            else [stat_text(main.numbers[k], k, runs) for k in ("rel_error", "gradients", "seconds")]
        )
        what = distinct(run.at("request", "what") for run in group.runs)
        rows.append([f"{i}. {NONE if main is None else main.label}", what, f"{runs}", *cells])
    return Table("Overview", ["Method", "Forgotten", "Runs", "rel_error", "Gradients", "Seconds"], rows)


def environment(runs: Sequence[Run], sweeps: Sequence[SweepRun] = ()) -> list[Table]:
    """Versions of all runs and cells, and what the runs' logs and models are recognised by."""
    found = [run.at("versions") for run in runs] + [row.get("versions") for sweep in sweeps for row in sweep.rows]
    found = [one for one in found if isinstance(one, dict)]
    names = dict.fromkeys(name for one in found for name in one)
    versions = [[str(name), distinct(one.get(name) for one in found)] for name in names]
    prints = [[run.folder, *(value_text(run.at(key)) for key in ("log_fingerprint", "model_checksum"))] for run in runs]
    tables = [Table("Fingerprints", ["Run", "Log", "Model"], prints)] if runs else []
    return [Table("Versions", ["Package", "Version"], versions), *tables] if versions else tables
