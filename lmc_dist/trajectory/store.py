"""The log on disk (docs/log_format.md), opened for reading at any world size."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement
from lmc_dist.shards.checksum import format_checksum, local_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.edits import read_edits
from lmc_dist.trajectory.files import step_folder
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.prefetch import Prefetch
from lmc_dist.trajectory.reader import FLOATS, Fix, ShardReader, apply_fixes, rank_files
from lmc_dist.trajectory.record import TIERS, StepRecord
from lmc_dist.trajectory.sealed import require_plain
from lmc_dist.trajectory.snapshots import read_meta, read_snapshot, snapshot_folder, snapshot_steps
from lmc_dist.trajectory.table import TABLE_FILE, Digests, decode_digests, decode_row, decode_sample, read_rows

# What says how a run was kept, not which run it is: pruning changes it, the log's fingerprint does not depend on it.
_STORAGE_FIELDS = (
    "storage",
    "save_interval",
    "max_steps",
    "partition",
    "update_dtype",
    "gradient_dtype",
    "compression",
    "save_batch_data",
)


class TrajectoryLog:
    """A log opened for reading, at the world size of `group`, whatever the writer's was.

    All ranks open it together (no collective); `theta`, `advance`, `snapshot` are collective, the rest is local.
    A log that is being written, or whose writer was killed, opens with the steps that are whole.

    Args:
        log_dir: The log.
        group: The ranks that read it.
        stop: Open it as if it ended before this step, whatever comes after.

    Raises:
        LmcError: Missing or damaged manifest or step table, gaps, unknown schema.
    """

    def __init__(self, log_dir: str | Path, group: dist.ProcessGroup | None = None, stop: int | None = None) -> None:
        self.path = Path(log_dir)
        self.manifest = read_manifest(self.path)
        for name in ("steps", "snapshots"):
            if (self.path / name).is_symlink():
                require_plain(self.path / name)
        self.layout = ShardLayout.of_table(self.manifest.parameters, group)
        self.dtype = FLOATS[self.manifest.dtype]
        finished = snapshot_steps(self.path)  # before the table is read: more may be finished meanwhile
        rows = readable_rows(self.path)
        if stop is not None:
            rows = {step: row for step, row in rows.items() if step < stop}
            finished = [step for step in finished if step <= stop]
        if not rows:
            raise LmcError(f"{self.path / TABLE_FILE} holds no step: nothing was trained")
        if missing := set(range(len(rows))) - set(rows):
            raise LmcError(
                f"{self.path / TABLE_FILE} lacks step {min(missing)}: the log has a gap and cannot be used past it"
            )
        self._records = [rows[step][0] for step in range(len(rows))]
        self._ahead: Prefetch[tuple[ShardedVector, list[Fix]]] | None = None
        self._digests = {step: digests for step, (_, digests) in rows.items()}
        if finished and finished[-1] > len(rows):
            raise LmcError(
                f"{self.path / TABLE_FILE} ends at step {len(rows) - 1} and there is a snapshot of step {finished[-1]}, which "
                "is written after all rows before it: rows were lost"
            )
        self.snapshots = finished
        self.edits = read_edits(self.path, finished)

    @property
    def num_steps(self) -> int:
        return len(self._records)

    @property
    def first_step(self) -> int:
        """First step from which θ_s can be followed: the oldest snapshot (steps before it left the ring)."""
        return min(self.snapshots, default=self.num_steps)

    @property
    def fingerprint(self) -> str:
        """Digest of the manifest and all step checksums: which run this is, however it is stored."""
        run = {key: value for key, value in self.manifest.to_json().items() if key not in _STORAGE_FIELDS}
        run["segments"] = [
            {key: value for key, value in segment.items() if key not in _STORAGE_FIELDS} for segment in run["segments"]
        ]
        digest = hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=16)
        for record in self._records:
            digest.update(str(record.checksum).encode())
            if (edit := self.edits.get(record.step + 1)) is not None:
                digest.update(json.dumps(edit.to_json(), sort_keys=True).encode())
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
        kind = self._followed_kind
        for step in range(self.nearest_anchor(first_step), self.num_steps):
            if self.record(step).applied:
                self._reader(step, kind).check()

    def kinds(self, step: int) -> Digests:
        """Which vectors of a step are kept (`update`, `gradient`, `theta`), with the digests of their files by rank."""
        return self._digests[step] or {}

    def missing(self) -> dict[int, str]:
        """Steps whose tensors the table names and that are not all there, with what is missing. Looks at names only."""
        found = {step: missing_files(self.path, step, self._digests[step]) for step in range(self.num_steps)}
        return {step: problem for step, problem in found.items() if problem}

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files as far as their headers and lengths tell; None where nothing is. Local."""
        try:
            for kind in self.kinds(step):
                self._reader(step, kind).check()
        except LmcError as error:
            return str(error)
        return None

    def nearest_snapshot(self, step: int) -> int:
        """Latest snapshot N ≤ step."""
        usable = [n for n in self.snapshots if n <= step]
        if not usable:
            raise LmcError(f"no snapshot at or before step {step} in {self.path}: it fell out of the ring")
        return max(usable)

    def nearest_anchor(self, step: int) -> int:
        """Latest snapshot N ≤ step that following the log meets exactly; any, unless updates are stored rounded."""
        for n in sorted((n for n in self.snapshots if n <= step), reverse=True):
            log_checksum = self.record(n - 1).log_checksum if n > 0 else None
            if (
                n in self.edits
                or log_checksum is None
                or log_checksum == read_meta(self.path / snapshot_folder(n))["checksum"]
            ):
                return n
        raise LmcError(f"no snapshot at or before step {step} in {self.path} that can be followed from")

    @property
    def _followed_kind(self) -> str:
        return "theta" if "theta" in TIERS[self.manifest.storage] else "update"

    def _reader(self, step: int, kind: str) -> ShardReader:
        if kind not in self.kinds(step):
            raise LmcError(f"the {kind} of step {step} is not in log {self.path} (storage or ring)")
        self._check_memory()
        what, folder = f"log {self.path}, step {step}", self.path / step_folder(step)
        for place in (folder.parent, folder):
            require_plain(place)
        rule, stored = self.manifest.segment(step).partition, self._stored_dtypes(kind)
        return ShardReader(folder, self.layout, rule, what, kind, stored, self.kinds(step)[kind])  # type: ignore[arg-type]

    def _stored_dtypes(self, kind: str) -> set[torch.dtype]:
        """Types of the elements that the log may keep of a vector; rounded updates are exact before a snapshot."""
        if kind == "gradient":
            return {FLOATS[self.manifest.gradient_dtype]}
        return {self.dtype, FLOATS[self.manifest.update_dtype]} if kind == "update" else {self.dtype}

    def _check_memory(self) -> None:
        """Checks that a vector fits this machine at all: the manifest alone says how large it is. Local."""
        needed = self.layout.flat_numel * self.dtype.itemsize
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            raise LmcError(
                f"log {self.path}: a vector takes {needed / 2**30:.1f} GiB on each of {self.layout.world_size} ranks, "
                f"this machine has {present / 2**30:.1f} GiB: use more ranks"
            )

    def update(self, step: int) -> ShardedVector:
        """u_s = θ_{s+1} − θ_s; zero for a step that was not applied. Collective in tier `full`, else local.

        Rounded to bfloat16 where the log keeps it so, with the rounding of the steps before added to it.
        """
        if not self.record(step).applied:
            return ShardedVector.zeros(self.layout, self.dtype)
        if self._followed_kind == "theta":
            return self._reader(step, "theta").read(self.dtype) - self.theta(step)
        return self._reader(step, "update").read(self.dtype)

    def gradient(self, step: int) -> ShardedVector:
        """g_s = ∇L_s(θ_s), unclipped; zero where there was none. Local.

        Raises:
            LmcError: The log's tier does not keep gradients.
        """
        if "gradient" not in TIERS[self.manifest.storage]:
            raise LmcError(
                f"log {self.path} has storage '{self.manifest.storage}', which keeps no gradients: train with "
                "log.storage=gradient (or full)"
            )
        if not self.record(step).applied:
            return ShardedVector.zeros(self.layout, self.dtype)
        return self._reader(step, "gradient").read(self.dtype)

    def snapshot(self, step: int) -> tuple[dict[str, ShardedVector], dict[str, Any]]:
        """Vectors (`theta`, optimizer state) and scalars of snapshot N, verified. Collective."""
        with agreement(self.layout.group):
            self._check_memory()
            if step not in self.snapshots:
                raise LmcError(f"log {self.path} has no snapshot of step {step}; it has {self._snapshot_names()}")
        vectors, meta = read_snapshot(self.path / snapshot_folder(step), self.layout, self.dtype)
        if step > 0 and step not in self.edits and meta["checksum"] != self.record(step - 1).checksum:
            raise AgreedError(
                f"log {self.path}: snapshot {step} does not have the checksum that the row of step {step - 1} has: it is "
                "another run's, or the log is damaged"
            )
        return vectors, meta["scalars"]

    def theta(self, step: int) -> ShardedVector:
        """θ_s as following the log gives it, 0 ≤ s ≤ τ; θ_τ from its snapshot where there is one. Collective.

        Exact to the bit. Where updates are stored rounded, θ_s is off by at most the rounding of one update, and exact
        at snapshots that the logger took at its interval.
        """
        if step == self.num_steps and step in self.snapshots:
            return self.snapshot(step)[0]["theta"]
        return self.followed(step)

    def followed(self, step: int) -> ShardedVector:
        """θ_s from an anchor, or from a stored θ, and the updates after it. Collective."""
        if not 0 <= step <= self.num_steps:
            raise LmcError(f"θ_{step} is not in the log, which holds θ_0 to θ_{self.num_steps}")
        start = self.nearest_anchor(step)
        if any(self.record(s).applied and not self.kinds(s) for s in range(start, step)):
            raise LmcError(
                f"θ_{step} is not in log {self.path} (storage '{self.manifest.storage}'), which keeps no updates that lead "
                f"there: it holds θ at {self._snapshot_names()}; replay() on an engine gives the others"
            )
        stored = [s for s in range(start, step) if "theta" in self.kinds(s)]
        if stored:
            start = stored[-1] + 1
            with agreement(self.layout.group):
                theta = self._reader(stored[-1], "theta").read(self.dtype)
            self._verify(theta, self.record(stored[-1]).checksum, f"log {self.path}: θ after step {stored[-1]}")
        else:
            theta = self.snapshot(start)[0]["theta"]
        with self.read_ahead(start, step):
            for s in range(start, step):
                self.advance(theta, s)
        return theta

    def _snapshot_names(self) -> str:
        names = [str(step) for step in self.snapshots]
        if len(names) > 12:
            names[6:-2] = ["…"]
        return f"{'step' if len(names) == 1 else 'steps'} {', '.join(names)}"

    def advance(self, theta: ShardedVector, step: int) -> ShardedVector:
        """θ_s → θ_{s+1} in place, verified by checksum; returns u_s. Collective.

        Where step s + 1 is edited θ is then what step s led to, not yet corrected (`snapshot` has the corrected one).
        """
        record = self.record(step)
        update = ShardedVector.zeros(self.layout, self.dtype)
        with agreement(self.layout.group):
            if record.applied:
                is_ahead = self._ahead is not None and step in self._ahead
                stored, fixes = self._ahead.take(step) if is_ahead else self._stored(step)  # type: ignore[union-attr]
                if self._followed_kind == "theta":
                    update = stored - theta
                    theta.flat.copy_(stored.flat)
                else:
                    update = stored
                    theta.add_(update)
                    apply_fixes(theta, fixes)
        expected = record.log_checksum or record.checksum
        self._verify(theta, expected, f"log {self.path}: θ after step {step}")
        return update

    def _stored(self, step: int) -> tuple[ShardedVector, list[Fix]]:
        """What `advance` needs of an applied step's files: u_s and its fixes, or θ_{s+1}. Local."""
        reader = self._reader(step, self._followed_kind)
        return reader.read(self.dtype), reader.fixes() if self._followed_kind == "update" else []

    @contextmanager
    def read_ahead(self, start: int, stop: int) -> Iterator[None]:
        """Within it, `advance` from `start` to `stop` finds the next steps read already, by a thread. Local.

        Two vectors at most wait in memory, beside the one that `advance` has returned.
        """
        outer = self._ahead
        self._ahead = Prefetch(self._stored, [step for step in range(start, stop) if self.record(step).applied])
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = outer

    def samples(self) -> SampleDataset:
        """The samples that training saw, by id: what `save_batch_data` kept. Local.

        Raises:
            LmcError: The log keeps ids only.
        """
        if not self.manifest.save_batch_data:
            raise LmcError(
                f"log {self.path} keeps the ids of its samples, not their tokens: give the dataset, or train with "
                "log.save_batch_data=true"
            )
        rows = read_rows(self.path / TABLE_FILE, "samples", "id")
        items = [decode_sample(row) for row in rows]
        return SampleDataset(items, next((row["pad"] for row in rows if row["pad"] is not None), 0))

    def _verify(self, theta: ShardedVector, expected: str | None, what: str) -> None:
        total = local_checksum(theta)
        if self.layout.world_size > 1:
            dist.all_reduce(total, group=self.layout.group)
        if format_checksum(total) != expected:
            raise AgreedError(f"{what} does not have the logged checksum: the log is damaged")


def readable_rows(log_dir: Path) -> dict[int, tuple[StepRecord, Digests | None]]:
    """Step → (record, digests of its files by kind and rank). Local.

    Raises:
        LmcError: The table is missing or damaged.
    """
    path = log_dir / TABLE_FILE
    try:
        return {row["step"]: (decode_row(row), decode_digests(row)) for row in read_rows(path)}
    except (LmcError, KeyError, TypeError) as error:
        raise LmcError(f"{path} is damaged: {error}" if str(path) not in str(error) else str(error)) from None


def missing_files(log_dir: Path, step: int, digests: Digests | None) -> str | None:
    """What is missing of a step's files that the table names; None where all are there. Local."""
    folder = log_dir / step_folder(step)
    for kind, by_rank in (digests or {}).items():
        present = {rank for rank, _ in rank_files(folder, kind)}
        if absent := sorted(set(range(len(by_rank))) - present):
            return f"the {kind} of rank {absent[0]} of {len(by_rank)} is missing in {folder}"
    return None
