"""Do the books of a run agree: ledger, audit chain, the log's edits, and what training saw afterwards?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from lmc_dist.audit.chain import AuditChain, verify_chain
from lmc_dist.audit.digests import salted_digest
from lmc_dist.online.ledger import ANSWERED, CHAIN_FILE, Ledger, Request
from lmc_dist.trajectory.edits import LogEdit, read_edits
from lmc_dist.trajectory.files import MANIFEST_FILE
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.rewritten import gone_requests
from lmc_dist.trajectory.snapshots import snapshot_steps
from lmc_dist.trajectory.store import readable_rows


def verify_books(log_dir: str | Path, folder: str | Path, public_key: str | None = None) -> tuple[list[str], list[str]]:
    """(what does not agree, what is worth knowing). Local.

    Args:
        log_dir: The log, which may not be there yet.
        folder: Of its ledger.
        public_key: That the audit must be signed by; None checks no signatures.

    Raises:
        LmcError: The ledger or the log cannot be read at all.
    """
    path = Path(log_dir)
    ledger = Ledger(folder)
    requests, malformed = ledger.requests()
    problems = [str(row) for row in malformed if row.reason]
    notes: list[str] = []
    chain = Path(folder) / CHAIN_FILE
    events: list[dict[str, Any]] = []
    if chain.exists():
        report = verify_chain(chain, public_key)
        problems += [f"audit: {problem}" for problem in report.problems]
        notes += [f"audit: {note}" for note in report.notes]
        events = AuditChain(chain).records() if not report.problems else []
    elif any(request.status not in ("pending", "decided") for request in requests):
        problems.append(f"audit: {chain} is missing")
    edits, records, gone = {}, [], set()
    if (path / MANIFEST_FILE).exists():
        gone = gone_requests(read_manifest(path))
        edits = read_edits(path, snapshot_steps(path))
        records = [record for record, _ in readable_rows(path).values()]
    problems += check_events(requests, events) if chain.exists() and not problems else []
    first_kept = min(snapshot_steps(path), default=0) if records else 0
    problems += check_edits([r for r in requests if r.name not in gone], edits, first_kept)
    problems += check_later_steps(requests, records, ledger.salt, gone)
    problems += check_decided([r for r in requests if r.name not in gone], edits, len(records))
    waiting = [request for request in requests if request.status in ("pending", "decided")]
    if waiting:
        notes.append(f"waiting for training to answer: {len(waiting)} of {len(requests)} requests")
    return problems, notes


def check_events(requests: Iterable[Request], events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Answers in the ledger that the audit does not have, and the reverse. Pure.

    A request that was answered anew after a crash is in the audit once for each answer: the last one counts.
    """
    noted = set({event["body"].get("request"): event["event"] for event in events}.items())
    known = {(request.name, request.status) for request in requests}
    answered = {(name, status) for name, status in known if status not in ("pending", "decided")}
    missing = [f"the ledger says that request {n[:12]} is {s}, the audit does not" for n, s in sorted(answered - noted)]
    lost = [
        f"the audit says that request {n[:12]} was {s}, the ledger does not"
        for n, s in sorted((n, s) for n, s in noted if n is not None)
        if (n, s) not in known and (n, "decided") not in known
    ]
    return missing + lost


def check_edits(requests: Iterable[Request], edits: Mapping[int, LogEdit], first_kept: int) -> list[str]:
    """Applied requests without their edit in the log, and edits without a request. Pure."""
    found, by_name = [], {}
    for request in requests:
        by_name[request.name] = request
        if request.status != "applied" or request.step is None or request.step < first_kept:
            continue
        if request.step not in edits or request.name not in edits[request.step].names:
            found.append(f"request {request.name[:12]} was applied at step {request.step}, the log has no such edit")
    for step, edit in edits.items():
        found += [
            f"the edit of step {step} answers request {n[:12]}, which no ledger has"
            for n in edit.names
            if n not in by_name
        ]
    return found


def check_decided(requests: Iterable[Request], edits: Mapping[int, LogEdit], num_steps: int) -> list[str]:
    """Requests that were decided at a step which lies behind, and of which nothing says what became of them. Pure."""
    return [
        f"request {request.name[:12]} was decided at step {request.step}, and training went on to step {num_steps} without an "
        "answer: resume the run, it is answered then"
        for request in requests
        if request.status == "decided" and request.step is not None and request.step < num_steps
        if request.step not in edits or request.name not in edits[request.step].names
    ]


def check_later_steps(
    requests: Iterable[Request], records: Iterable[StepRecord], salt: bytes, gone: Set[str] = frozenset()
) -> list[str]:
    """Steps that trained on a sample after it was to be forgotten. Pure.

    Args:
        requests: Of the ledger.
        records: Of the log.
        salt: Of the ledger.
        gone: Names of requests whose corrections went when the log was rewritten: no step may hold any more what they are about.
    """
    since: dict[str, int] = {}
    for request in requests:
        if request.step is not None and request.status in ANSWERED:
            step = 0 if request.name in gone else request.step
            for digest in request.samples:
                since[digest] = min(step, since.get(digest, step))
    digests: dict[int, str] = {}
    found = []
    for record in records if since else ():
        for i in set(record.sample_ids):
            digest = digests.setdefault(i, salted_digest(salt, i))
            if record.step >= since.get(digest, record.step + 1):
                found.append(
                    f"step {record.step} trained on sample {i}, which was to be forgotten from step {since[digest]} on"
                )
    return found
