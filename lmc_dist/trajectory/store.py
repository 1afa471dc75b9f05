"""The log on disk (docs/log_format.md): written by all ranks, read at any world size.

Rank 0 alone writes the manifest and the step table; every rank writes its own tensors. A row of the table is written
after all ranks' tensors of that step are on disk, so a row means a whole step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement
from lmc_dist.shards.checksum import format_checksum, local_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import (
    ShardReader,
    exact_update,
    load_snapshot,
    read_json,
    save_snapshot,
    write_json,
    write_shard_file,
)
from lmc_dist.trajectory.record import SCHEMA_VERSION, MicroRecord, StepRecord, TrajectoryManifest

_SCHEMA = """
CREATE TABLE steps (
    step INTEGER PRIMARY KEY, batch_id INTEGER NOT NULL, epoch REAL NOT NULL, micro_steps INTEGER NOT NULL,
    lr TEXT NOT NULL, loss REAL, denominator REAL NOT NULL, grad_norm REAL, clip_coef REAL NOT NULL,
    applied INTEGER NOT NULL, micro_batches TEXT NOT NULL, random_state BLOB, u_norm REAL, checksum TEXT NOT NULL,
    tensors TEXT)
"""


def step_folder(step: int) -> str:
    return f"steps/step-{step:08d}"


def snapshot_folder(step: int) -> str:
    return f"snapshots/step-{step}"


class LogWriter:
    """Appends steps to a new log directory. All ranks construct it and call every method together.

    Args:
        log_dir: A directory that does not exist yet, or is empty.
        manifest: Written first.
        layout: Layout of the vectors that will be passed.
    """

    def __init__(self, log_dir: str | Path, manifest: TrajectoryManifest, layout: ShardLayout) -> None:
        self.path, self.manifest, self.layout = Path(log_dir), manifest, layout
        self._database: sqlite3.Connection | None = None
        self._snapshots: set[int] = set()
        with agreement(layout.group):
            if layout.rank == 0:
                if self.path.exists() and any(self.path.iterdir()):
                    raise LmcError(f"log_dir {self.path} is not empty: choose another, or remove the old log first")
                (self.path / "snapshots").mkdir(parents=True)
                (self.path / "steps").mkdir()
                write_json(self.path / "manifest.json", manifest.to_json())
                self._database = sqlite3.connect(self.path / "steps.sqlite")
                self._database.execute(_SCHEMA)
                self._database.commit()

    def snapshot(self, step: int, vectors: dict[str, ShardedVector], scalars: dict[str, Any], checksum: str) -> None:
        """θ_step (`theta`) and optimizer state. Collective."""
        if step in self._snapshots:
            return
        folder = self.path / snapshot_folder(step)
        self._snapshots.add(step)
        save_snapshot(folder, vectors, {"step": step, "checksum": checksum, "scalars": scalars}, self.layout.group)

    def write_update(self, step: int, before: ShardedVector, after: ShardedVector) -> str:
        """This rank's u_step; returns where all ranks' tensors of the step lie. Local."""
        folder = step_folder(step)
        write_shard_file(self.path / folder, self.layout, exact_update(before, after), {"step": str(step)})
        return folder

    def write_row(self, record: StepRecord, tensors: str | None) -> None:
        """One transaction; call on rank 0 after all ranks' tensors are on disk."""
        assert self._database is not None
        states = [micro.random_state for micro in record.micro_batches if micro.random_state is not None]
        row = {
            "step": record.step,
            "batch_id": record.batch_id,
            "epoch": record.epoch,
            "micro_steps": 1 + max((micro.micro_step for micro in record.micro_batches), default=-1),
            "lr": json.dumps(record.lr),
            "loss": record.loss,
            "denominator": record.denominator,
            "grad_norm": record.grad_norm,
            "clip_coef": record.clip_coef,
            "applied": int(record.applied),
            "micro_batches": json.dumps(
                [
                    {
                        "rank": m.rank,
                        "micro_step": m.micro_step,
                        "denominator": m.denominator,
                        "ids": m.sample_ids,
                        "random": m.random_state is not None,
                    }
                    for m in record.micro_batches
                ]
            ),
            "random_state": zlib.compress(b"".join(states)) if states else None,
            "u_norm": record.u_norm,
            "checksum": record.checksum,
            "tensors": tensors,
        }
        columns = ", ".join(row)
        marks = ", ".join(f":{key}" for key in row)
        with self._database:
            self._database.execute(f"INSERT INTO steps ({columns}) VALUES ({marks})", row)

    def trim(self, last_step: int) -> None:
        """Deletes what fell out of the ring: tensors and snapshots that no remaining step needs. Rank 0."""
        if self.manifest.max_steps is None or self.layout.rank != 0:
            return
        window_start = last_step - self.manifest.max_steps + 1
        usable = [step for step in snapshot_steps(self.path) if step <= window_start]
        if not usable:
            return
        first_kept = max(usable)
        for step in usable:
            if step < first_kept:  # out of sight first, so that no half-deleted snapshot is ever taken for a whole one
                doomed = self.path / "snapshots" / f"deleted-{step}"
                (self.path / snapshot_folder(step)).rename(doomed)
                shutil.rmtree(doomed)
        assert self._database is not None
        rows = self._database.execute("SELECT step FROM steps WHERE tensors IS NOT NULL AND step < ?", (first_kept,))
        for (step,) in rows.fetchall():
            with self._database:
                self._database.execute("UPDATE steps SET tensors = NULL WHERE step = ?", (step,))
            shutil.rmtree(self.path / step_folder(step), ignore_errors=True)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def snapshot_steps(log_dir: Path) -> list[int]:
    """Steps N of the whole snapshots θ_N, ascending."""
    folders = (log_dir / "snapshots").glob("step-*")
    numbers = (re.fullmatch(r"step-(\d+)", folder.name) for folder in folders if (folder / "meta.json").is_file())
    return sorted(int(m.group(1)) for m in numbers if m)


class TrajectoryLog:
    """A log opened for reading, at the world size of `group`, whatever the writer's was.

    All ranks open it together (no collective); `theta` and `advance` are collective, the rest is local.

    Raises:
        LmcError: Missing or damaged manifest or step table, gaps, unknown schema.
    """

    def __init__(self, log_dir: str | Path, group: dist.ProcessGroup | None = None) -> None:
        self.path = Path(log_dir)
        if not (self.path / "manifest.json").is_file():
            raise LmcError(f"no trajectory log in '{self.path}': manifest.json is missing")
        values = read_json(self.path / "manifest.json")
        if not isinstance(values, dict) or values.get("schema") != SCHEMA_VERSION:
            schema = values.get("schema") if isinstance(values, dict) else None
            raise LmcError(f"{self.path}/manifest.json has schema {schema}, this version reads {SCHEMA_VERSION}")
        try:
            self.manifest = TrajectoryManifest(**values)
        except TypeError as error:
            raise LmcError(f"{self.path}/manifest.json is damaged: {error}") from None
        self.layout = ShardLayout.of_table(self.manifest.parameters, group)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self._records = self._read_records()
        self.snapshots = snapshot_steps(self.path)

    def _read_records(self) -> list[StepRecord]:
        path = self.path / "steps.sqlite"
        if not path.is_file():
            raise LmcError(f"{path} is missing: the log is incomplete")
        try:
            rows = read_rows(path)
            self._tensors = {row["step"]: row["tensors"] for row in rows}
            records = [read_row(row) for row in rows]
        except (sqlite3.DatabaseError, KeyError, IndexError, ValueError, zlib.error) as error:
            raise LmcError(f"{path} is damaged: {error}") from None
        if not records:
            raise LmcError(f"{path} holds no step: nothing was trained")
        missing = set(range(len(records))) - {record.step for record in records}
        if missing:
            raise LmcError(f"{path} lacks step {min(missing)}: the log has a gap and cannot be used past it")
        return records

    @property
    def num_steps(self) -> int:
        return len(self._records)

    @property
    def first_step(self) -> int:
        """First step from which θ_s can be followed: the oldest snapshot (steps before it left the ring)."""
        return min(self.snapshots, default=self.num_steps)

    @property
    def fingerprint(self) -> str:
        """Digest of the manifest and all step checksums: which run this is."""
        digest = hashlib.blake2b(json.dumps(self.manifest.to_json(), sort_keys=True).encode(), digest_size=16)
        for record in self._records:
            digest.update(str(record.checksum).encode())
        return digest.hexdigest()

    def record(self, step: int) -> StepRecord:
        if not 0 <= step < self.num_steps:
            raise LmcError(f"step {step} is not in the log, which holds steps 0 to {self.num_steps - 1}")
        return self._records[step]

    def records(self) -> Iterator[StepRecord]:
        return iter(self._records)

    def require(self, first_step: int, updates: bool = True) -> None:
        """Checks, without reading tensors, that all that steps ≥ first_step need is there. Local.

        Raises:
            LmcError: A step fell out of the ring, the tier holds no updates, or a file is missing.
        """
        if not self.snapshots or first_step < self.first_step:
            raise LmcError(
                f"step {first_step} fell out of the ring of log {self.path}: steps {self.first_step} to "
                f"{self.num_steps - 1} remain (max_steps={self.manifest.max_steps}, "
                f"save_interval={self.manifest.save_interval}; a larger max_steps, or null, would have kept it)"
            )
        if not updates:
            return
        if self.manifest.storage == "replay":
            raise LmcError(
                f"log {self.path} has storage 'replay', which keeps no updates u_s to propagate along: "
                "use replay_head=all, or train with log.storage=update"
            )
        for step in range(self.nearest_snapshot(first_step), self.num_steps):
            if self.record(step).applied:
                self._reader(step).check()

    def nearest_snapshot(self, step: int) -> int:
        """Latest snapshot N ≤ step."""
        usable = [n for n in self.snapshots if n <= step]
        if not usable:
            raise LmcError(f"no snapshot at or before step {step} in {self.path}: it fell out of the ring")
        return max(usable)

    def _reader(self, step: int) -> ShardReader:
        folder = self._tensors[step]
        if folder != step_folder(step):  # never a path that a damaged or foreign table names
            raise LmcError(f"the update of step {step} is not in log {self.path} (storage or ring)")
        rule = self.manifest.partition
        return ShardReader(self.path / folder, self.layout, rule, f"log {self.path}, step {step}")  # type: ignore[arg-type]

    def update(self, step: int) -> ShardedVector:
        """u_s = θ_{s+1} − θ_s; zero for a step that was not applied. Local."""
        if not self.record(step).applied:
            return ShardedVector.zeros(self.layout, self.dtype)
        return self._reader(step).read(self.dtype)

    def snapshot(self, step: int) -> tuple[dict[str, ShardedVector], dict[str, Any]]:
        """Vectors (`theta`, optimizer state) and scalars of snapshot N, verified. Collective."""
        folder = self.path / snapshot_folder(step)
        with agreement(self.layout.group):
            meta = read_json(folder / "meta.json")
        try:
            vectors = load_snapshot(folder, self.layout, meta["kinds"], self.dtype)
        except (Exception, CheckpointException) as error:  # DCP agrees on errors itself, so all ranks arrive here
            raise AgreedError(f"snapshot {folder} is damaged: {str(error).strip().splitlines()[-1]}") from error
        self._verify(vectors["theta"], meta["checksum"], f"snapshot {folder}")
        return vectors, meta["scalars"]

    def theta(self, step: int) -> ShardedVector:
        """θ_s from the nearest snapshot and the updates after it, bit for bit, 0 ≤ s ≤ τ. Collective."""
        if not 0 <= step <= self.num_steps:
            raise LmcError(f"θ_{step} is not in the log, which holds θ_0 to θ_{self.num_steps}")
        start = self.nearest_snapshot(step)
        theta = self.snapshot(start)[0]["theta"]
        for s in range(start, step):
            self.advance(theta, s)
        return theta

    def advance(self, theta: ShardedVector, step: int) -> ShardedVector:
        """θ_s → θ_{s+1} in place and exactly, verified by checksum; returns u_s. Collective."""
        record = self.record(step)
        update = ShardedVector.zeros(self.layout, self.dtype)
        with agreement(self.layout.group):
            if record.applied:
                reader = self._reader(step)
                update = reader.read(self.dtype)
                theta.add_(update)
                reader.apply_fixes(theta)
        self._verify(theta, record.checksum, f"log {self.path}: θ after step {step}")
        return update

    def _verify(self, theta: ShardedVector, expected: str | None, what: str) -> None:
        total = local_checksum(theta)
        if self.layout.world_size > 1:
            dist.all_reduce(total, group=self.layout.group)
        if format_checksum(total) != expected:
            raise AgreedError(f"{what} does not have the logged checksum: the log is damaged")


def read_rows(path: Path) -> list[sqlite3.Row]:
    """All rows of the step table; a transaction that a killed writer left open is rolled back where we may write."""
    for mode in ("rw", "ro"):
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True)) as connection:
                connection.row_factory = sqlite3.Row
                return connection.execute("SELECT * FROM steps ORDER BY step").fetchall()
        except sqlite3.OperationalError:
            if mode == "ro":
                raise
    raise AssertionError


def read_row(row: sqlite3.Row) -> StepRecord:
    """A row of the step table as a record."""
    micros = json.loads(row["micro_batches"])
    states: list[bytes | None] = [None] * len(micros)
    if row["random_state"] is not None:
        blob = zlib.decompress(row["random_state"])
        drew = [i for i, m in enumerate(micros) if m["random"]]
        size = len(blob) // len(drew)
        for place, i in enumerate(drew):
            states[i] = blob[place * size : (place + 1) * size]
    return StepRecord(
        step=int(row["step"]),
        batch_id=int(row["batch_id"]),
        micro_batches=tuple(
            MicroRecord(m["rank"], m["micro_step"], tuple(m["ids"]), m["denominator"], state)
            for m, state in zip(micros, states, strict=True)
        ),
        lr=tuple(json.loads(row["lr"])),
        denominator=row["denominator"],
        epoch=row["epoch"],
        loss=row["loss"],
        grad_norm=row["grad_norm"],
        clip_coef=row["clip_coef"],
        applied=bool(row["applied"]),
        u_norm=row["u_norm"],
        checksum=row["checksum"],
    )
