"""Appending to a log: every rank its own tensors, rank 0 the table, all of it behind training's back.

Main thread and writer thread share the work. Training hands over vectors that nobody changes any more; a thread of each
rank encodes them, writes them and syncs them. What a rank has on disk travels with the passes that the logger gathers
at every step anyway. Once all ranks have reported a step, rank 0's thread inserts its row: a row means a whole step.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agree, agreement
from lmc_dist.shards.checksum import format_checksum, local_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.background import BackgroundWriter
from lmc_dist.trajectory.files import MANIFEST_FILE, exact_update, step_folder, write_json, write_shard_file
from lmc_dist.trajectory.lock import LOCK_FILE, LogLock
from lmc_dist.trajectory.record import TIERS, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.resume import Resumed
from lmc_dist.trajectory.snapshots import (
    finish_snapshot,
    snapshot_folder,
    snapshot_steps,
    start_snapshot,
    vector_checksums,
)
from lmc_dist.trajectory.table import StepTable


class LogWriter:
    """Appends steps to a log. All ranks construct it; methods are collective unless they say otherwise.

    Args:
        log_dir: A directory that is new or empty; or, with `resumed`, a log cut off where the run continues.
        manifest: What holds for the run.
        layout: Layout of the vectors that will be passed.
        buffer_bytes: Memory of each rank for steps that wait to be written.
        theta: θ of the first step as the log reproduces it.
        resumed: The run that is continued, with rank 0's hold on the directory.

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
    ) -> None:
        self.path, self.manifest, self.layout = Path(log_dir), manifest, layout
        self.kinds = TIERS[manifest.storage]
        self.is_lossy = is_lossy(manifest)
        self.followed = theta
        self.lock = resumed.lock if resumed else None
        self._table: StepTable | None = None
        with agreement(layout.group):
            if layout.rank == 0:
                self._open(is_new=resumed is None)
        self._requested = {resumed.step} if resumed else set()
        self._background = BackgroundWriter(buffer_bytes)
        self._written: deque[dict[str, Any]] = deque()  # this rank's finished steps, until they are reported
        self._snapshot: tuple[int, Future[Any], dict[str, Any]] | None = None
        self._group = snapshot_group(layout)
        # rank 0 alone:
        self._rows: deque[StepRecord] = deque()  # steps whose files are not all there yet
        self._reports: dict[int, dict[int, dict[str, Any]]] = {}  # step → rank → report
        self._finished: deque[tuple[int, dict[str, Any]]] = deque()  # snapshots that wait for the rows before them
        self._log_checksum = resumed.log_checksum if resumed else None
        self._next_row = resumed.step if resumed else 0

    def _open(self, is_new: bool) -> None:
        if is_new:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = LogLock(self.path)
            if others := [path.name for path in self.path.iterdir() if path.name != LOCK_FILE]:
                self.lock.release()
                raise LmcError(
                    f"log_dir {self.path} is not empty (it holds {others[0]}): choose another, remove the old log "
                    "first, or continue its run with --resume true"
                )
            write_json(self.path / MANIFEST_FILE, self.manifest.to_json())
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
        if self._snapshot is not None and self._snapshot[1].done() and self._snapshot[1].exception() is not None:
            return LmcError(f"the snapshot of step {self._snapshot[0]} failed: {self._snapshot[1].exception()}")
        return self.lock.error if self.lock is not None else None

    def raise_error(self) -> None:
        """Raises, on every rank, what stopped a rank's writer."""
        error = self.error
        if error is not None:
            error = LmcError(
                f"the trajectory log {self.path} cannot be written any more ({type(error).__name__}: {error}); steps "
                f"before {self._next_row if self.layout.rank == 0 else 'the failure'} are whole: make room or repair "
                "the cause, then continue the run with --resume true"
            )
        agree(error, self.layout.group)

    def store(
        self, step: int, before: ShardedVector, after: ShardedVector, gradient: ShardedVector | None, applied: bool
    ) -> None:
        """Queues this rank's tensors of a step, which must not be changed afterwards. Local; blocks while full."""
        if not applied or not self.kinds:
            self._written.append({"step": step, "files": {}, "sum": None})
            return
        num_vectors = 1 + self.is_lossy + (gradient is not None)  # `before` is the `after` of the step that waits
        size = after.flat.numel() * after.flat.element_size() * num_vectors
        self._background.submit(lambda: self._store(step, before, after, gradient), size)

    def _store(self, step: int, before: ShardedVector, after: ShardedVector, gradient: ShardedVector | None) -> None:
        """On the writer thread: encodes and writes one step."""
        files = {}
        for kind in self.kinds:
            if kind == "update":
                tensors = self._update(step, before, after)
            elif kind == "gradient":
                assert gradient is not None
                tensors = dict(gradient.to(getattr(torch, self.manifest.gradient_dtype)).items())
            else:
                tensors = dict(after.items())
            files[kind] = write_shard_file(
                self.path / step_folder(step),
                self.layout,
                tensors,
                {"step": str(step), "kind": kind},
                kind,
                self.manifest.compression,  # type: ignore[arg-type]
            )
        total = local_checksum(self.followed).tolist() if self.is_lossy else None
        self._written.append({"step": step, "files": files, "sum": total})

    def _update(self, step: int, before: ShardedVector, after: ShardedVector) -> dict[str, torch.Tensor]:
        """u_s as it is stored. Rounded updates start from where the log is, so that rounding never adds up."""
        if not self.is_lossy:
            return exact_update(before, after)
        interval = self.manifest.save_interval
        if interval is not None and (step + 1) % interval == 0:  # so that following the log meets the snapshot
            tensors = exact_update(self.followed, after)
            self.followed = after
            return tensors
        rounded = (after - self.followed).to(getattr(torch, self.manifest.update_dtype))
        self.followed = self.followed + rounded.to(after.flat.dtype)
        return dict(rounded.items())

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
        """Takes a step's record and all ranks' reports; queues the rows that are now whole. Rank 0."""
        if record is not None:
            self._rows.append(record)
        for rank, report in enumerate(reports):
            for entry in report:
                self._reports.setdefault(entry["step"], {})[rank] = entry
        ready = []
        while self._rows and len(self._reports.get(self._rows[0].step, ())) == self.layout.world_size:
            row = self._rows.popleft()
            by_rank = self._reports.pop(row.step)
            entries = [by_rank[rank] for rank in range(self.layout.world_size)]
            if entries[0]["sum"] is not None:
                self._log_checksum = format_checksum(torch.tensor([entry["sum"] for entry in entries]).sum(0))
            digests = {kind: [entry["files"][kind] for entry in entries] for kind in entries[0]["files"]}
            ready.append((replace(row, log_checksum=self._log_checksum), digests))
        table = self._table
        assert table is not None
        if samples:
            self._background.submit(lambda: table.insert_samples(samples))
        if ready:
            self._background.submit(lambda: table.insert(ready))
            self._next_row = ready[-1][0].step + 1
        while self._finished and self._finished[0][0] <= self._next_row:
            self._publish(*self._finished.popleft())

    def _publish(self, step: int, meta: dict[str, Any]) -> None:
        folder = self.path / snapshot_folder(step)
        self._background.submit(lambda: finish_snapshot(folder, meta))
        self._background.submit(lambda: self._trim(step - 1))

    # --- snapshots -------------------------------------------------------------------------------------------------

    def snapshot(self, step: int, vectors: Mapping[str, ShardedVector], scalars: dict[str, Any]) -> None:
        """Starts to write θ_step (`theta`) and optimizer state; waits for the snapshot before it."""
        if step in self._requested:
            return
        self._requested.add(step)
        self._await_snapshot()
        sums = vector_checksums(vectors)
        meta = {"step": step, "checksum": sums["theta"], "kinds": sums, "scalars": scalars}
        self._snapshot = (step, start_snapshot(self.path / snapshot_folder(step), vectors, self._group), meta)

    @property
    def snapshot_done(self) -> bool:
        """Whether this rank's part of the snapshot under way is on disk. Local."""
        return self._snapshot is not None and self._snapshot[1].done()

    def finish_snapshot(self) -> None:
        """Hands over the snapshot that all ranks have written; it becomes visible once the rows before it are."""
        assert self._snapshot is not None
        step, future, meta = self._snapshot
        self._snapshot = None
        error = future.exception()
        agree(None if error is None else LmcError(f"the snapshot of step {step} failed: {error}"), self.layout.group)
        if self.layout.rank == 0:
            self._finished.append((step, meta))

    def _await_snapshot(self) -> None:
        if self._snapshot is not None:
            wait([self._snapshot[1]])
            self.finish_snapshot()

    def _trim(self, last_step: int) -> None:
        """Deletes what fell out of the ring: tensors and snapshots that no remaining step needs."""
        if self.manifest.max_steps is None:
            return
        window_start = last_step - self.manifest.max_steps + 1
        usable = [step for step in snapshot_steps(self.path) if step <= window_start]
        if usable:
            assert self._table is not None
            drop_before(self.path, self._table, max(usable))

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
            wait([self._snapshot[1]], timeout=60)  # its thread talks over a group that may be gone soon
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


def drop_before(log_dir: Path, table: StepTable, first_kept: int) -> None:
    """Deletes the snapshots and step tensors before `first_kept`, in an order that a crash cannot make lie. Local."""
    for step in snapshot_steps(log_dir):
        if step < first_kept:  # out of sight first, so that no half-deleted snapshot is ever taken for a whole one
            doomed = log_dir / "snapshots" / f"deleted-{step}"
            (log_dir / snapshot_folder(step)).rename(doomed)
            shutil.rmtree(doomed)
    gone = table.kept_before(first_kept)
    table.set_tensors(dict.fromkeys(gone))
    for step in gone:
        shutil.rmtree(log_dir / step_folder(step), ignore_errors=True)


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
