"""What a log directory holds, read as far as it can be: for looking at logs that are damaged, cut off or being written.

`TrajectoryLog` refuses a damaged log; here damage is found, listed and passed over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import PartitionRule
from lmc_dist.trajectory.database import open_database
from lmc_dist.trajectory.edits import EDIT_FILE, LogEdit, read_edits
from lmc_dist.trajectory.files import MANIFEST_FILE, step_folder
from lmc_dist.trajectory.lock import LOCK_FILE, STALE_SECONDS, heartbeat_age, is_dead, read_holder
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.record import TIERS, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.snapshots import snapshot_folder, snapshot_steps
from lmc_dist.trajectory.store import missing_files
from lmc_dist.trajectory.table import SCHEMA, TABLE_FILE, Digests, decode_digests, decode_row


@dataclass(frozen=True)
class Problem:
    """One place of a log that is not as it was written, named as closely as is known.

    Attributes:
        message: What is wrong there.
        step: Of the row or of the file.
        rank: That wrote the file.
        kind: Vector: `update`, `gradient`, `theta`, optimizer state.
        tensor: Parameter.
        snapshot: N of snapshot θ_N.
        sample: Id of a sample.
        file: Relative to the log, or another part of it.
    """

    message: str
    step: int | None = None
    rank: int | None = None
    kind: str | None = None
    tensor: str | None = None
    snapshot: int | None = None
    sample: int | None = None
    file: str | None = None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        named = {
            "snapshot": self.snapshot,
            "step": self.step,
            "rank": self.rank,
            "": self.kind,
            "tensor": self.tensor,
            "sample": self.sample,
        }
        words = [f"{name} {value}".strip() for name, value in named.items() if value is not None]
        return ", ".join(words or [str(self.file)])

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class LogContents:
    """A log directory as it is.

    Attributes:
        path: The directory.
        manifest: None where it is damaged.
        records: Step → its record, as far as rows are whole.
        digests: Step → digests of its files by kind and rank, of the same rows.
        num_steps: One past the last row.
        snapshots: N of all snapshots that were finished.
        edits: Corrections made in mid-training, by step.
        problems: What was found damaged on the way.
    """

    path: Path
    manifest: TrajectoryManifest | None = None
    records: dict[int, StepRecord] = field(default_factory=dict)
    digests: dict[int, Digests] = field(default_factory=dict)
    num_steps: int = 0
    snapshots: list[int] = field(default_factory=list)
    edits: dict[int, LogEdit] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def rule(self, step: int) -> PartitionRule:
        """How the files of a step are cut."""
        assert self.manifest is not None
        return self.manifest.segment(step).partition  # type: ignore[return-value]

    def files(self) -> Iterator[tuple[int, str, int, int, str]]:
        """(step, kind, rank, ranks, digest) of every shard file that the table names."""
        for step, kinds in sorted(self.digests.items()):
            for kind, by_rank in kinds.items():
                for rank, digest in enumerate(by_rank):
                    yield step, kind, rank, len(by_rank), digest

    def incomplete(self) -> dict[int, str]:
        """Steps that are not whole, with what is missing; of files only the names are looked at."""
        found = {}
        for step in range(self.num_steps):
            if step not in self.records:
                found[step] = "its row is missing or damaged"
            elif problem := missing_files(self.path, step, self.digests.get(step)):
                found[step] = problem
        return found

    def unbroken_from(self) -> int:
        """First step from which the log names the updates (in tier `full`, θ) of all steps to its end. Pure.

        Corrections can start at the snapshots from there on; a ring that keeps θ_0 has earlier ones, for replay alone.
        """
        assert self.manifest is not None
        kind = "theta" if "theta" in TIERS[self.manifest.storage] else "update"
        step = self.num_steps
        while record := self.records.get(step - 1):
            if record.applied and kind not in self.digests.get(record.step, {}):
                break
            step = record.step
        return step

    def leftovers(self) -> list[Path]:
        """Files and folders that nothing names: what an interrupted step, snapshot or deletion left behind."""
        named = {Path(step_folder(step)).name: kinds for step, kinds in self.digests.items()}
        known = {Path(snapshot_folder(step)).name for step in self.snapshots}
        found = [path for path in (self.path / "snapshots").glob("*") if path.name not in known]
        damaged = {Path(step_folder(step)).name for step in range(self.num_steps)} - set(named)  # theirs may be whole
        for folder in (self.path / "steps").glob("*"):
            kinds = named.get(folder.name)
            if folder.name in damaged:
                continue
            if kinds is None:
                found.append(folder)
            else:
                found += [path for path in folder.iterdir() if path.name.split(".")[0] not in kinds]
                found += [path for path in folder.glob("*.part") if path.name.split(".")[0] in kinds]
        return sorted(found)


def read_contents(log_dir: str | Path) -> LogContents:
    """A log directory as far as it can be read. Local.

    Raises:
        LmcError: There is no log.
    """
    path = Path(log_dir)
    if not (path / MANIFEST_FILE).exists():
        raise LmcError(f"no trajectory log in '{path}': {MANIFEST_FILE} is missing")
    found = LogContents(path)
    try:
        found.manifest = read_manifest(path)
    except LmcError as error:
        found.problems.append(Problem(str(error), file=MANIFEST_FILE))
    for number, row in _rows(path, found.problems):
        try:
            record, digests = decode_row(row), decode_digests(row) or {}
        except LmcError as error:
            found.problems.append(Problem(f"{TABLE_FILE}: {error}", step=number, file=TABLE_FILE))
            continue
        found.records[record.step], found.digests[record.step] = record, digests
        found.num_steps = max(found.num_steps, record.step + 1)
    damaged = {problem.step for problem in found.problems}
    found.num_steps = max([found.num_steps, *(step + 1 for step in damaged if step is not None)])
    for step in range(found.num_steps):
        if step not in found.records and step not in damaged:
            found.problems.append(Problem(f"{TABLE_FILE} has no row of it", step=step, file=TABLE_FILE))
    found.snapshots = [step for step in snapshot_steps(path) if step <= found.num_steps]
    for step in found.snapshots:
        try:
            found.edits |= read_edits(path, [step])
        except LmcError as error:
            found.problems.append(Problem(str(error), snapshot=step, file=EDIT_FILE))
    return found


def _rows(log_dir: Path, problems: list[Problem]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(step, row) of the step table, each read on its own so that a damaged one costs no other."""
    try:
        with open_database(log_dir / TABLE_FILE, SCHEMA) as connection:
            for (line,) in connection.execute("PRAGMA integrity_check(20)"):
                if line != "ok":
                    problems.append(Problem(f"{TABLE_FILE} is damaged: {' '.join(line.split())}", file=TABLE_FILE))
            numbers = [number for (number,) in connection.execute("SELECT step FROM steps ORDER BY step")]
            for number in numbers:
                try:
                    row = connection.execute("SELECT * FROM steps WHERE step = ?", (number,)).fetchone()
                except sqlite3.DatabaseError as error:
                    problems.append(Problem(f"{TABLE_FILE}: {error}", step=number, file=TABLE_FILE))
                    continue
                if row is not None:
                    yield number, dict(row)
    except LmcError as error:
        problems.append(Problem(str(error), file=TABLE_FILE))


def writer_of(log_dir: Path) -> str | None:
    """Which living job writes a log; None where none does. Local."""
    holder = read_holder(log_dir / LOCK_FILE)
    if holder is None:
        return None
    try:
        age = heartbeat_age(log_dir / LOCK_FILE)
    except OSError:  # a log that we may only read
        age = 0.0
    if is_dead(holder, age, STALE_SECONDS):
        return None
    return f"process {holder.get('pid')} on {holder.get('host')}"


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; of one that vanishes meanwhile none. Local."""
    total = 0
    for file in (path, *path.rglob("*")):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
