"""Appending to a log: every rank its own tensors, rank 0 the table, all of it behind training's back.

Training hands over vectors that nobody changes any more; a thread of each rank compares them, encodes, writes and syncs
what the tier keeps. What a rank has on disk travels with the passes that the logger gathers at every step anyway, and
with it the rank's share of norm and checksum. Once all ranks have reported a step, rank 0's thread inserts its row: a
row means a whole step. Where the disk falls behind, steps that wait are synced together, and rows inserted together.

Long, because one order of writing is kept by one class: steps, rows and snapshots wait for each other.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agree, agreement
from lmc_dist.shards.checksum import format_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.background import BackgroundWriter
from lmc_dist.trajectory.difference import RoundedUpdates, difference, stored_update
from lmc_dist.trajectory.edits import EDIT_FILE
from lmc_dist.trajectory.files import StagedFile, publish_files, stage_shard_file, step_folder
from lmc_dist.trajectory.lock import LogLock, is_lock_file
from lmc_dist.trajectory.manifest import write_manifest
from lmc_dist.trajectory.record import TIERS, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.resume import Resumed
from lmc_dist.trajectory.snapshots import (
    finish_snapshot,
    snapshot_folder,
    snapshot_steps,
    start_snapshot,
    vector_checksums,
)
from lmc_dist.trajectory.table import Digests, StepTable

# Steps that are synced together at most where the disk falls behind: what a crash loses, and what a report may lack.
_SYNCED_TOGETHER = 8


@dataclass
class _Step:
    """A step that this rank has written and not yet synced."""

    report: dict[str, Any]
    files: list[StagedFile]


@dataclass
class _Snapshot:
    """A snapshot that is not yet visible: what becomes of its tensors, and what its descriptions will say."""

    step: int
    future: Future[Any]
    meta: dict[str, Any]
    edit: dict[str, Any] | None


class LogWriter:
    """Appends steps to a log. All ranks construct it; methods are collective unless they say otherwise.

    Args:
        log_dir: A directory that is new or empty; or, with `resumed`, a log cut off where the run continues.
        manifest: What holds for the run.
        layout: Layout of the vectors that will be passed.
        buffer_bytes: Memory of each rank for steps that wait to be written. Beside it the log keeps θ_s, and, while it
            writes a step, u_s; where updates are rounded, also θ_s as the log gives it.
        theta: θ of the first step as the log reproduces it.
        resumed: The run that is continued, with rank 0's hold on the directory.
        keeps_first: Whether a ring keeps θ_0, from which every step can be replayed, and the edits on the way.

    Raises:
        LmcError: The directory is not empty, or another job writes there.
    """

    def __init__(
        self,
        log_dir: str | Path,
        manifest: TrajectoryManifest,
        layout: ShardLayout,
        buffer_bytes: int,
        theta: ShardedVector,
        resumed: Resumed | None = None,
        keeps_first: bool = False,
    ) -> None:
        self.path, self.manifest, self.layout = Path(log_dir), manifest, layout
        self.kinds = TIERS[manifest.storage]
        self._rounded: RoundedUpdates | None = None
        self._keeps_first = keeps_first
        if is_lossy(manifest):
            self._rounded = RoundedUpdates(theta, getattr(torch, manifest.update_dtype))
        self.lock = resumed.lock if resumed else None
        self._table: StepTable | None = None
        with agreement(layout.group):
            if layout.rank == 0:
                try:
                    self._open(is_new=resumed is None)
                except BaseException:
                    if self.lock is not None:
                        self.lock.release()
                    raise
        self._requested = {resumed.step} if resumed else set()
        self._background = BackgroundWriter(buffer_bytes)
        self._staged: list[_Step] = []  # the thread's alone
        self._written: deque[dict[str, Any]] = deque()  # this rank's finished steps, until they are reported
        self._snapshot: _Snapshot | None = None  # under way
        self._group = snapshot_group(layout)
        # rank 0 alone:
        self._rows: deque[StepRecord] = deque()  # steps whose files are not all there yet
        self._reports: dict[int, dict[int, dict[str, Any]]] = {}  # step → rank → report
        self._whole: deque[tuple[StepRecord, Digests]] = deque()  # rows for the thread to insert
        self._finished: deque[_Snapshot] = deque()  # that wait for the rows before them
        self._log_checksum = resumed.log_checksum if resumed else None
        self._next_row = self._num_whole = resumed.step if resumed else 0  # queued, and on disk

    def _open(self, is_new: bool) -> None:
        if is_new:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = LogLock(self.path)
            if others := [path.name for path in self.path.iterdir() if not is_lock_file(path.name)]:
                raise LmcError(
                    f"log_dir {self.path} is not empty (it holds {others[0]}): choose another, remove the old log "
                    "first, or continue its run with --resume true"
                )
            write_manifest(self.path, self.manifest)
        for name in ("snapshots", "steps"):
            (self.path / name).mkdir(exist_ok=True)
        self._table = StepTable(self.path)

    # --- steps -----------------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether this rank's writing has come to an end; the others learn it at the next step. Local."""
        return self.error is not None

    @property
    def error(self) -> Exception | None:
        if self._background.error is not None:
            return self._background.error
        found = self._snapshot
        if found is not None and found.future.done() and found.future.exception() is not None:
            return LmcError(f"the snapshot of step {found.step} failed: {found.future.exception()}")
        return self.lock.error if self.lock is not None else None

    def raise_error(self) -> None:
        """Raises, on every rank, what stopped a rank's writer."""
        error = self.error
        if error is not None:
            error = LmcError(
                f"the trajectory log {self.path} cannot be written any more ({type(error).__name__}: {error}); steps "
                f"before {self._num_whole if self.layout.rank == 0 else 'the failure'} are whole: make room or repair "
                "the cause, then continue the run with --resume true"
            )
        agree(error, self.layout.group)

    def store(
        self, step: int, before: ShardedVector, after: ShardedVector, gradient: ShardedVector | None, applied: bool
    ) -> None:
        """Queues this rank's vectors of a step, which must not be changed afterwards. Local; blocks while full."""
        size = after.flat.numel() * after.flat.element_size() * (1 if gradient is None else 2)
        self._background.submit(lambda: self._store(step, before, after, gradient, applied), size)

    def _store(
        self, step: int, before: ShardedVector, after: ShardedVector, gradient: ShardedVector | None, applied: bool
    ) -> None:
        """On the writer thread: compares, encodes and writes one step; syncs unless another one waits."""
        kinds = self.kinds if applied else ()
        keep = "update" in kinds and self._rounded is None
        try:
            found = difference(before, after, keep)
            staged = {}
            for kind in kinds:
                if kind == "update":
                    tensors = stored_update(found, after) if keep else self._round(step, after)
                elif kind == "gradient":
                    assert gradient is not None
                    tensors = dict(gradient.to(getattr(torch, self.manifest.gradient_dtype)).items())
                else:
                    tensors = dict(after.items())
                staged[kind] = stage_shard_file(
                    self.path / step_folder(step),
                    self.layout,
                    tensors,
                    {"step": str(step), "kind": kind},
                    kind,
                    self.manifest.compression,  # type: ignore[arg-type]
                )
        except LmcError as error:
            raise LmcError(f"step {step}: {error}") from None
        report = {
            "step": step,
            "files": {kind: file.digest for kind, file in staged.items()},
            "square": found.square,
            "sum": found.checksum,
            "log_sum": self._rounded.checksum() if self._rounded is not None and applied else None,
        }
        self._staged.append(_Step(report, list(staged.values())))
        if len(self._staged) >= _SYNCED_TOGETHER or not self._background.more_waits:
            self._sync()

    def _round(self, step: int, after: ShardedVector) -> dict[str, torch.Tensor]:
        """u_s as it is stored where updates are rounded: exact before a snapshot, so that following the log meets it."""
        assert self._rounded is not None
        interval = self.manifest.save_interval
        if interval is not None and (step + 1) % interval == 0:
            return self._rounded.meet(after)
        return dict(self._rounded.round(after).items())

    def _sync(self) -> None:
        """On the writer thread: makes the steps that were written last, and lets them be reported."""
        publish_files(file for step in self._staged for file in step.files)
        self._written.extend(step.report for step in self._staged)
        self._staged.clear()

    def report(self) -> list[dict[str, Any]]:
        """What this rank has put on disk since the last call, for `commit`. Local."""
        found = []
        while self._written:
            found.append(self._written.popleft())
        return found

    def commit(
        self,
        record: StepRecord | None,
        reports: list[list[dict[str, Any]]],
        samples: list[dict[str, Any]] | None = None,
    ) -> None:
        """Takes a step's record and all ranks' reports; queues the rows that are now whole. Rank 0.

        The record lacks what the reports hold: norm of the update and checksums.
        """
        if record is not None:
            self._rows.append(record)
        for rank, report in enumerate(reports):
            for entry in report:
                self._reports.setdefault(entry["step"], {})[rank] = entry
        if samples:
            table = self._open_table
            self._background.submit(lambda: table.insert_samples(samples))
        found = False
        while self._rows and len(self._reports.get(self._rows[0].step, ())) == self.layout.world_size:
            row = self._rows.popleft()
            by_rank = self._reports.pop(row.step)
            self._whole.append(self._row(row, [by_rank[rank] for rank in range(self.layout.world_size)]))
            self._next_row, found = row.step + 1, True
        if found:
            self._background.submit(self._insert)
        while self._finished and self._finished[0].step <= self._next_row:
            self._publish(self._finished.popleft())

    def _row(self, record: StepRecord, entries: list[dict[str, Any]]) -> tuple[StepRecord, Digests]:
        """A record and all ranks' reports of its step as a row and the digests of its files."""
        if entries[0]["log_sum"] is not None:
            self._log_checksum = total_checksum(entry["log_sum"] for entry in entries)
        row = replace(
            record,
            u_norm=math.sqrt(sum(entry["square"] for entry in entries)),
            checksum=total_checksum(entry["sum"] for entry in entries),
            log_checksum=self._log_checksum,
        )
        return row, {kind: [entry["files"][kind] for entry in entries] for kind in entries[0]["files"]}

    def _insert(self) -> None:
        """On the writer thread: all rows that are whole by now, in one transaction; a later job finds none left."""
        rows = []
        while self._whole:
            rows.append(self._whole.popleft())
        if rows:
            self._open_table.insert(rows)
            self._num_whole = rows[-1][0].step + 1

    @property
    def _open_table(self) -> StepTable:
        assert self._table is not None
        return self._table

    def _publish(self, snapshot: _Snapshot) -> None:
        folder = self.path / snapshot_folder(snapshot.step)
        self._background.submit(lambda: finish_snapshot(folder, snapshot.meta, snapshot.edit))
        self._background.submit(lambda: self._trim(snapshot.step - 1))

    # --- snapshots -------------------------------------------------------------------------------------------------

    def snapshot(
        self,
        step: int,
        vectors: Mapping[str, ShardedVector],
        scalars: dict[str, Any],
        edit: dict[str, Any] | None = None,
    ) -> None:
        """Starts to write θ_step (`theta`) and optimizer state; waits for the snapshot before it."""
        if step in self._requested:
            return
        self._requested.add(step)
        self._await_snapshot()
        sums = vector_checksums(vectors)
        meta = {"step": step, "checksum": sums["theta"], "kinds": sums, "scalars": scalars}
        future = start_snapshot(self.path / snapshot_folder(step), vectors, self._group)
        self._snapshot = _Snapshot(step, future, meta, edit)

    @property
    def snapshot_done(self) -> bool:
        """Whether this rank's part of the snapshot under way is on disk. Local."""
        return self._snapshot is not None and self._snapshot.future.done()

    def finish_snapshot(self) -> None:
        """Hands over the snapshot that all ranks have written; it becomes visible once the rows before it are."""
        snapshot = self._snapshot
        assert snapshot is not None
        self.raise_error()
        self._snapshot = None
        if self.layout.rank == 0:
            self._finished.append(snapshot)

    def edit(
        self, step: int, vectors: Mapping[str, ShardedVector], scalars: dict[str, Any], edit: dict[str, Any]
    ) -> None:
        """Writes θ_step and optimizer state as a correction has set them, and waits until they are on disk.

        Raises:
            LmcError: There is a snapshot of the step from before the correction.
        """
        with agreement(self.layout.group):
            if step in self._requested:
                raise LmcError(f"step {step} has a snapshot already: edit a run before the step's snapshot is taken")
        self.snapshot(step, vectors, scalars, edit)
        self.finish()
        if self._rounded is not None:  # what follows is added to the corrected weights
            self._rounded, self._log_checksum = RoundedUpdates(vectors["theta"], self._rounded.dtype), None

    def _await_snapshot(self) -> None:
        if self._snapshot is not None:
            wait([self._snapshot.future])
            self.finish_snapshot()

    def _trim(self, last_step: int) -> None:
        """Deletes what fell out of the ring: tensors and snapshots that no remaining step needs."""
        if self.manifest.max_steps is None:
            return
        window_start = last_step - self.manifest.max_steps + 1
        usable = [step for step in snapshot_steps(self.path) if step <= window_start]
        if usable:
            drop_before(self.path, self._open_table, max(usable), self._keeps_first)

    # --- the end ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Waits until every step handed over is on disk on all ranks and has its row."""
        self._background.drain()
        self.raise_error()
        reports = gather_reports(self.report(), self.layout)
        if self.layout.rank == 0:
            self.commit(None, reports)
            self._background.drain()
        self.raise_error()

    def finish(self) -> None:
        """Waits until everything handed over, the snapshot under way included, is on disk."""
        self._await_snapshot()
        self.drain()

    def close(self) -> None:
        """Ends the thread and gives the directory free; drops what still waits. Local."""
        if self._snapshot is not None:
            wait([self._snapshot.future], timeout=60)  # its thread talks over a group that may be gone soon
            self._snapshot = None
        self._background.close()
        if self._table is not None:
            self._table.close()
            self._table = None
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def is_lossy(manifest: TrajectoryManifest) -> bool:
    """Whether following the log gives θ_s with the rounding of one update."""
    return "update" in TIERS[manifest.storage] and manifest.update_dtype != manifest.dtype


def drop_before(log_dir: Path, table: StepTable, first_kept: int, keeps_first: bool = False) -> None:
    """Deletes the snapshots and step tensors before `first_kept`, in an order that a crash cannot make lie. Local.

    With `keeps_first` θ_0 stays, and edits do: a replay from θ_0 that did not come past them would train again on what
    they forgot.
    """
    for step in snapshot_steps(log_dir):
        is_passed = keeps_first and (step == 0 or (log_dir / snapshot_folder(step) / EDIT_FILE).exists())
        if step < first_kept and not is_passed:
            # out of sight first, so that no half-deleted snapshot is ever taken for a whole one
            doomed = log_dir / "snapshots" / f"deleted-{step}"
            (log_dir / snapshot_folder(step)).rename(doomed)
            shutil.rmtree(doomed)
    gone = table.kept_before(first_kept)
    table.set_tensors(dict.fromkeys(gone))
    for step in gone:
        shutil.rmtree(log_dir / step_folder(step), ignore_errors=True)


def total_checksum(shares: Iterable[Sequence[int]]) -> str:
    """The checksum of which these are all ranks' shares."""
    return format_checksum(torch.tensor(list(shares)).sum(0))


def gather_reports(report: list[dict[str, Any]], layout: ShardLayout) -> list[list[dict[str, Any]]]:
    """All ranks' reports on rank 0, in rank order."""
    if layout.world_size == 1:
        return [report]
    box: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(report, box, group=layout.group, group_dst=0)
    return box or []


_groups: dict[Any, dist.ProcessGroup | None] = {}


def snapshot_group(layout: ShardLayout) -> dist.ProcessGroup | None:
    """A gloo group of the layout's ranks for snapshots alone. Collective.

    `async_save` talks from a thread of its own: on the group that training uses, their messages would mix.
    """
    if not dist.is_initialized():
        return None
    key = layout.group or dist.group.WORLD
    if key not in _groups:
        _groups[key] = dist.new_group(dist.get_process_group_ranks(key), backend="gloo")
    return _groups[key]
