"""Finished unlearning runs, read and put together: folders → runs → groups of runs that differ in their seeds alone.

The files may come from anywhere. What the report cannot do without is checked here; a number that is absent, null or not
finite becomes None.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.audit.hidden import is_hidden
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.files import read_json

RESULT, AUDIT = "result.json", Path("audit") / "audit_records.json"
EVALUATION, LAYERS = "evaluation.json", "layers.json"
LARGEST = 1e100
NUMBERS = ("rel_error", "loss_forget", "loss_retain", "gradients", "seconds")

# Settings in which runs of one group may differ: seeds, places, and what has no effect on a result.
_SEEDS = (("train", "seed"), ("data", "seed"))
_PLACES = (
    "log_dir",
    "model_dir",
    "output_dir",
    "json",
    "plot",
    "progress",
    "overwrite",
    "resume",
    "report",
    "evaluate",
    "audit",
)


@dataclass(frozen=True)
class Run:
    """A finished run as its folder holds it.

    Attributes:
        folder: As it was given.
        name: Its last part, where no other run's is the same; else all of it.
        result: result.json.
        audit: audit_records.json.
        evaluation: Model → metric → (value, low, high); empty where the folder holds none.
        layers: Rows of layers.json (`evaluate.layers`); empty likewise.
    """

    folder: str
    name: str
    result: dict[str, Any]
    audit: list[dict[str, Any]]
    evaluation: dict[str, dict[str, tuple[float | None, float | None, float | None]]]
    layers: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The methods' rows, from doing nothing to retraining."""
        return self.result["rows"]

    def at(self, *keys: str) -> Any:
        """A value of result.json, None where there is none."""
        return at(self.result, *keys)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of training and of the data."""
        found = (self.at("config", *keys) for keys in _SEEDS)
        return tuple(seed if isinstance(seed, int) else None for seed in found)


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation over runs; None where no run has the number, or fewer than two have."""

    mean: float | None
    sd: float | None
    count: int


@dataclass(frozen=True)
class MethodStats:
    """A method over the runs of a group: its numbers by name (`NUMBERS`)."""

    method: str
    label: str
    numbers: dict[str, Stat]


@dataclass(frozen=True)
class Group:
    """Runs with the same settings, seeds and places aside."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def methods(self) -> list[MethodStats]:
        """Every method of any run, in the order of the rows; retraining, if any run has it, comes last."""
        labels = {row["method"]: str(row.get("label") or row["method"]) for run in self.runs for row in run.rows}
        order = sorted(labels, key=lambda name: name == "retrain")
        found = []
        for name in order:
            rows = [row for run in self.runs for row in run.rows if row["method"] == name]
            numbers = {key: stat(number(row.get(key)) for row in rows) for key in NUMBERS}
            found.append(MethodStats(name, labels[name], numbers))
        return found

    @property
    def main(self) -> MethodStats | None:
        """The method that was asked for: the one whose time result.json repeats."""
        seconds = number(self.first.at("seconds_unlearn"))
        names = [row["method"] for row in self.first.rows if seconds is not None and row.get("seconds") == seconds]
        return next((m for m in self.methods if m.method in names), None)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in the folders. Local.

    Raises:
        LmcError: No folder, one twice, or one that holds no finished run; it is named.
    """
    if not folders:
        raise LmcError("say which runs to report on: lmc report RUN [RUN …], each the output_dir of an unlearning run")
    places = Counter(Path(folder).resolve() for folder in folders)
    if twice := [folder for folder in folders if places[Path(folder).resolve()] > 1]:
        raise LmcError(f"{twice[0]} is given twice: runs of a group would count as independent")
    names = {folder: Path(folder).name for folder in folders}
    times = Counter(names.values())
    return [read_run(Path(folder), name if name and times[name] == 1 else folder) for folder, name in names.items()]


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. Local.

    Raises:
        LmcError: It holds no finished run, or files that are not what a run leaves.
    """
    if not (folder / RESULT).is_file():
        raise LmcError(f"{folder} holds no finished unlearning run: there is no {RESULT} in it")
    result, audit = read_file(folder / RESULT), read_file(folder / AUDIT)
    if not isinstance(result, dict) or not _are_rows(result.get("rows")):
        raise LmcError(f"{folder / RESULT} is not of an unlearning run: it lacks the rows of methods")
    if not all(isinstance(row.get("method"), str) for row in result["rows"]):
        raise LmcError(f"{folder / RESULT} is damaged: a row does not name its method")
    if not _are_rows(audit):
        raise LmcError(f"{folder / AUDIT} is damaged: it must be a list of records")
    layers = read_file(folder / LAYERS) if (folder / LAYERS).is_file() else {"layers": []}
    if not isinstance(layers, dict) or not _are_rows(layers.get("layers")):
        raise LmcError(f"{folder / LAYERS} is damaged: it must hold a list of layers")
    evaluation = read_file(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    if not isinstance(evaluation, dict):
        raise LmcError(f"{folder / EVALUATION} is damaged: it must be an object")
    return Run(str(folder), name, result, audit, metrics(evaluation), layers["layers"])


def read_file(path: Path) -> Any:
    """JSON of a file.

    Raises:
        LmcError: It is missing, or no JSON.
    """
    try:
        return read_json(path)
    except LmcError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise LmcError(f"{path} cannot be read: {type(error).__name__}") from None


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def metrics(evaluation: dict[str, Any]) -> dict[str, dict[str, tuple[float | None, float | None, float | None]]]:
    """Model → metric → (value, low, high), from the file that `lmc evaluate` writes, or from {models: {name: …}}.

    A metric is an object with `value`, or a plain number, wherever it lies; its name is the way there.
    """
    models = evaluation.get("results", evaluation.get("models"))
    found: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = {}
    for model, tree in (models if isinstance(models, dict) else {}).items():
        leaves: dict[str, tuple[float | None, float | None, float | None]] = {}
        _leaves(tree, (), leaves)
        if leaves:
            found[model] = leaves
    return found


def _leaves(
    tree: Any, path: tuple[str, ...], found: dict[str, tuple[float | None, float | None, float | None]]
) -> None:
    if isinstance(tree, dict):
        if path and "value" in tree:
            found[" · ".join(path)] = number(tree["value"]), number(tree.get("low")), number(tree.get("high"))
            tree = {key: part for key, part in tree.items() if key not in ("value", "low", "high")}
        for key, part in tree.items():
            _leaves(part, (*path, str(key)), found)
    elif path and number(tree) is not None:
        found[" · ".join(path)] = number(tree), None, None


def number(value: Any) -> float | None:
    """A number of a size that sums and pictures can be made of, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < LARGEST else None


def stat(values: Iterable[float | None]) -> Stat:
    """Mean and standard deviation of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return Stat(None, None, 0)
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def at(tree: Any, *keys: str) -> Any:
    """tree[key][key]…, None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs with equal settings together, in the order they were given. Local.

    Two logs of the same seeds differ in something that the results do not say, so their runs are not put together. Requests
    are compared by their digests where all runs have the same salt, else by what is said of them in words.
    """
    found: dict[str, list[Run]] = {}
    is_one_salt = len({run.at("request", "salt") for run in runs}) == 1
    for run in runs:
        found.setdefault(_key(run, is_one_salt), []).append(run)
    groups = []
    for members in found.values():
        logs = {run.seeds: run.at("log_fingerprint") for run in members}
        is_explained = all(run.at("log_fingerprint") == logs[run.seeds] for run in members)
        groups += [Group(tuple(members))] if is_explained else [Group((run,)) for run in members]
    return groups


def _key(run: Run, is_one_salt: bool) -> str:
    """What the runs of a group have in common, as text."""
    config = run.at("config")
    if not isinstance(config, dict):
        return run.folder
    settings = {key: value for key, value in config.items() if key not in _PLACES}
    for section, name in _SEEDS:
        if isinstance(settings.get(section), dict):
            settings[section] = {key: value for key, value in settings[section].items() if key != name}
    forget = settings.get("forget")
    if isinstance(forget, dict) and is_hidden(forget) and not is_one_salt:
        settings["forget"] = [at(run.at("request"), key) for key in ("what", "samples", "counterfactual")]
    common = [settings, *(run.at(key) for key in ("world_size", "engine")), at(run.at("units"), "undone")]
    return json.dumps(common, sort_keys=True)
