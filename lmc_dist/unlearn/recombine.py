"""Units of a finished run, taken out of its correction or put back, without computing anything anew.

What a unit contributes is its share of the joint request's correction (docs/method.md §3): taken out, the others keep the
propagator of the whole request, which differs from that of a smaller request in second order.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmc_dist.audit.run_record import append_run, check_audit, last_run, run_salt, take_over
from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import mean_loss
from lmc_dist.logged_run import open_logged_run
from lmc_dist.runtime import Runtime, agreement, promoted
from lmc_dist.trajectory.files import read_json
from lmc_dist.unlearn.results import write_results
from lmc_dist.unlearn.unit_sweeps import add_up

UNITS = Path("correction") / "units"


def recombine(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Replaces the finished run in `output_dir` by the one of other units; returns its result. Collective.

    Raises:
        LmcError: No finished run with stored units there, one of another log, or units that it does not have (in).
    """
    folder = Path(config.output_dir)
    with agreement():
        result = _finished(folder)
        check_audit(config, runtime.is_main)
        opened = open_logged_run(config, runtime)
        log = opened.log
        if log.fingerprint != result["log_fingerprint"]:
            raise LmcError(
                f"{folder} is a run on another log than {log.path}: give the one it was made from (--log_dir)"
            )
        included, undone = _changed(result["units"], config, folder)
    theta = log.theta(log.num_steps)
    correction = add_up(folder / "correction", included, log)
    corrected = correction.corrected(theta)
    forgotten = sorted({i for name in included for i in result["units"]["samples"][name]})
    result |= {
        "rel_error": None,  # of the request as it was; what is left of it has no reference
        "rows": [],
        "replay": None,
        "v_norm": correction.v.norm(),
        "n_units": len(included),
        "units": {**result["units"], "included": included, "undone": undone},
        "loss_forget": mean_loss(opened.module, corrected, forgotten, opened.batches) if forgotten else None,
        "gradients_equivalent": 0.0,
    }
    with promoted(folder) as part:
        take_over(folder, part)
        write_results(part, log, opened.module, corrected, correction, result, opened.tokenizer)
        with agreement():
            if runtime.is_main:
                shutil.copytree(folder / UNITS, part / UNITS, copy_function=os.link)
        earlier = last_run(part)
        if earlier is not None:  # a run of a version without an audit has none to go on with
            salt = run_salt(replace(config, audit=replace(config.audit, salt=result["config"]["audit"]["salt"])), part)
            append_run("recombine", part, config, result["config"], earlier["request"], result, correction, salt)
    return result


def _finished(folder: Path) -> dict[str, Any]:
    """Result of the run in a folder."""
    if not (folder / "result.json").exists():
        raise LmcError(f"{folder} holds no finished run (result.json): unlearn.undo and unlearn.add change one")
    result: dict[str, Any] = read_json(folder / "result.json")
    if not result.get("units") or not (folder / UNITS).is_dir():
        raise LmcError(f"{folder} keeps no units: run it with unlearn.units and unlearn.store_units=true")
    return result


def _changed(units: dict[str, Any], config: Config, folder: Path) -> tuple[list[str], list[str]]:
    """(units in, units out) after what is asked for."""
    included, undone = list(units["included"]), list(units["undone"])
    for option, source, target in (("undo", included, undone), ("add", undone, included)):
        asked = getattr(config.unlearn, option) or ""
        for name in (part.strip() for part in asked.split(",") if part.strip()):
            if name not in source:
                what = "is already so" if name in target else "is no unit of it"
                raise LmcError(f"unlearn.{option}: {name} {what} in {folder}; units in: {', '.join(included[:8])}")
            source.remove(name)
            target.append(name)
    if not included:
        raise LmcError("no unit is left in: that is the model as it was trained")
    return sorted(included), sorted(undone)
