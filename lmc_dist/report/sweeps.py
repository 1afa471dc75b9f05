"""Folders of sweeps, read for the report: sweep.json → rows of cells, put together by split and method.

The file may come from anywhere: what is not a number of a usual size becomes None, what is no row is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.report.collect import Stat, at, number, read_file, stat

SWEEP = "sweep.json"
FIGURES = ("rel_error", "loss_forget", "loss_retain", "gradients", "seconds", "v_norm", "growth_max")
ORDER = ("do_nothing", "retain", "ga", "graddiff", "npo", "tim", "lmcleaner", "replay", "retrain")
EXACT = ("do_nothing", "replay", "retrain")  # what is known beforehand
FAMILIES = {
    "do_nothing": "do nothing",
    "retain": "retain fine-tuning",
    "ga": "gradient ascent",
    "graddiff": "GradDiff",
    "npo": "NPO",
    "tim": "TIM (first order)",
    "replay": "exact replay",
    "retrain": "retrain",
}


@dataclass(frozen=True)
class Cells:
    """The cells of one method and split over seeds.

    Attributes:
        method: `cell.method`.
        label: In tables.
        rows: Of all of them.
    """

    method: str
    label: str
    rows: tuple[dict[str, Any], ...]

    @property
    def good(self) -> list[dict[str, Any]]:
        """Those that did not fail."""
        return [row for row in self.rows if row.get("failure") is None]

    @property
    def family(self) -> str:
        """What pictures have one sign for."""
        mode = self.rows[0].get("hessian_mode")
        return f"LMCleaner, {mode}" if self.method == "lmcleaner" else FAMILIES[self.method]

    @property
    def has_head(self) -> bool:
        return self.rows[0].get("replay_head") not in (0, None)

    def figure(self, key: str) -> Stat:
        return stat(number(row.get(key)) for row in self.good)

    def value(self, metric: str) -> Stat:
        return stat(number(at(row, "metrics", metric, "value")) for row in self.good)

    def distance(self, metric: str) -> Stat:
        """|value − that of the retrained model|."""
        found = (number(at(row, "metrics", metric, "distance")) for row in self.good)
        return stat(None if x is None else abs(x) for x in found)

    def has(self, *keys: str) -> bool:
        return all(self.figure(key).mean is not None for key in keys)


@dataclass(frozen=True)
class SweepRun:
    """A sweep as its folder holds it.

    Attributes:
        folder: As it was given.
        rows: Of all cells.
        files: Its sweep files, {path, content}.
        dropped: Cells that were left out as the same work as others.
    """

    folder: str
    rows: list[dict[str, Any]]
    files: list[dict[str, Any]]
    dropped: list[dict[str, Any]]

    @property
    def splits(self) -> list[str]:
        return sorted({row["split"] for row in self.rows})

    def cells(self, split: str) -> list[Cells]:
        """The methods of a split, from doing nothing to retraining."""
        models = {str(row.get("model")) for row in self.rows}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["split"] == split:
                more = f" ({row.get('model')})" if len(models) > 1 else ""
                found.setdefault((row["method"], row["label"] + more), []).append(row)
        ordered = sorted(found, key=lambda key: ORDER.index(key[0]))
        return [Cells(method, label, tuple(found[method, label])) for method, label in ordered]


def is_sweep(folder: str) -> bool:
    return (Path(folder) / SWEEP).is_file()


def read_sweeps(folders: Iterable[str]) -> list[SweepRun]:
    """The sweeps in folders. Local.

    Raises:
        LmcError: A file that is not what a sweep leaves; it is named.
    """
    return [_read(folder) for folder in folders]


def _read(folder: str) -> SweepRun:
    path = Path(folder) / SWEEP
    found = read_file(path)
    rows = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise LmcError(f"{path} is not of a sweep: it lacks the rows of cells")
    return SweepRun(folder, rows, *(_objects(found.get(key)) for key in ("files", "dropped")))


def _is_row(row: Any) -> bool:
    named = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "method", "label", "split"))
    return named and row["method"] in ORDER


def _objects(value: Any) -> list[dict[str, Any]]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []
