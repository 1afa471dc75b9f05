"""A cell of a sweep: one method on one training run and one request, judged against the retrain, left as one row.

FOLDER/cells/NAME/row.json      settings, figures, metrics, failure
FOLDER/cells/NAME/run/          what `lmc unlearn` or `lmc baseline` leaves, without the weights; evaluation.json
FOLDER/cells/NAME/before/       the same of the correction, where fine-tuning followed
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.errors import LmcError, Stopped
from lmc_dist.runtime import Runtime, agreement
from lmc_dist.sweeps.identity import BASELINES, Identity, identify
from lmc_dist.sweeps.judge import Judge, metrics
from lmc_dist.sweeps.shared import Trained, retrained, trained, turn
from lmc_dist.tracking import Tracker, check_tracking, tracked
from lmc_dist.trajectory.files import read_json, write_json
from lmc_dist.trajectory.logger import package_versions

ROW, EVALUATION = "row.json", "evaluation.json"
FIGURES = ("rel_error", "loss_forget", "loss_retain", "gradients", "seconds", "v_norm", "growth_max")


def row_path(identity: Identity) -> Path:
    return Path(identity.config.cell.folder) / "cells" / identity.name / ROW


def stored_row(identity: Identity) -> dict[str, Any] | None:
    """The row that a cell of the same settings left, failed or not; None where there is none. Local."""
    path = row_path(identity)
    if not path.exists():
        return None
    found = read_json(path)
    return found if isinstance(found, dict) and found.get("digest") == identity.digest else None


def empty_row(identity: Identity) -> dict[str, Any]:
    """A row without figures."""
    unlearn, cell = identity.config.unlearn, identity.config.cell
    told = identity.method == "lmcleaner"
    return {
        "name": identity.name,
        "digest": identity.digest,
        "method": identity.method,
        "variant": identity.variant,
        "label": identity.label,
        "split": identity.split,
        "seed": identity.seed,
        "data_seed": identity.data_seed,
        "model": identity.config.model.path,
        "hessian_mode": unlearn.hessian_mode if told else None,
        "K": ("all" if unlearn.K is None else unlearn.K) if told else None,
        "damping": unlearn.damping if told else None,
        "replay_head": unlearn.replay_head if told else None,
        "post_epochs": cell.post_epochs,
        **dict.fromkeys(FIGURES),
        "metrics": {},
        "failure": None,
        "settings": identity.settings,
    }


def cell(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Carries out a cell, unless it is finished or another job is at it; returns its row. Collective.

    Raises:
        LmcError: On every rank: settings that do not fit, or what the method stopped with; the row says so too.
    """
    with agreement():
        identity = identify(config)
        check_tracking(config.wandb)
    path, started = row_path(identity), time.perf_counter()

    def is_finished() -> bool:
        row = stored_row(identity)
        return row is not None and row["failure"] is None

    with turn(path.parent, is_finished, runtime) as is_mine:
        if is_mine:
            row = empty_row(identity) | {"world_size": runtime.world_size, "versions": package_versions()}
            with ExitStack() as stack:
                with agreement():
                    named = replace(config.wandb, name=config.wandb.name or identity.name)
                    of_cell = replace(identity.config, wandb=named)
                    tracker = stack.enter_context(tracked(of_cell, runtime.is_main, config.cell.folder))
                failure: LmcError | None = None
                try:
                    row |= _Work(identity, path.parent, runtime, tracker).figures()
                except Stopped:  # as was asked; it is to be done again
                    raise
                except LmcError as error:  # the same on all ranks
                    failure = error
                    row["failure"] = {"reason": str(error)[:2000], "log": None}
                with agreement():
                    if runtime.is_main:
                        write_json(path, row | {"seconds_cell": time.perf_counter() - started})
                shown = {key: row[key] for key in (*FIGURES, "method", "label", "split", "seed")}
                tracker.summary({**shown, "metrics": row["metrics"]})
                if failure is not None:
                    raise failure
    with agreement():
        return read_json(path)


@dataclass(frozen=True)
class _Work:
    """What is done for a cell.

    Attributes:
        identity: The cell.
        folder: Its own.
        runtime: This rank.
        tracker: Of the cell.
    """

    identity: Identity
    folder: Path
    runtime: Runtime
    tracker: Tracker

    def figures(self) -> dict[str, Any]:
        """Its figures and metrics. Collective."""
        config, method = self.identity.config, self.identity.method
        judge = Judge(config, self.runtime) if config.cell.evaluate else None
        base, reference = trained(config, self.runtime), retrained(config, self.runtime)
        if judge is not None:
            judge.ask(base.log)
        asked = replace(
            config,
            log_dir=str(base.log),
            output_dir=str(self.folder / "run"),
            reference=str(reference.log),
            overwrite=True,
        )
        with agreement():
            if self.runtime.is_main:  # what an attempt that was cut off left behind
                for part in ("run", "before"):
                    shutil.rmtree(self.folder / part, ignore_errors=True)
        model: Path | None
        if method in ("do_nothing", "retrain"):
            found = self._end(asked, method)
            model = base.model if method == "do_nothing" else None
        elif method in BASELINES:
            found, model = self._tuned(asked, method), self.folder / "run"
        else:
            found, model = self._corrected(asked), self.folder / "run"
        if judge is not None:
            found["metrics"] = self._judged(judge, reference, model)
        if not config.cell.keep_models:
            with agreement():
                if self.runtime.is_main:
                    for weights in ("model", "correction"):
                        for part in ("run", "before"):
                            shutil.rmtree(self.folder / part / weights, ignore_errors=True)
        return found

    def _end(self, asked: Config, method: str) -> dict[str, Any]:
        """Of doing nothing, or of retraining."""
        from lmc_dist.unlearn.asked import AskedRun
        from lmc_dist.unlearn.reference import retrained as read_retrained

        run = AskedRun(asked, self.runtime)
        theta = run.log.theta(run.log.num_steps)
        reference, seconds = read_retrained(run)
        weights, cost = theta, (0.0, 0.0)
        if method == "retrain":
            weights, cost = reference, (float(sum(record.applied for record in run.log.records())), seconds or 0.0)
        row = run.row(method, self.identity.label, weights, *cost, theta, reference)
        return {**{key: row.get(key) for key in FIGURES}, "v_norm": (weights - theta).norm(), "request": run.asked()}

    def _corrected(self, asked: Config) -> dict[str, Any]:
        """Of a correction, and of what follows it."""
        from lmc_dist.unlearn.run import unlearn

        epochs = asked.cell.post_epochs
        if not epochs:
            return self._figures_of(unlearn(asked, self.runtime, self.tracker, ends=False))
        before = self.folder / "before"
        unlearn(replace(asked, output_dir=str(before)), self.runtime, self.tracker, ends=False)
        tuning = replace(asked.baseline, start=str(before), epochs=epochs)
        return self._tuned(replace(asked, baseline=tuning), "retain")

    def _tuned(self, asked: Config, method: Any) -> dict[str, Any]:
        """Of a baseline."""
        from lmc_dist.baselines.run import baseline

        tuning = replace(asked, baseline=replace(asked.baseline, method=method))
        return self._figures_of(baseline(tuning, self.runtime, self.tracker, ends=False))

    def _figures_of(self, result: dict[str, Any]) -> dict[str, Any]:
        """The figures of a finished run. Collective."""
        (row,) = result["rows"]
        with agreement():
            audit = read_json(self.folder / "run" / "audit" / "audit_records.json")
        growths = [record["growth_max"] for record in audit if record["growth_max"] is not None]
        found = {key: row.get(key) for key in FIGURES}
        own = {"v_norm": result["v_norm"], "growth_max": max(growths, default=None)}
        return {**found, **own, "request": result["request"]}

    def _judged(self, judge: Judge, reference: Trained, model: Path | None) -> dict[str, Any]:
        """Metrics beside those of the retrained model. Collective."""
        retrain = judge.retrain(reference)
        found, own = judge.compare(model, retrain), judge.compare(None, retrain)
        with agreement():
            if self.runtime.is_main and (self.folder / "run").is_dir():
                results = {"retrain": own, self.identity.method: found}
                write_json(self.folder / "run" / EVALUATION, {"results": results})
        return metrics(found, own)


def cell_line(row: dict[str, Any]) -> str:
    """A cell in one line."""
    if row["failure"] is not None:
        return f"{row['name']}: failed: {row['failure']['reason']}"
    error = "-" if row["rel_error"] is None else f"{row['rel_error']:.3f}"
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
    return f"{row['split']}, seed {row['seed']}, {row['label']}: rel_error {error}, {row['gradients']:.1f} gradients, {seconds} s"
