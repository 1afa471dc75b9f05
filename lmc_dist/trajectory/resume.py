"""Continuing a run that was cut off: back to its last snapshot, as if the steps after it had never been logged.

The run may go on with other ranks or under another engine: the manifest then gets a new segment. What cannot be
continued is an error; nothing is ever removed but steps that the run is about to repeat.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.edits import read_edits
from lmc_dist.trajectory.files import MANIFEST_FILE, step_folder
from lmc_dist.trajectory.lock import LOCK_FILE, LogLock, is_lock_file
from lmc_dist.trajectory.manifest import read_manifest, resumed_manifest, write_manifest
from lmc_dist.trajectory.reader import FLOATS
from lmc_dist.trajectory.record import Segment, TrajectoryManifest
from lmc_dist.trajectory.sealed import require_plain
from lmc_dist.trajectory.snapshots import META_FILE, read_snapshot, snapshot_folder, snapshot_steps
from lmc_dist.trajectory.store import TrajectoryLog, missing_files, readable_rows
from lmc_dist.trajectory.table import TABLE_FILE, StepTable

logger = logging.getLogger("lmc_dist")

# What the same run started anew may do differently: where and how it runs.
_FREE_FIELDS = ("world_size", "engine", "partition", "run", "versions", "segments")
# Of an optimizer group: a trainer that has resumed has restored the rates of a later step; each step's row has its own.
_FREE_SETTINGS = ("lr", "initial_lr")


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


def resume(log_dir: Path, manifest: TrajectoryManifest, layout: ShardLayout, step: int | None = None) -> Resumed | None:
    """Cuts a log back to its last snapshot and reads that; None where no step was ever begun. Collective.

    The snapshot is the last one before which the table has no gap and no tensor file is missing, so that what is
    appended makes the log whole. Later rows, files and snapshots are removed: the run writes them again.

    Args:
        log_dir: The log; empty or absent is a run that has not begun.
        manifest: Of the run as it is started now.
        layout: This rank's.
        step: The snapshot to go back to, of the step at which the training loop goes on; None is the last one.

    Raises:
        LmcError: The log is of another run, another job writes it, it is damaged beyond its last snapshot, or has none of
            `step`; it is then left as it is.
    """
    hold = _Hold()
    try:
        return _resume(log_dir, manifest, layout, hold, step)
    except BaseException:
        hold.release()
        raise


# (N, checksum of θ_N, checksum of what following the log gives there), as the row before it says
_Point = tuple[int, str | None, str | None]


class _Hold:
    """Rank 0's lock, while it is not known yet whether the run goes on."""

    lock: LogLock | None = None

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def _resume(
    log_dir: Path, manifest: TrajectoryManifest, layout: ShardLayout, hold: _Hold, wanted: int | None
) -> Resumed | None:
    logged: TrajectoryManifest | None = None
    points: list[_Point] = []
    with agreement(layout.group):
        if layout.rank == 0 and log_dir.exists() and any(log_dir.iterdir()):
            hold.lock = LogLock(log_dir)
            logged = check_same_run(log_dir, manifest)
            points = resume_points(log_dir)
        if layout.rank == 0 and wanted is not None:
            points = points_of(log_dir, points, wanted)
    points = broadcast_object(points, layout.group)
    damaged = first_damaged_step(log_dir, layout, max((point[0] for point in points), default=0))
    for step, checksum, log_checksum in points:
        if step > damaged:
            continue
        try:
            vectors, meta = read_snapshot(log_dir / snapshot_folder(step), layout, FLOATS[manifest.dtype])
            if checksum not in (None, meta["checksum"]):
                raise AgreedError(f"snapshot {step} of {log_dir} does not have the checksum that the row before it has")
            followed = vectors["theta"]
            if log_checksum not in (None, checksum):  # rounded, and not a snapshot at the interval
                with agreement(layout.group):
                    log = TrajectoryLog(log_dir, layout.group, stop=step)
                followed = relayout(log.followed(step), layout)
        except LmcError as error:  # the same on all ranks
            if layout.rank == 0:
                logger.warning("%s; going back to the snapshot before it", error)
            continue
        with agreement(layout.group):
            if layout.rank == 0:
                assert logged is not None
                truncate(log_dir, step)
                _write_segment(log_dir, logged, manifest, step)
        return Resumed(step, vectors, meta["scalars"], followed, log_checksum, hold.lock)
    with agreement(layout.group):
        if points:
            raise LmcError(
                f"log_dir {log_dir}: no snapshot can be read ({', '.join(str(point[0]) for point in points)} were tried): "
                "restore one, or choose another log_dir"
            )
        if layout.rank == 0 and hold.lock is not None:
            clear(log_dir)
            hold.release()
    return None


def _write_segment(log_dir: Path, logged: TrajectoryManifest, present: TrajectoryManifest, step: int) -> None:
    """Puts into the manifest how the steps from now on are run, where that changes. Local; before the first new row."""
    found = resumed_manifest(logged, present, step)
    if found.segments != logged.segments or step == 0:
        write_manifest(log_dir, found)
    now, before = found.segment(step), logged.segment(max(step - 1, 0))
    if differing := segment_changes(before, now):
        logger.warning(
            "going on at step %d with other settings than before (%s): the result is not that of the uninterrupted run "
            "to the bit",
            step,
            differing,
        )


def segment_changes(before: Segment, now: Segment) -> str:
    """What differs between two segments, in words; empty where nothing does."""
    found = []
    if before.world_size != now.world_size:
        found.append(f"{now.world_size} ranks instead of {before.world_size}")
    if before.engine != now.engine:
        found.append(f"{now.engine} instead of {before.engine}")
    found += [
        f"{name} {now.versions.get(name)} instead of {before.versions.get(name)}"
        for name in sorted(set(before.versions) | set(now.versions))
        if before.versions.get(name) != now.versions.get(name)
    ]
    return ", ".join(found)


def check_same_run(log_dir: Path, manifest: TrajectoryManifest) -> TrajectoryManifest | None:
    """The manifest of a log of the run that is started now; None where it has none yet. Local.

    Raises:
        LmcError: It is another run's, with the fields that differ; or the directory holds something else.
    """
    for name in ("steps", "snapshots", TABLE_FILE, MANIFEST_FILE):
        if (log_dir / name).is_symlink():
            require_plain(log_dir / name)
    if not (log_dir / MANIFEST_FILE).exists():
        # The manifest is written first of all and removed last.
        if foreign := [p.name for p in log_dir.iterdir() if not _is_before_manifest(p.name)]:
            raise LmcError(
                f"log_dir {log_dir} holds {foreign[0]} and no {MANIFEST_FILE}: there is no log to resume. Restore the "
                "manifest, or choose another log_dir"
            )
        return None
    logged = read_manifest(log_dir)
    mine, theirs = (json.loads(json.dumps(each.to_json())) for each in (manifest, logged))
    for each in (mine, theirs):
        for group in each["optimizer"]["groups"]:
            for name in _FREE_SETTINGS:
                group.pop(name, None)
    if differing := sorted(k for k in mine if k not in _FREE_FIELDS and theirs[k] != mine[k]):
        raise LmcError(
            f"log_dir {log_dir} is of another run ({', '.join(differing)} differ): resume with the settings it was "
            "started with"
        )
    return logged


def _is_before_manifest(name: str) -> bool:
    return is_lock_file(name) or name == f"{MANIFEST_FILE}.part"


def resume_points(log_dir: Path) -> list[_Point]:
    """Snapshots before which nothing is missing, latest first; none where no step was ever begun. Local.

    Raises:
        LmcError: Steps or snapshots are there, and what is left of the log does not say which of them are whole.
    """
    snapshots = snapshot_steps(log_dir)
    try:
        rows = readable_rows(log_dir)
    except LmcError as error:
        # Before θ_0 is on disk no step is begun, and a table may be half made.
        if not snapshots and not any((log_dir / "steps").glob("*")):
            return []
        raise LmcError(
            f"{error}. Without it nothing says which steps are whole: restore it, or choose another log_dir (the "
            f"snapshots of steps {', '.join(map(str, snapshots)) or 'none'} are there)"
        ) from None
    whole, problem = 0, None
    while whole in rows and problem is None:
        problem = missing_files(log_dir, whole, rows[whole][1])
        whole += problem is None
    if problem is not None or whole < len(rows):
        reason = problem or f"{TABLE_FILE} lacks step {whole}"
        logger.warning("%s; going back to the snapshot before it", reason)
    checksums: dict[int, tuple[str | None, str | None]] = {0: (None, None)}
    checksums |= {
        step + 1: (record.checksum, record.log_checksum) for step, (record, _) in rows.items() if step < whole
    }
    checksums |= dict.fromkeys(read_edits(log_dir, snapshots), (None, None))  # not where the step before led to
    points = [(step, *checksums[step]) for step in reversed(snapshots) if step <= whole]
    if not points and (rows or snapshots):
        raise LmcError(
            f"log_dir {log_dir} holds steps and no snapshot to continue from: restore one, or choose another log_dir"
        )
    return points


def points_of(log_dir: Path, points: list[_Point], step: int) -> list[_Point]:
    """The snapshot of the step at which a training loop goes on by itself, of those there are. Local.

    Raises:
        LmcError: There is none, or going back to it would remove what a loop that begins anew has not got, or an edit.
    """
    found = [point for point in points if point[0] == step]
    there = ", ".join(str(point[0]) for point in reversed(points)) or "none"
    if step == 0 and points and points[0][0] > 0:
        raise LmcError(
            f"the training loop begins at step 0, the log in {log_dir} goes on at step {points[0][0]}: let the loop go on from "
            f"its checkpoint (a Trainer by train(resume_from_checkpoint=…)) of a step that has a snapshot ({there}), or "
            "remove the log to begin anew"
        )
    if step > 0 and not found:
        raise LmcError(
            f"the training loop goes on at step {step}, and the log in {log_dir} has no snapshot of it (there are {there}): "
            "go on from a checkpoint of such a step"
        )
    if undone := [edit for edit in read_edits(log_dir, [point[0] for point in points]) if edit > step]:
        raise LmcError(
            f"the training loop goes on at step {step}, and a deletion has corrected the weights of the log in {log_dir} at "
            f"step {max(undone)}, which would be undone: go on from a checkpoint of that step or a later one that has a "
            f"snapshot ({there})"
        )
    return found


def first_damaged_step(log_dir: Path, layout: ShardLayout, stop: int) -> int:
    """The first step before `stop` one of whose files is cut off or not the table's; `stop` without any. Collective.

    Ranks share the steps among them. Headers are read and the files' lengths compared with them, not the tensors: what
    is damaged there is found when it is read.
    """
    mine: tuple[int, str] = (stop, "")
    with agreement(layout.group):
        if stop > 0:
            log = TrajectoryLog(log_dir, layout.group, stop=stop)
            for step in range(layout.rank, stop, layout.world_size):
                if problem := log.damage(step):
                    mine = (step, problem)
                    break
    found = [mine]
    if layout.world_size > 1:
        found = [mine] * layout.world_size
        dist.all_gather_object(found, mine, group=layout.group)
    step, problem = min(found)
    if problem and layout.rank == 0:
        logger.warning("%s; going back to the snapshot before it", problem)
    return step


def truncate(log_dir: Path, step: int) -> None:
    """Removes everything from `step` on but the snapshot of it. Local; can be cut off and repeated.

    Snapshots go first: none may be left whose rows are gone.
    """
    for folder in (log_dir / "snapshots").iterdir():
        number = folder.name.removeprefix("step-")
        if folder.is_symlink() or folder.name == number or not number.isdigit() or int(number) > step:
            _remove(folder)
    table = StepTable(log_dir)
    table.truncate(step)
    table.close()
    for folder in (log_dir / "steps").iterdir():
        if folder.is_symlink() or folder.name >= Path(step_folder(step)).name:
            _remove(folder)
        else:
            for part in folder.glob("*.part"):
                part.unlink()
    for path in log_dir.iterdir():
        if is_lock_file(path.name) and path.name != LOCK_FILE:
            path.unlink()


def _remove(path: Path) -> None:
    """Removes a file, a link, or a folder that is then no snapshot any more from the first moment on. Local."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    (path / META_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def clear(log_dir: Path) -> None:
    """Removes a log of which no step was ever begun, the manifest last. Local; can be cut off and repeated."""
    for path in sorted(log_dir.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        if path.name != LOCK_FILE:
            _remove(path)
