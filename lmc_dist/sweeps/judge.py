"""A cell's model asked TOFU's questions; what the retrained one answers is kept for the other cells of the same request."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmc_dist.config import Config
from lmc_dist.data import load_rows
from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.compare import compare
from lmc_dist.evaluate.measure import Measured, measure
from lmc_dist.evaluate.model_folder import find_model
from lmc_dist.evaluate.run import RETRAIN, check_settings
from lmc_dist.evaluate.tofu_data import TofuQuestions, forgotten_ids, load_questions
from lmc_dist.runtime import Runtime, agreement
from lmc_dist.sweeps.shared import Trained, turn
from lmc_dist.trajectory.files import read_json, write_json
from lmc_dist.trajectory.store import TrajectoryLog


class Judge:
    """Evaluation of one cell; all ranks construct it together, before any long work.

    Raises:
        LmcError: Data that is not TOFU's, settings out of bounds, a library that is not installed.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        with agreement():
            if config.data.source != "tofu":
                raise LmcError("cells are judged by TOFU's questions: data.source tofu, or --cell.evaluate false")
            given = replace(config, evaluate=replace(config.evaluate, retrain="that of the cell"), json=None)
            check_settings(given)
            self.forgotten = forgotten_ids(config)
            rows = [row["id"] for row in load_rows(config.data)]
            load_questions(str(config.data.path), self.forgotten, rows)  # whatever is wrong with them, before training

    def ask(self, log_dir: Path) -> None:
        """Settles the questions: those on forgotten rows that training saw, and on others that it saw. Collective.

        Raises:
            LmcError: There are none.
        """
        with agreement():
            seen = {i for record in TrajectoryLog(log_dir).records() for i in record.sample_ids}
            self.questions: TofuQuestions = load_questions(
                str(self.config.data.path), seen.intersection(self.forgotten), seen, self.config.evaluate.limit
            )

    def retrain(self, retrained: Trained) -> Measured:
        """What the retrained model scores. Collective."""
        given = {
            key: x for key, x in asdict(self.config.evaluate).items() if key not in ("models", "retrain", "resamples")
        }
        path = retrained.folder / f"measured-{json_digest(given)[:12]}.json"
        with turn(path.with_suffix(""), path.exists, self.runtime) as is_mine:
            if is_mine:
                found = self._measure(retrained.model)
                with agreement():
                    if self.runtime.is_main:
                        write_json(path, plain(found))
        with agreement():
            return from_plain(read_json(path))

    def compare(self, model: Path | None, retrain: Measured) -> dict[str, Any]:
        """A model against the retrained one, as `lmc evaluate` does; None is the retrained one itself. Collective."""
        found = retrain if model is None else self._measure(model)
        with agreement():
            return compare(found, retrain, self.config.evaluate.resamples)

    def _measure(self, model: Path) -> Measured:
        with agreement():
            folder = find_model(model)
        return measure(folder, self.questions, self.config, self.runtime.device)


def plain(found: Measured) -> dict[str, Any]:
    """Arrays as lists."""

    def lists(value: Any) -> Any:
        return {key: lists(x) for key, x in value.items()} if isinstance(value, dict) else value.tolist()

    return {key: lists(value) for key, value in vars(found).items()}


def from_plain(value: dict[str, Any]) -> Measured:
    """What `plain` wrote; float64 in JSON is exact."""

    def arrays(x: Any) -> Any:
        return {key: arrays(part) for key, part in x.items()} if isinstance(x, dict) else np.array(x)

    return Measured(**{key: arrays(x) for key, x in value.items()})


def metrics(found: dict[str, Any], retrain: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What `compare` found, flat: metric → its value, the retrained model's, and the difference.

    Names are `forget.probability`, `auc.loss`, `privleak.loss`, `forget_quality.p_value`, `retain.probability`, …
    """
    flat: dict[str, dict[str, float | None]] = {}

    def add(name: str, value: float | None, reference: float | None) -> None:
        difference = None if value is None or reference is None else value - reference
        flat[name] = {"value": value, RETRAIN: reference, "distance": difference}

    for group in ("forget", "auc", "privleak"):
        for key, entry in found[group].items():
            add(f"{group}.{key}", entry["value"], retrain[group][key]["value"])
    for key, value in found["forget_quality"].items():
        add(f"forget_quality.{key}", value, retrain["forget_quality"][key])
    for part, entries in found["utility"].items():
        for key, entry in entries.items():
            add(f"{part}.{key}", entry["value"], retrain["utility"][part][key]["value"])
    if found["model_utility"] is not None and retrain["model_utility"] is not None:
        add("model_utility", found["model_utility"]["value"], retrain["model_utility"]["value"])
    return flat
