"""An audit chain as it is read: its records, and what is not as it was written (see chain.py for the files)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmc_dist.audit.keys import Verifier
from lmc_dist.audit.record import GENESIS, Head, check_record, read_head
from lmc_dist.errors import LmcError


def head_path(path: Path) -> Path:
    """Of a chain's file."""
    return path.with_suffix(".head.json")


@dataclass
class ChainReport:
    """What verifying a chain found.

    Attributes:
        records: Whole records.
        problems: What is not as it was written, with line numbers; empty for a chain that is whole.
        notes: What a crash left, which is no fault.
        signed: Whether its records carry signatures; they are checked where a key was given.
        head: Digest of the last record; of nothing, `GENESIS`.
    """

    records: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    signed: bool = False
    head: str = GENESIS


@dataclass(frozen=True)
class Start:
    """Where reading begins: all before it has been read."""

    offset: int = 0
    count: int = 0
    last: str = GENESIS
    signed: bool = False


def head_of(path: Path, verifier: Verifier | None) -> Head:
    try:
        return read_head(head_path(path).read_bytes(), verifier)
    except FileNotFoundError:
        raise LmcError("missing: it was removed") from None
    except OSError as error:
        raise LmcError(f"cannot be read: {error.strerror or error}") from None


def read_chain(
    path: Path, verifier: Verifier | None, start: Start | None = None
) -> tuple[list[dict[str, Any]], ChainReport]:
    """(records from a place on, what was found); of a line that is no record there is a problem and no record."""
    start = start or Start()
    records, report = [], ChainReport(start.count, signed=start.signed, head=start.last)
    digests = [start.last]  # of the record before the first, and of each
    previous: str | None = start.last
    torn = False
    if path.exists():
        with path.open("rb") as file:
            file.seek(start.offset)
            for line in file:
                if torn := not line.endswith(b"\n"):
                    break
                place = f"line {report.records + 1}"
                record, wrong = check_record(line[:-1], report.records, previous, verifier)
                if record is not None and report.records and ("signature" in record) != report.signed:
                    wrong.append("is signed and the one before is not, or the other way round")
                report.problems += [f"{place}: {problem}" for problem in wrong]
                report.records += 1
                previous = None if record is None else str(record["digest"])
                digests.append(previous or "")
                if record is not None:
                    records.append(record)
                    report.signed = "signature" in record
    report.head = digests[-1]
    try:
        head = head_of(path, verifier)
    except LmcError as error:
        report.problems.append(f"{head_path(path).name}: {error}")
        return records, report
    behind = report.records - head.count
    if report.records and head.is_signed != report.signed:
        report.problems.append(f"{head_path(path).name}: it and the records are not both signed")
    if behind < 0:
        report.problems.append(
            f"after line {report.records}: {-behind} records are missing, the head counts {head.count}"
        )
    elif behind > 1 or (behind and torn):
        report.problems.append(
            f"the head counts {head.count} records and there are {report.records}: it is an earlier one"
        )
    elif head.count < start.count or digests[head.count - start.count] != head.digest:
        report.problems.append(f"line {head.count}: the head has another digest for this record")
    elif behind:
        report.notes.append(
            f"line {report.records}: written and not acknowledged: the process ended before it could be"
        )
    elif torn:
        report.notes.append(f"line {report.records + 1}: torn, never acknowledged: the process ended while writing it")
    return records, report


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Holds a chain against other processes. Local.

    A reader makes no lock file: where there is none, or no right to open it, nobody has appended.
    """
    lock = path.with_suffix(".lock")
    if shared:
        try:
            descriptor = os.open(lock, os.O_RDONLY)
        except OSError:
            yield
            return
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
