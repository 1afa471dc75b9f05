"""The ledger of a run's deletion requests: an SQLite file beside the log that many may write to and training reads.

A request goes through `pending` → `decided` (at a step, on disk before anything is computed) → `applied`, `excluded` (training had
not seen it), `refused` or `rejected`. Ids are kept as salted digests only; training finds the ids among those that it knows.
SQLite's rollback journal with file locks is what a shared file system can be trusted with; no service is needed.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from lmc_dist.audit.digests import SALT_FILE, read_salt, salt_at, salted_digest
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.database import check_files, ensure_tables, holds_nothing, open_database
from lmc_dist.trajectory.files import ledger_folder
from lmc_dist.trajectory.sealed import require_plain

Unit = Literal["sample", "batch"]
Status = Literal["pending", "decided", "applied", "excluded", "refused", "rejected"]

ANSWERED: tuple[Status, ...] = ("decided", "applied", "excluded", "refused")

TABLE_FILE = "requests.sqlite"
CHAIN_FILE = "chain.jsonl"
MOST_TARGETS = 1_000_000  # of a request; a larger one is split
_MOST_BYTES = 64 << 20
BUSY_SECONDS = 60.0
_NAME = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
SCHEMA = """CREATE TABLE requests (
    name TEXT PRIMARY KEY, received REAL NOT NULL, unit TEXT NOT NULL, samples TEXT NOT NULL, batches TEXT NOT NULL,
    status TEXT NOT NULL, step INTEGER, result TEXT)"""
_COLUMNS = "rowid, name, received, unit, samples, batches, status, step, result"


@dataclass(frozen=True)
class Request:
    """A deletion request as the ledger keeps it.

    Attributes:
        name: Digest of what is asked for: the same request has the same name.
        received: Seconds since 1970.
        unit: `sample` forgets samples; `batch` takes back the whole batches that held them, the samples' companions
            are learned again later.
        samples: Salted digests of sample ids.
        batches: Batches of the log that are taken back.
        status: How far it is.
        step: Step boundary at which it was decided.
        result: What came of it, or why it was not done.
    """

    name: str
    received: float
    unit: Unit
    samples: tuple[str, ...]
    batches: tuple[int, ...]
    status: Status
    step: int | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


class Malformed(LmcError):
    """A row that no writer of this package makes.

    Attributes:
        row: Its number in the table.
        reason: What is wrong with it.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"request in row {row}: {reason}")
        self.row, self.reason = row, reason


def asked_before(log_dir: str | Path) -> bool:
    """Whether a run has answered requests. Local.

    Raises:
        LmcError: Its ledger cannot be read.
    """
    folder = ledger_folder(log_dir)
    return (folder / TABLE_FILE).exists() and any(Ledger(folder).requests(*ANSWERED))


def ledger_salt(folder: Path) -> bytes:
    """The salt of a ledger, which is made only where there are no requests yet. Local.

    Raises:
        LmcError: It is missing beside requests: another one would give their digests no meaning, and what they are about
            would be trained on again.
    """
    path = folder / SALT_FILE
    return salt_at(path) if holds_nothing(folder / TABLE_FILE) else read_salt(path)


class Ledger:
    """A ledger, made where there is none. Local; training's first rank and any number of requesters open one.

    Args:
        folder: `ledger_folder` of the log.

    Raises:
        LmcError: Not a ledger, one without its salt, a link, or a folder that cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LmcError(f"the ledger {self.folder} cannot be made: {error.strerror or error}") from None
        require_plain(self.folder)
        self.path = self.folder / TABLE_FILE
        self.salt = ledger_salt(self.folder)
        if holds_nothing(self.path):
            with self._open():
                pass

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction, which waits its turn among all writers; the first one makes the table."""
        if self.path.exists():
            check_files(self.path)
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = EXTRA")
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("BEGIN IMMEDIATE")
                ensure_tables(connection, SCHEMA, self.path)
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise LmcError(f"the ledger {self.path} cannot be used: {error}") from None

    # --- requesters ------------------------------------------------------------------------------------------------

    def submit(
        self, sample_ids: Iterable[int] = (), batches: Iterable[int] = (), unit: Unit = "sample"
    ) -> tuple[Request, bool]:
        """Files a request; returns it, and whether it is new. A request that is there is not filed again.

        Raises:
            LmcError: Nothing to forget, ids that are none, or too many.
        """
        samples, whole = sorted(set(sample_ids)), sorted(set(batches))
        check_targets(samples, whole, unit)
        digests = tuple(sorted(salted_digest(self.salt, i) for i in samples))
        request = Request(
            request_name(self.salt, unit, digests, whole), time.time(), unit, digests, tuple(whole), "pending"
        )
        with self._open() as connection:
            known = connection.execute(f"SELECT {_COLUMNS} FROM requests WHERE name = ?", (request.name,)).fetchone()
            if known is not None:
                return decode(known, self.salt), False
            values = (
                request.name,
                request.received,
                unit,
                json.dumps(digests),
                json.dumps(whole),
                "pending",
                None,
                None,
            )
            connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        return request, True

    # --- training ----------------------------------------------------------------------------------------------------

    def has_pending(self) -> bool:
        """Whether something waits to be decided."""
        with open_database(self.path, SCHEMA) as connection:
            found = connection.execute("SELECT 1 FROM requests WHERE status = 'pending' LIMIT 1").fetchone()
            return found is not None

    def requests(self, *statuses: Status) -> tuple[list[Request], list[Malformed]]:
        """(requests of some statuses, or of all, in the order in which they came; rows that no writer makes)."""
        marks = ", ".join("?" for _ in statuses)
        where = f"WHERE status IN ({marks})" if statuses else ""
        size = f"length(samples) + length(batches) + coalesce(length(result), 0) <= {_MOST_BYTES}"
        columns = (
            f"rowid, name, received, unit, iif({size}, samples, ''), iif({size}, batches, ''), status, step, result"
        )
        with open_database(self.path, SCHEMA) as connection:
            rows = connection.execute(
                f"SELECT {columns} FROM requests {where} ORDER BY received, name", statuses
            ).fetchall()
        good, bad = [], []
        for row in rows:
            try:
                good.append(decode(tuple(row), self.salt))
            except Malformed as error:
                bad.append(error)
        return good, bad

    def decide(self, names: Iterable[str], step: int, since: tuple[Status, ...] = ("pending",)) -> None:
        """Notes that requests are answered at a step boundary, before it is done.

        Args:
            names: Of the requests.
            step: The boundary.
            since: What they are until then; `ANSWERED` where a crash has taken their answers back.
        """
        marks = ", ".join("?" for _ in since)
        with self._open() as connection:
            connection.executemany(
                f"UPDATE requests SET status = 'decided', step = ? WHERE name = ? AND status IN ({marks})",
                [(step, name, *since) for name in names],
            )

    def finish(self, name: str, status: Status, result: Mapping[str, Any]) -> None:
        """Notes what came of a request; once is enough, and a second time changes nothing."""
        with self._open() as connection:
            connection.execute(
                "UPDATE requests SET status = ?, result = ? WHERE name = ? AND status IN ('pending', 'decided')",
                (status, json.dumps(dict(result)), name),
            )

    def reject(self, row: int, reason: str) -> None:
        """Puts a row aside that no writer makes, without looking at it again."""
        with self._open() as connection:
            result = json.dumps({"reason": reason})
            connection.execute("UPDATE requests SET status = 'rejected', result = ? WHERE rowid = ?", (result, row))


def check_targets(samples: Sequence[Any], batches: Sequence[Any], unit: str) -> None:
    """Checks what a request asks for. Pure.

    Raises:
        LmcError: Nothing, too much, ids that are none, or an unknown unit.
    """
    if unit not in ("sample", "batch"):
        raise LmcError(f"a request is for the unit 'sample' or 'batch', not {str(unit)[:40]!r}")
    if not samples and not batches:
        raise LmcError("the request names nothing to forget: give sample ids or batches")
    if samples and batches:
        raise LmcError("a request names samples or batches, not both: file two")
    if len(samples) + len(batches) > MOST_TARGETS:
        raise LmcError(f"the request names {len(samples) + len(batches)} targets, at most {MOST_TARGETS} go into one")
    for i in (*samples, *batches):
        if type(i) is not int or not 0 <= i < 2**63:
            raise LmcError(f"{str(i)[:40]!r} is no id: ids are integers in 0..2**63-1")


def request_name(salt: bytes, unit: str, samples: Iterable[str], batches: Iterable[int]) -> str:
    """Digest of what is asked for, whatever the order. Pure."""
    text = json.dumps([unit, sorted(samples), sorted(batches)])
    return blake2b(text.encode(), digest_size=16, key=salt).hexdigest()


def decode(row: Sequence[Any], salt: bytes) -> Request:
    """A row of the table as a request. Pure.

    Raises:
        Malformed: It is none.
    """
    number, name, received, unit, samples, batches, status, step, result = row
    try:
        digests, whole = tuple(json.loads(samples)), tuple(json.loads(batches))
        found = json.loads(result) if result is not None else {}
    except (TypeError, ValueError, RecursionError):
        raise Malformed(number, "its targets are no lists, or too large") from None
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise Malformed(number, "its name is none")
    if not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in digests):
        raise Malformed(number, "its samples are no digests")
    if unit not in ("sample", "batch") or not isinstance(received, (int, float)) or not isinstance(found, dict):
        raise Malformed(number, "its unit, time or result is none")
    try:
        check_targets((), whole, unit) if whole or not digests else None
    except LmcError as error:
        raise Malformed(number, str(error)) from None
    if len(digests) > MOST_TARGETS:
        raise Malformed(number, f"it names {len(digests)} samples, at most {MOST_TARGETS} go into one")
    if request_name(salt, unit, digests, whole) != name:
        raise Malformed(number, "its name is not that of its targets")
    return Request(name, float(received), unit, digests, whole, status, step, found)
