"""What the manifest of a rewritten log says of it: from which run it comes, how, and, by salted digests, what is gone."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Where the secret of a log's requests is: with its ledger, not in the log. Local."""
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
    if not all(isinstance(name, str) for name in entry.get("requests", [])) or not _digests_are_known(entry):
        return False
    return are_texts and isinstance(entry.get("from"), str) and all(type(number) is int for number in numbers)


def _digests_are_known(entry: dict[str, Any]) -> bool:
    """Whether what a call was asked for is a part of what went. Pure."""
    asked = entry.get("asked", entry["request"])
    return isinstance(asked, dict) and all(
        isinstance(asked.get(of), list) and all(digest in entry["request"].get(of, []) for digest in asked[of])
        for of in ("samples", "batches")
    )


def gone_requests(manifest: TrajectoryManifest) -> set[str]:
    """Names of the ledger's requests whose corrections a rewriting made superfluous. Pure."""
    return {name for entry in rewritings(manifest) for name in entry.get("requests", [])}


def is_without(manifest: TrajectoryManifest, request: Counterfactual, salt: bytes) -> bool:
    """Whether the log was rewritten without what a request is about already. Pure."""
    asked = _digests(described(request, salt))
    return bool(asked) and asked <= gone(manifest)


def gone(manifest: TrajectoryManifest) -> set[tuple[str, str]]:
    """(`samples` or `batches`, digest) of all that a log was rewritten without. Pure."""
    return {pair for entry in rewritings(manifest) for pair in _digests(entry["request"])}


def log_rewritings(log_dir: Path) -> list[dict[str, Any]]:
    """The rewritings of the log that a training continues; none where there is no log. Local."""
    return rewritings(read_manifest(log_dir)) if (log_dir / MANIFEST_FILE).exists() else []


def resumed_request(
    log_dir: Path, request: Counterfactual | None, sample_ids: Iterable[int], batch_ids: Iterable[int]
) -> Counterfactual:
    """What a rewritten run is continued without: all that is gone, corrections in mid-training included. Local.

    Args:
        log_dir: The log.
        request: What the calls of `lmc log rewrite` were asked for.
        sample_ids: Of the dataset, among which digests are looked up.
        batch_ids: Of the run's batches, likewise.

    Raises:
        LmcError: It would be with some of that data, or the salt is missing.
    """
    manifest, salt = read_manifest(log_dir), read_salt(salt_file(log_dir))
    check_resumed(manifest, request, salt)
    assert request is not None
    done = gone(manifest)
    if _digests(described(request, salt)) == done:
        return request
    samples = frozenset(i for i in sample_ids if ("samples", salted_digest(salt, i)) in done) | request.sample_ids
    batches = frozenset(i for i in batch_ids if ("batches", salted_digest(salt, i)) in done) | request.batch_ids
    return Counterfactual(min(_sample_kinds(manifest)) if samples else "skip", samples, batches)


def _sample_kinds(manifest: TrajectoryManifest) -> set[Any]:
    return {entry["request"].get("counterfactual") for entry in rewritings(manifest) if entry["request"]["samples"]}


def check_resumed(manifest: TrajectoryManifest, request: Counterfactual | None, salt: bytes) -> None:
    """Checks that a rewritten run is continued without what it was rewritten without. Pure.

    What came with corrections in mid-training need not be asked for again: nobody but the ledger may know it.

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
    asked = {pair for entry in rewritings(manifest) for pair in _digests(entry.get("asked", entry["request"]))}
    given = set() if request is None else _digests(described(request, salt))
    kinds = _sample_kinds(manifest)
    is_other_kind = request is not None and bool(request.sample_ids) and kinds != {request.kind}
    if not asked <= given <= gone(manifest) or len(kinds) > 1 or is_other_kind:
        raise LmcError(
            f"the log was rewritten without {len(asked)} samples or batches: resume with the same forget options as `lmc log "
            "rewrite`, those of all its calls taken together (forget.samples beside forget.batches where there were both), or "
            "training would take them up again"
        )


def _digests(request: dict[str, Any]) -> set[tuple[str, str]]:
    return {(of, digest) for of in ("samples", "batches") for digest in request[of]}
