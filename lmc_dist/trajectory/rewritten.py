"""What the manifest of a rewritten log says of it: from which run it comes, how, and, by salted digests, what is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmc_dist.audit.digests import SALT_FILE, read_salt, salted_digest
from lmc_dist.audit.hidden import is_hidden
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import MANIFEST_FILE, ledger_folder
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.record import TrajectoryManifest

KEY = "rewritten"  # of the manifest's `run`


def salt_file(log_dir: str | Path) -> Path:
    """Where the secret of a log's requests is: with its ledger, not in the log. Pure."""
    return ledger_folder(log_dir) / SALT_FILE


def described(request: Counterfactual, salt: bytes) -> dict[str, Any]:
    """A request as the manifest has it: digests under a secret, sorted, so that their order does not tell that of ids. Pure."""
    return {
        "counterfactual": request.kind,
        "salt": salted_digest(salt, "salt"),
        "samples": sorted(salted_digest(salt, i) for i in request.sample_ids),
        "batches": sorted(salted_digest(salt, i) for i in request.batch_ids),
    }


def rewritings(manifest: TrajectoryManifest) -> list[dict[str, Any]]:
    """A log's rewritings in order, none for a log as it was trained. Pure.

    Raises:
        LmcError: The manifest describes something else.
    """
    found = manifest.run.get(KEY, [])
    if not isinstance(found, list) or not all(_is_entry(entry) for entry in found):
        raise LmcError("the manifest's account of how the log was rewritten is damaged")
    return found


def _is_entry(entry: Any) -> bool:
    request, edits = (entry.get("request"), entry.get("edits")) if isinstance(entry, dict) else (None, None)
    if not isinstance(request, dict) or not isinstance(edits, list) or entry.get("how") not in ("replay", "remove"):
        return False
    ids = [request.get("samples"), request.get("batches")]
    are_texts = all(isinstance(some, list) and all(isinstance(digest, str) for digest in some) for some in ids)
    numbers = [*edits, entry.get("first_step"), entry.get("samples")]
    return are_texts and isinstance(entry.get("from"), str) and all(type(number) is int for number in numbers)


def gone_edits(manifest: TrajectoryManifest) -> set[int]:
    """Steps whose corrections a rewriting made superfluous. Pure."""
    return {step for entry in rewritings(manifest) for step in entry["edits"]}


def is_without(manifest: TrajectoryManifest, request: Counterfactual, salt: bytes) -> bool:
    """Whether the log was rewritten without what a request is about already. Pure."""
    asked = _digests(described(request, salt))
    return bool(asked) and asked <= gone(manifest)


def gone(manifest: TrajectoryManifest) -> set[tuple[str, str]]:
    """(`samples` or `batches`, digest) of all that a log was rewritten without. Pure."""
    return {pair for entry in rewritings(manifest) for pair in _digests(entry["request"])}


def resumed_rewritings(log_dir: Path, request: Counterfactual | None) -> list[dict[str, Any]]:
    """The rewritings of the log that a training continues, without the same data; none where it was not rewritten. Local.

    Raises:
        LmcError: It would be with some of that data, or the salt is missing.
    """
    if not (log_dir / MANIFEST_FILE).exists():
        return []
    manifest = read_manifest(log_dir)
    if found := rewritings(manifest):
        check_resumed(manifest, request, read_salt(salt_file(log_dir)))
    return found


def check_resumed(manifest: TrajectoryManifest, request: Counterfactual | None, salt: bytes) -> None:
    """Checks that a rewritten run is continued without what it was rewritten without. Pure.

    Raises:
        LmcError: The request is not that of the rewritings, taken together, or the secret is another one.
    """
    if any(entry["request"].get("salt") != salted_digest(salt, "salt") for entry in rewritings(manifest)):
        raise LmcError(
            "the log was rewritten with another salt than the one beside it: restore that one, to resume its run"
        )
    forget = manifest.run.get("config", {}).get("forget", {})
    if any(forget.get(key) is not None for key in ("samples", "split", "batches")) and not is_hidden(forget):
        raise LmcError(
            "the log is of a run that was trained without some data and rewritten later: it cannot be resumed"
        )
    done = gone(manifest)
    kinds = {entry["request"].get("counterfactual") for entry in rewritings(manifest)}
    if request is None or _digests(described(request, salt)) != done or kinds != {request.kind}:
        raise LmcError(
            f"the log was rewritten without {len(done)} samples or batches: resume with the same forget options as `lmc log "
            "rewrite`, those of all its calls taken together, or training would take them up again"
        )


def _digests(request: dict[str, Any]) -> set[tuple[str, str]]:
    return {(of, digest) for of in ("samples", "batches") for digest in request[of]}
