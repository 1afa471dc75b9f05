"""Deletion requests while training runs, and the audits of what was done."""

from __future__ import annotations

from typing import Any

from lmc_dist.commands.command import LOG, Command, Joins, Outcome
from lmc_dist.config import Config


def audit_verify_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.verify import verify_audit

    return verify_audit(config, runtime)


def audit_show_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.show import show_audit

    return show_audit(config)


def audit_keygen_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.show import make_key

    return make_key(config)


def forget_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import file_request

    return file_request(config)


def ledger_show_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import show_ledger

    return show_ledger(config)


def ledger_verify_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import verify_ledger

    return verify_ledger(config)


def _audit_joins(config: Config) -> Joins:
    from lmc_dist.audit.verify import asks_for_a_step

    return "engine" if asks_for_a_step(config) else "files"


COMMANDS: dict[str, Command] = {
    "forget": Command(
        "Ask a run that trains to forget samples or batches: it does so at its next step.",
        """
examples:
  lmc forget runs/log --ids 3,203-206
  lmc forget runs/log --ids ids.json --unit batch
  lmc forget runs/log --batches 17

The request goes into the ledger beside the log (LOG.requests); training answers it where --online.enabled is true. It holds
salted digests, not ids, and a request that is there already is not filed twice. `lmc ledger show` says what came of it.
""",
        ("request", "log_dir", "json"),
        forget_work,
        "nobody",
        LOG,
        {"--ids": "request.ids", "--batches": "request.batches", "--unit": "request.unit"},
    ),
    "ledger show": Command(
        "Show the deletion requests of a run and what came of them.",
        """
examples:
  lmc ledger show runs/log
  lmc ledger show runs/log --json requests.json
""",
        ("log_dir", "json"),
        ledger_show_work,
        "nobody",
        LOG,
    ),
    "ledger verify": Command(
        "Check that the ledger, its audit, the log's corrections and all later steps agree.",
        """
examples:
  lmc ledger verify runs/log
  lmc ledger verify runs/log --public_key keys/audit.pub --json verified.json

Exit status: 0 where they do, 1 where anything does not, 2 for bad input.
""",
        ("audit", "log_dir", "json"),
        ledger_verify_work,
        "nobody",
        LOG,
        {"--public_key": "audit.public_key"},
    ),
    "audit verify": Command(
        "Check that an audit is whole and the output is its own; with the log, take a random step again.",
        """
examples:
  lmc audit verify runs/unlearn
  lmc audit verify runs/unlearn --public_key keys/audit.pub --known DIGEST --json verified.json
  lmc audit verify runs/unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206
  torchrun --nproc_per_node 2 -m lmc_dist.cli audit verify runs/unlearn --config configs/demo.yaml --model.path runs/base \
      --log_dir runs/log --forget.samples 3,203-206 --audit.seed 7

OUTPUT is the output of an unlearning run, a folder with a chain.jsonl, or such a file. With a --forget option, which must be
the run's, a step is drawn and taken again from the log, and ‖v‖ on the way is compared with what was recorded.

Exit status: 0, or 1 where anything is not as it was written, 2 for bad input.
""",
        ("data", "model", "forget", "audit", "log_dir", "output_dir", "progress", "json"),
        audit_verify_work,
        _audit_joins,
        {"OUTPUT": "output_dir"},
        {"--public_key": "audit.public_key", "--known": "audit.known"},
    ),
    "audit show": Command(
        "Show the records of an audit.",
        """
examples:
  lmc audit show runs/unlearn
  lmc audit show runs/unlearn --json records.json
""",
        ("audit", "output_dir", "json"),
        audit_show_work,
        "nobody",
        {"OUTPUT": "output_dir"},
        {"--public_key": "audit.public_key"},
    ),
    "audit keygen": Command(
        "Make a key pair that signs audits: FILE and FILE.pub.",
        """
examples:
  lmc audit keygen keys/audit
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3 \
      --audit.signing_key keys/audit
""",
        ("audit",),
        audit_keygen_work,
        "nobody",
        {"FILE": "audit.signing_key"},
    ),
}
