"""An append-only audit: a file of records, each with the digest of the one before, and a head that counts them.

    chain.jsonl       one record a line (lmc_dist/audit/record.py)
    chain.head.json   how many there are and the digest of the last, replaced after each append
    chain.lock        held while a process appends or verifies

An append writes and syncs the line, then replaces the head. The head of an empty chain is written before its first line,
so that a chain without a head is never what a crash leaves. A process that dies in between leaves one of two states, which
are told apart from removal and edits:

    a last line without its end, head = whole lines        torn: `append` had not returned; cut off by the next one
    one whole record beyond the head                       written, not acknowledged; the next append moves the head
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmc_dist.audit.keys import Signer, Verifier
from lmc_dist.audit.reading import ChainReport, Start, head_of, head_path, locked, read_chain
from lmc_dist.audit.record import GENESIS, canonical, make_record, write_head
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.files import fsync_path

logger = logging.getLogger(__name__)


class AuditChain:
    """A chain that is appended to. Local: one process of a job (rank 0); several jobs may share one file.

    Args:
        path: Of the chain, such as `OUTPUT/audit/chain.jsonl`; it and its head are made by the first append.
        signing_key: PEM file of an Ed25519 private key; None signs nothing. A chain is signed from its first record on, by
            one key, or not at all.

    Raises:
        LmcError: The key cannot be used.
    """

    def __init__(self, path: str | Path, signing_key: str | Path | None = None) -> None:
        self.path = Path(path)
        self._signer = None if signing_key is None else Signer(signing_key)
        self._verifier = None if self._signer is None else self._signer.verifier
        self._forget()

    def append(self, event: str, body: dict[str, Any], event_id: str | None = None) -> str:
        """Adds a record, on disk when it returns; returns its digest.

        Args:
            event: What happened.
            body: JSON. Personal data does not belong here: ids only as `digests.salted_digest`.
            event_id: An event that has one is in the chain once: the same event again changes nothing.

        Raises:
            LmcError: The chain does not verify, the id has another content, or a body that JSON cannot say.
        """
        content = canonical([event, body])
        with locked(self.path), self._remembered():
            self._catch_up()
            if event_id is not None and event_id in self._known:
                before, known = self._known[event_id]
                if before != content:
                    raise LmcError(f"{self.path}: event {event_id!r} is in the chain already, with another content")
                return known
            record = make_record(self._count, event, body, event_id, self._last, self._signer)
            self._write(canonical(record) + b"\n")
            self._take(record)
            self._replace_head()
        return str(record["digest"])

    def records(self) -> list[dict[str, Any]]:
        """All whole records.

        Raises:
            LmcError: The chain does not verify.
        """
        if not head_path(self.path).exists() and not self.path.exists():
            return []
        with locked(self.path, shared=True):
            found, report = read_chain(self.path, self._verifier)
        _require(self.path, report)
        return found

    def check(self) -> None:
        """Checks, without writing, that the chain can go on with this key.

        Raises:
            LmcError: It does not verify, or is signed otherwise.
        """
        if head_path(self.path).exists() or self.path.exists():
            with locked(self.path, shared=True):
                _, report = read_chain(self.path, self._verifier)
            self._require_own(report)

    # --- writing, under the lock ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Nothing is known of the file: the next append reads it from its start."""
        self._end, self._count, self._last, self._signed = 0, 0, GENESIS, False
        self._known: dict[str, tuple[bytes, str]] = {}  # event id → content, digest

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        """A write that fails (a full disk) leaves a record that may be there and a head that does not count it."""
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def _catch_up(self) -> None:
        """Reads what was added since the last look, and clears up what a crash left."""
        if not self.path.exists() and not head_path(self.path).exists() and not self._count:
            self._replace_head()
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._end:
            raise LmcError(f"{self.path} became shorter while it was open: records were removed")
        start = Start(self._end, self._count, self._last, self._signed)
        found, report = read_chain(self.path, self._verifier, start)
        self._require_own(report)
        for record in found:
            self._take(record)
        if size > self._end:
            logger.warning("%s: a torn last line, never acknowledged, is cut off", self.path)
            os.truncate(self.path, self._end)
            fsync_path(self.path)
        if report.notes and head_of(self.path, self._verifier).count != self._count:
            self._replace_head()

    def _require_own(self, report: ChainReport) -> None:
        if report.records and report.signed != (self._signer is not None):
            kinds = ("signed", "without a key") if report.signed else ("not signed", "with a key")
            raise LmcError(f"{self.path} is {kinds[0]} and cannot go on {kinds[1]}: begin another chain")
        _require(self.path, report)

    def _take(self, record: dict[str, Any]) -> None:
        """Moves on past a record that is in the file."""
        self._end += len(canonical(record)) + 1
        self._count, self._last = self._count + 1, record["digest"]
        self._signed = "signature" in record
        if record["event_id"] is not None:
            content = canonical([record["event"], record["body"]])
            self._known.setdefault(record["event_id"], (content, record["digest"]))

    def _write(self, line: bytes) -> None:
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            fsync_path(self.path.parent)

    def _replace_head(self) -> None:
        path = head_path(self.path)
        part = path.with_name(path.name + ".part")
        part.write_bytes(write_head(self._count, self._last, self._signer))
        fsync_path(part)
        part.replace(path)
        fsync_path(path.parent)


def verify_chain(path: str | Path, public_key: str | Path | None = None, known: str | None = None) -> ChainReport:
    """Reads a whole chain and its head and says what is not as it was written. Local; writes nothing.

    Args:
        path: Of the chain.
        public_key: PEM file: every record and the head must be signed by it; None checks no signatures.
        known: Digest of a record that was seen before, which must still be in it: what tells a chain that was written
            anew as a whole, or put back to an earlier state with its head.

    Raises:
        LmcError: No chain there, or an unusable key.
    """
    return verify_with_records(path, public_key, known)[0]


def verify_with_records(
    path: str | Path, public_key: str | Path | None = None, known: str | None = None
) -> tuple[ChainReport, list[dict[str, Any]]]:
    """`verify_chain`, with those records that are some. Local."""
    path = Path(path)
    verifier = None if public_key is None else Verifier(public_key)
    if not path.exists() and not head_path(path).exists():
        raise LmcError(f"{path}: no audit chain is there")
    with locked(path, shared=True):
        found, report = read_chain(path, verifier)
    if known is not None and known not in {record["digest"] for record in found}:
        report.problems.append(f"no record has the digest {known}, which was seen before: the chain was replaced")
    if report.signed and verifier is None:
        report.notes.append("it is signed, and no signature was checked: give the public key")
    return report, found


def _require(path: Path, report: ChainReport) -> None:
    if report.problems:
        more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        raise LmcError(f"{path} does not verify, nothing is added to it: {report.problems[0]}{more}")
