"""`lmc audit show` and `lmc audit keygen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmc_dist.audit.chain import verify_with_records
from lmc_dist.audit.keys import keygen, public_path
from lmc_dist.audit.run_record import RUN_EVENTS
from lmc_dist.audit.verify import find_chain
from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, table, write_findings


def show_audit(config: Config) -> tuple[str, int]:
    """(the records as text, exit status: 1 if the chain does not verify). Local.

    Raises:
        LmcError: No chain there, or nowhere to write to.
    """
    check_target("json", config.json)
    chain = find_chain(Path(config.output_dir))
    report, records = verify_with_records(chain, config.audit.public_key)
    write_findings(config.json, {"chain": str(chain), "problems": report.problems, "records": records})
    lines = [f"{chain}: {count(report.records, 'record')}{', signed' if report.signed else ''}"]
    rows = [("", "time (UTC)", "event", "id", "digest")]
    for record in records:
        known = "" if record["event_id"] is None else str(record["event_id"])[:40]
        rows.append(
            (str(record["n"] + 1), str(record["time"])[:19], str(record["event"]), known, record["digest"][:16])
        )
    lines += table(rows, left=5)
    runs = [record for record in records if record["event"] in RUN_EVENTS]
    if runs:
        lines += ["", *table([*_run_rows(runs[-1])], left=2)]
    lines += [f"wrong: {problem}" for problem in report.problems] + [f"note: {note}" for note in report.notes]
    return "\n".join(lines), 1 if report.problems else 0


def _run_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the record of a run says, in a few lines."""
    body = record["body"]
    request, figures, units = body["request"], body["figures"], body["units"]
    modes = ", ".join(dict.fromkeys(str(unit["mode"]) for unit in units))
    error = figures["rel_error"]
    privacy = body["privacy"]
    rows = [
        (f"record {record['n'] + 1}", record["event"]),
        ("request", f"{count(request['count'], request['of'].rstrip('s'), request['of'])}, {request['digest'][:16]}"),
        ("counterfactual", request["counterfactual"]),
        ("log", f"{body['log']['fingerprint']}, {count(body['log']['steps'], 'step')}"),
        ("by", f"{modes}, {count(len(units), 'vector')}, {figures['gradients_equivalent']:.4g} gradients"),
        ("‖v‖", f"{figures['v_norm']:.6g}"),
        ("rel_error", "not measured" if error is None else f"{error:.4g}"),
        (
            "privacy",
            "no noise, no certificate" if privacy is None else ", ".join(f"{k}={v}" for k, v in privacy.items())[:200],
        ),
        ("code", f"lmc_dist {body['versions']['lmc_dist']}, source {body['versions']['lmc_dist_code']}"),
    ]
    return rows + [(name, digest) for name, digest in body["files"].items()]


def make_key(config: Config) -> str:
    """Makes a key pair; returns what is said of it. Local.

    Raises:
        LmcError: No file named, or one that is there.
    """
    path = config.audit.signing_key
    if path is None:
        raise LmcError("say where the key goes: lmc audit keygen FILE")
    made = keygen(path)
    return f"private key in {path}, public key in {public_path(path)} (name {made.name})"
