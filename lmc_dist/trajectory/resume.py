"""Continuing a run that was cut off: back to its last snapshot, as if the steps after it had never been logged."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import MANIFEST_FILE, read_json, step_folder
from lmc_dist.trajectory.lock import LOCK_FILE, LogLock
from lmc_dist.trajectory.record import TrajectoryManifest
from lmc_dist.trajectory.snapshots import META_FILE, read_snapshot, snapshot_folder, snapshot_steps
from lmc_dist.trajectory.store import TrajectoryLog, missing_files, readable_rows
from lmc_dist.trajectory.table import TABLE_FILE, StepTable

logger = logging.getLogger("lmc_dist")

# What the same run started anew may write differently.
_FREE_FIELDS = ("run", "versions")


@dataclass(frozen=True)
class Resumed:
    """Where a run continues.

    Attributes:
        step: The next step.
        vectors: `theta` and optimizer state before it.
        scalars: Scalar optimizer state.
        followed: θ of `step` as the log reproduces it: θ itself unless updates are stored rounded.
        log_checksum: Checksum of `followed`; None unless updates are stored rounded.
        lock: Rank 0's hold on the directory.
    """

    step: int
    vectors: dict[str, ShardedVector]
    scalars: dict[str, Any]
    followed: ShardedVector
    log_checksum: str | None
    lock: LogLock | None


def resume(log_dir: Path, manifest: TrajectoryManifest, layout: ShardLayout) -> Resumed | None:
    """Cuts a log back to its last snapshot and reads that; None where no step can be kept. Collective.

    The snapshot is the last one before which the table has no gap and no tensor file is missing, so that what is
    appended makes the log whole. Later rows, files and snapshots are removed: the run writes them again.

    Args:
        log_dir: The log; empty or absent is a run that has not begun.
        manifest: Of the run as it is started now.
        layout: This rank's.

    Raises:
        LmcError: The log is of another run, or another job writes it.
    """
    lock, points = None, []
    with agreement(layout.group):
        if layout.rank == 0 and log_dir.exists() and any(log_dir.iterdir()):
            lock = LogLock(log_dir)
            try:
                check_same_run(log_dir, manifest)
                points = resume_points(log_dir)
            except BaseException:
                lock.release()
                raise
    for step in broadcast_object(points, layout.group):
        try:
            vectors, meta = read_snapshot(log_dir / snapshot_folder(step), layout, layout_dtype(manifest))
        except AgreedError as error:
            if layout.rank == 0:
                logger.warning("%s; going back to the snapshot before it", error)
            continue
        followed, log_checksum = vectors["theta"], None
        if step > 0 and manifest.update_dtype != manifest.dtype:
            log = TrajectoryLog(log_dir, layout.group)
            followed, log_checksum = log.followed(step), log.record(step - 1).log_checksum
        with agreement(layout.group):
            if layout.rank == 0:
                truncate(log_dir, step)
        return Resumed(step, vectors, meta["scalars"], followed, log_checksum, lock)
    with agreement(layout.group):
        if lock is not None:
            clear(log_dir)
            lock.release()
    return None


def layout_dtype(manifest: TrajectoryManifest) -> Any:
    import torch

    return getattr(torch, manifest.dtype)


def check_same_run(log_dir: Path, manifest: TrajectoryManifest) -> None:
    """Checks that a log is of the run that is started now. Local.

    Raises:
        LmcError: It is not, with the fields that differ; or the directory holds something else.
    """
    if not (log_dir / MANIFEST_FILE).exists():
        own = {"snapshots", "steps", TABLE_FILE, LOCK_FILE, f"{TABLE_FILE}-journal", f"{MANIFEST_FILE}.part"}
        if foreign := [path.name for path in log_dir.iterdir() if path.name not in own]:
            raise LmcError(f"log_dir {log_dir} holds {foreign[0]} and no log: nothing to resume, choose another")
        return
    logged = read_json(log_dir / MANIFEST_FILE)
    mine = json.loads(json.dumps(manifest.to_json()))
    if not isinstance(logged, dict) or logged.get("schema") != mine["schema"]:
        raise LmcError(f"{log_dir}/{MANIFEST_FILE} is of another version: its run cannot be resumed")
    if differing := sorted(k for k in mine if k not in _FREE_FIELDS and logged.get(k) != mine[k]):
        raise LmcError(
            f"log_dir {log_dir} is of another run ({', '.join(differing)} differ): resume with the settings and the "
            "number of ranks it was started with"
        )
    if logged["versions"] != mine["versions"]:
        logger.warning("resuming with other package versions: the result may not be that of the uninterrupted run")


def resume_points(log_dir: Path) -> list[int]:
    """Steps with a snapshot before which nothing is missing, latest first. Local."""
    try:
        rows = readable_rows(log_dir)
    except (LmcError, sqlite3.DatabaseError) as error:
        logger.warning("%s; starting from the first snapshot", error)
        rows = {}
    whole = 0
    while whole in rows and not missing_files(log_dir, whole, rows[whole][1]):
        whole += 1
    return sorted((step for step in snapshot_steps(log_dir) if step <= whole), reverse=True)


def truncate(log_dir: Path, step: int) -> None:
    """Removes everything from `step` on but the snapshot of it. Local; can be cut off and repeated."""
    path = log_dir / TABLE_FILE
    try:
        table = StepTable(log_dir)
        table.truncate(step)
    except sqlite3.DatabaseError:
        if step > 0:
            raise
        path.unlink()
        table = StepTable(log_dir)
    table.close()
    for folder in (log_dir / "snapshots").iterdir():
        name = folder.name.removeprefix("step-")
        if not name.isdigit() or int(name) > step:
            (folder / META_FILE).unlink(missing_ok=True)  # first, so that it is never taken for a whole one
            shutil.rmtree(folder)
    for folder in (log_dir / "steps").iterdir():
        if folder.name >= Path(step_folder(step)).name:
            shutil.rmtree(folder)
        else:
            for part in folder.glob("*.part"):
                part.unlink()


def clear(log_dir: Path) -> None:
    """Removes a log that has no usable snapshot, not even that of its first step. Local."""
    for path in log_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
