"""`lmc forget` and `lmc ledger …`: file a deletion request for a run that trains, and see what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.data import read_ids
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, table, write_findings
from lmc_dist.online.ledger import TABLE_FILE, Ledger, Request
from lmc_dist.online.verify import verify_books
from lmc_dist.trajectory.contents import writer_of
from lmc_dist.trajectory.files import ledger_folder


def file_request(config: Config) -> str:
    """Files the request of the settings; what was filed, as text. Local.

    Raises:
        LmcError: Nothing has been filed: no ids, too many, or a ledger that cannot be written.
    """
    asked = config.request
    check_target("json", config.json)
    if (asked.ids is None) == (asked.batches is None):
        raise LmcError("say what to forget: --ids or --batches, one of them")
    samples = read_ids(asked.ids) if asked.ids is not None else ()
    batches = read_ids(asked.batches) if asked.batches is not None else ()
    ledger = Ledger(ledger_folder(config.log_dir))
    request, is_new = ledger.submit(samples, batches, asked.unit)
    write_findings(config.json, {**described(request), "new": is_new})
    what = count(len(samples), "sample") if samples else count(len(batches), "batch", "batches")
    line = f"request {request.name}: {what}, {'filed' if is_new else f'there already, {request.status}'}"
    if is_new and writer_of(Path(config.log_dir)) is None:
        line += (
            "\nno job trains into this log now: the request is answered when training goes on (--resume true "
            "--online.enabled true); a finished run is corrected by lmc unlearn"
        )
    return line


def show_ledger(config: Config) -> str:
    """All requests of a run and what came of them, as a table. Local."""
    ledger = existing(config)
    requests, malformed = ledger.requests()
    write_findings(
        config.json, {"requests": [described(r) for r in requests], "malformed": [str(m) for m in malformed]}
    )
    rows = [["request", "asked for", "received (UTC)", "status", "step", "method or reason"]]
    for r in requests:
        targets = count(len(r.samples), "sample") if r.samples else count(len(r.batches), "batch", "batches")
        targets += ", whole batches" if r.unit == "batch" and r.samples else ""
        received = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(r.received))
        note = str(r.result.get("reason") or _figures(r))
        rows.append([r.name[:12], targets, received, r.status, "" if r.step is None else str(r.step), note[:80]])
    lines = table(rows, left=6) if requests else ["no requests"]
    return "\n".join(lines + [str(row) for row in malformed])


def _figures(request: Request) -> str:
    result = request.result
    if "v_norm" not in result:
        return ""
    exact = "exact, " if result.get("exact") else ""
    return f"{exact}‖v‖ {result['v_norm']:.3g}, {result['gradients']:.1f} gradients, {result['latency_seconds']:.1f} s"


def verify_ledger(config: Config) -> tuple[str, int]:
    """Whether ledger, audit, edits and later steps agree: text and exit status. Local."""
    ledger = existing(config)
    problems, notes = verify_books(config.log_dir, ledger.folder, config.audit.public_key)
    write_findings(config.json, {"problems": problems, "notes": notes})
    number = len(ledger.requests()[0])
    head = f"{count(number, 'request')}: ledger, audit chain, the log's edits and its later steps "
    head += "agree" if not problems else f"do not agree, {count(len(problems), 'problem')}"
    return "\n".join([head, *problems, *notes]), int(bool(problems))


def existing(config: Config) -> Ledger:
    """The ledger of a log, which must be there.

    Raises:
        LmcError: It is not.
    """
    folder = ledger_folder(config.log_dir)
    if not (folder / TABLE_FILE).exists():
        raise LmcError(
            f"no ledger beside {config.log_dir} ({folder / TABLE_FILE} is missing): nothing was asked of this run"
        )
    return Ledger(folder)


def described(request: Request) -> dict[str, Any]:
    """A request as JSON, without what it is about. Pure."""
    return {
        "name": request.name,
        "received": request.received,
        "unit": request.unit,
        "samples": len(request.samples),
        "batches": len(request.batches),
        "status": request.status,
        "step": request.step,
        "result": dict(request.result),
    }
