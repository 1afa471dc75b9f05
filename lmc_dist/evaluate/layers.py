"""How far a correction leaves each parameter from the reference: one parameter in memory at a time, in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import local_dot
from lmc_dist.trajectory.files import read_json
from lmc_dist.trajectory.reader import ShardReader
from lmc_dist.trajectory.snapshot_files import SnapshotReader
from lmc_dist.trajectory.snapshots import snapshot_folder
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import DESCRIPTION
from lmc_dist.unlearn.reference import COMPUTED


def layers_of_run(run: Path, log_dir: Path) -> dict[str, Any]:
    """What layers.json holds, of a finished run and the log it was made from. Local.

    Args:
        run: Its output_dir; the reference is the one that `--reference retrain` left in it, or the log that it names.
        log_dir: The log.

    Returns:
        `reference` (a folder, or None), `rel_error` over all parameters, and `layers` as of `layer_distances`.

    Raises:
        LmcError: The log is another than the run's or lacks the snapshot of its end, or files are missing or damaged.
    """
    log, result = TrajectoryLog(log_dir), read_json(run / "result.json")
    if result.get("log_fingerprint") != log.fingerprint:
        raise LmcError(f"{run} is a run on another log than {log_dir}: give the one it was made from")
    place, reference = run / "reference" / "log", None
    if not place.is_dir() and (named := result.get("config", {}).get("reference")) not in (None, *COMPUTED):
        place = Path(named)
    if place.is_dir():
        retrained = TrajectoryLog(place)
        if retrained.layout.params != log.layout.params:
            raise LmcError(f"the reference in {place} has other parameters than log {log_dir}")
        reference = _end(retrained)
    rows, error = layer_distances(log.layout.params, run / "correction", _end(log), reference)
    return {"reference": None if reference is None else str(place), "rel_error": error, "layers": rows}


def _end(log: TrajectoryLog) -> Path:
    """Folder of θ_τ.

    Raises:
        LmcError: The log does not keep it by itself.
    """
    if log.num_steps not in log.snapshots:
        raise LmcError(f"log {log.path} has no snapshot of its end, step {log.num_steps}: was training cut off?")
    return log.path / snapshot_folder(log.num_steps)


def layer_distances(
    params: Sequence[ParamSpec], correction: Path, theta: Path, reference: Path | None
) -> tuple[list[dict[str, Any]], float | None]:
    """Sizes and relative distances by parameter. Local.

    Args:
        params: Of the log, in its order.
        correction: Folder of v, as `Correction.save` wrote it at any world size.
        theta: Snapshot of θ_τ.
        reference: Snapshot of θ_retrain.

    Returns:
        One {name, numel, v_norm, weight_norm, distance} a parameter, float32 read and float64 summed, and the distance over
        all: ‖θ + v − θ_retrain‖ / ‖θ − θ_retrain‖, None without a reference or where that did not move.

    Raises:
        LmcError: Files are missing, damaged or of other parameters.
    """
    layout = ShardLayout(params)
    known = read_json(correction / DESCRIPTION)
    vs = ShardReader(correction, layout, known["partition"], f"correction {correction}")
    thetas, references = SnapshotReader(theta), None if reference is None else SnapshotReader(reference)
    rows, missed, moved = [], 0.0, 0.0
    for slot in layout:
        v, weights = torch.zeros(slot.local_numel), torch.zeros(slot.local_numel)
        vs.read_slot(slot, v)
        thetas.read_slot("theta", slot, weights)
        row = {"name": slot.spec.name, "numel": slot.spec.numel, "v_norm": _norm(v), "weight_norm": _norm(weights)}
        distance = None
        if references is not None:
            target = torch.zeros(slot.local_numel)
            references.read_slot("theta", slot, target)
            weights.sub_(target)
            before = _norm(weights)
            after = _norm(weights.add_(v))
            distance = after / before if before else None
            missed, moved = missed + after**2, moved + before**2
        rows.append({**row, "distance": distance})
    return rows, math.sqrt(missed / moved) if moved else None


def _norm(x: torch.Tensor) -> float:
    return math.sqrt(local_dot(x, x))
