"""One line of an audit chain, and its head, as bytes: canonical JSON in which every byte is covered by a digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lmc_dist.audit.keys import Signer, Verifier
from lmc_dist.errors import LmcError

SCHEMA = 1
GENESIS = "0" * 64  # what the first record has as the digest of the one before
FIELDS = frozenset({"n", "time", "event", "event_id", "body", "previous", "digest"})
SIGNED_FIELDS = FIELDS | {"signature"}


def canonical(value: Any) -> bytes:
    """A value as the one JSON text that all agree on: sorted keys, ASCII, no space, no NaN. Local.

    Raises:
        LmcError: It cannot be said in JSON.
    """
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))  # keys become strings before they are sorted
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise LmcError(f"an audit record holds what JSON cannot say: {error}") from None


def digest(content: bytes) -> str:
    """BLAKE2b of 256 bits, as hex."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def make_record(
    n: int, event: str, body: dict[str, Any], event_id: str | None, previous: str, signer: Signer | None
) -> dict[str, Any]:
    """A record as it is appended. Local.

    The signature is of all fields but itself and the digest; the digest is of all fields but itself.
    """
    record: dict[str, Any] = {
        "n": n,
        "time": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "event": event,
        "event_id": event_id,
        "body": body,
        "previous": previous,
    }
    if signer is not None:
        record["signature"] = signer.sign(canonical(record))
    return {**record, "digest": digest(canonical(record))}


def check_record(line: bytes, n: int, previous: str | None, verifier: Verifier | None) -> tuple[Any, list[str]]:
    """(a line's record, or None where it is none; what is wrong with it). Local.

    Args:
        line: Without its end of line.
        n: Its place in the chain.
        previous: Digest of the record before; None where that is not known.
        verifier: Checks its signature, which then must be there.
    """
    try:
        record = json.loads(line)
        same = isinstance(record, dict) and canonical(record) == line
    except (LmcError, ValueError, RecursionError) as error:
        return None, [f"no record: {str(error)[:100]}"]
    if not same:
        return None, ["not as a record is written: other bytes than its canonical JSON"]
    if set(record) not in (FIELDS, SIGNED_FIELDS):
        return None, [f"not the fields of a record: {', '.join(sorted(record))[:200]}"]
    found = []
    if record["n"] != n:
        found.append(f"is record {record['n']!r} where record {n} belongs: records were removed, inserted or moved")
    if previous is not None and record["previous"] != previous:
        found.append("does not follow the record before it")
    rest = {key: value for key, value in record.items() if key != "digest"}
    if record["digest"] != digest(canonical(rest)):
        found.append("its content is not what its digest says")
    if verifier is not None:
        signature = rest.pop("signature", None)
        if signature is None:
            found.append("is not signed")
        elif not isinstance(signature, str) or not verifier.holds(signature, canonical(rest)):
            found.append("its signature is not of this key")
    return record, found


@dataclass(frozen=True)
class Head:
    """How far a chain was acknowledged.

    Attributes:
        count: Records.
        digest: Of the last.
        is_signed: Whether it carries a signature.
    """

    count: int
    digest: str
    is_signed: bool


def write_head(count: int, last: str, signer: Signer | None) -> bytes:
    """The content of a head file. Local."""
    head: dict[str, Any] = {"schema": SCHEMA, "count": count, "digest": last}
    if signer is not None:
        head["signature"] = signer.sign(canonical(head))
    return canonical({**head, "seal": digest(canonical(head))}) + b"\n"


def read_head(content: bytes, verifier: Verifier | None) -> Head:
    """A head file's content, checked. Local.

    Raises:
        LmcError: It is not as it was written, or not signed by the key.
    """
    try:
        head = json.loads(content)
        same = isinstance(head, dict) and canonical(head) + b"\n" == content
    except (LmcError, ValueError, RecursionError):
        same = False
    if not same or not set(head) - {"signature"} == {"schema", "count", "digest", "seal"}:
        raise LmcError("not as it was written")
    if head["schema"] != SCHEMA:
        raise LmcError(f"schema {head['schema']!r}, this version reads {SCHEMA}")
    if head.pop("seal") != digest(canonical(head)):
        raise LmcError("not as it was written: its content is not what its seal says")
    signature = head.pop("signature", None)
    if verifier is not None:
        if signature is None:
            raise LmcError("not signed")
        if not isinstance(signature, str) or not verifier.holds(signature, canonical(head)):
            raise LmcError("its signature is not of this key")
    if not (isinstance(head["count"], int) and isinstance(head["digest"], str)):
        raise LmcError("not as it was written")
    return Head(head["count"], head["digest"], signature is not None)
