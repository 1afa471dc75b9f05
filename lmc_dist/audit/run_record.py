"""The record that a run leaves in the audit chain of its output, and what of it is checked before the run starts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmc_dist
from lmc_dist.audit.chain import AuditChain
from lmc_dist.audit.digests import SALT_FILE, salt_at
from lmc_dist.audit.files import part_digests
from lmc_dist.audit.hidden import hidden
from lmc_dist.audit.keys import Signer
from lmc_dist.audit.reading import head_path, read_chain
from lmc_dist.audit.request import unit_name
from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.unlearn.audit import AuditRecord, figures
from lmc_dist.unlearn.correction import Correction

CHAIN_FILE = "chain.jsonl"
RUN_EVENTS = ("unlearn", "recombine")
# What of the settings has a part in a correction.
SETTINGS = (
    "data",
    "model",
    "train",
    "log",
    "forget",
    "unlearn",
    "privacy",
    "audit",
    "log_dir",
    "output_dir",
    "reference",
    "compare",
)
FIGURES = (
    "rel_error",
    "seconds_unlearn",
    "seconds_retrain",
    "gradients_equivalent",
    "v_norm",
    "n_units",
    "world_size",
    "engine",
)


def chain_of(output: Path) -> Path:
    """The chain of a run's output. Pure."""
    return output / "audit" / CHAIN_FILE


def check_audit(config: Config, is_main: bool) -> None:
    """Checks the settings of the audit. Local; the first rank alone looks at files.

    Raises:
        LmcError: A key or salt that cannot be used or made, marks that would not be there or may not stay, or a chain in
            output_dir that cannot go on.
    """
    audit, unlearn, output = config.audit, config.unlearn, Path(config.output_dir)
    if audit.keep_marks:
        if unlearn.units != "joint" or unlearn.replay_head != 0 or unlearn.curvature or unlearn.mark_every is None:
            raise LmcError(
                "audit.keep_marks keeps the marks of a joint correction: it needs unlearn.mark_every, and neither units, nor "
                "a replayed head, nor kept curvature"
            )
        if config.privacy.basis != "off":
            raise LmcError(
                "audit.keep_marks would leave the correction without its noise in the output: leave one of them"
            )
    if not is_main:
        return
    signer = None if audit.signing_key is None else Signer(audit.signing_key)
    if audit.salt is not None:
        salt_at(Path(audit.salt))  # made now: an error at the end would cost the run
    chain = chain_of(output)
    if not (chain.exists() or head_path(chain).exists()):
        return
    records, report = read_chain(chain, None if signer is None else signer.verifier)
    if report.problems:
        raise LmcError(f"{chain} does not verify and cannot go on: {report.problems[0]}; choose another output_dir")
    if records and report.signed != (signer is not None):
        needed = (
            "it is signed: give audit.signing_key" if report.signed else "it is not signed: give no audit.signing_key"
        )
        raise LmcError(f"{chain} goes on with this run, and {needed}, or another output_dir")


def take_over(earlier: Path, part: Path) -> None:
    """Takes the chain and the salt of an output along into the one that replaces it. Collective."""
    with agreement():
        if _is_main():
            folder = part / "audit"
            folder.mkdir(parents=True, exist_ok=True)
            for name in (CHAIN_FILE, head_path(Path(CHAIN_FILE)).name, SALT_FILE):
                if (earlier / "audit" / name).is_file():
                    shutil.copy2(earlier / "audit" / name, folder / name)


def run_salt(config: Config, part: Path) -> bytes:
    """The secret of a run, made where there is none. Collective."""
    salt = b""
    with agreement():
        if _is_main():
            given = config.audit.salt
            salt = salt_at(part / "audit" / SALT_FILE if given is None else Path(given))
    return bytes(broadcast_object(salt))


def append_run(
    event: str,
    part: Path,
    config: Config,
    settings: Mapping[str, Any],
    request: dict[str, Any],
    result: Mapping[str, Any],
    correction: Correction,
    salt: bytes,
) -> None:
    """Adds a finished run to the chain of its output; nothing of the output is written after it. Collective.

    Args:
        event: One of `RUN_EVENTS`.
        part: The output.
        config: Settings of this command, for the key.
        settings: Those of the run, as result.json has them.
        request: `described_request`.
        result: What result.json holds.
        correction: As it was written.
        salt: Of the digests.
    """
    norm = correction.v.norm()
    parts = part_digests(part)
    with agreement():
        if _is_main():
            body = run_body(settings, request, result, correction.audit, salt)
            body |= {"correction_norm": norm, "files": parts}
            AuditChain(chain_of(part), config.audit.signing_key).append(event, body)


def last_run(output: Path) -> dict[str, Any] | None:
    """What the last record of a run in the chain of an output says; None where there is none. Collective."""
    found: dict[str, Any] | None = None
    with agreement():
        if _is_main():
            records = AuditChain(chain_of(output)).records()
            found = next((record["body"] for record in reversed(records) if record["event"] in RUN_EVENTS), None)
    return broadcast_object(found)


def run_body(
    settings: Mapping[str, Any],
    request: dict[str, Any],
    result: Mapping[str, Any],
    audit: Sequence[AuditRecord],
    salt: bytes,
) -> dict[str, Any]:
    """What the record of a run says, but for its files. Local."""
    undone = [] if result["units"] is None else result["units"]["undone"]
    config = {key: settings[key] for key in SETTINGS if key in settings}
    config["forget"] = hidden(config["forget"], request["digest"], with_split=True)
    config["unlearn"] = {**config["unlearn"], "undo": None, "add": None}
    return {
        "request": request,
        "log": {"fingerprint": result["log_fingerprint"], "steps": result["request"]["num_steps"]},
        "config": config,
        "versions": {**result["versions"], "lmc_dist_code": code_digest()},
        "figures": {name: result[name] for name in FIGURES},
        "units": [{**figures(record), "unit": unit_name(record.unit, salt)} for record in audit],
        "undone": sorted(unit_name(name, salt) for name in undone),
        "privacy": result.get("privacy"),
    }


def code_digest() -> str:
    """Digest of this package's source: the code that ran, whatever its version number says. Local."""
    assert lmc_dist.__file__ is not None
    root = Path(lmc_dist.__file__).parent
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def _is_main() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
