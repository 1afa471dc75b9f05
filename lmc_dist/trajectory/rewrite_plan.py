"""What rewriting a log without some data will do, checked before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lmc_dist.data import read_ids
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import LogEdit
from lmc_dist.trajectory.record import TrajectoryManifest
from lmc_dist.trajectory.replay import first_change, replay_start
from lmc_dist.trajectory.rewritten import KEY, described, rewritings
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.swap import foreign

How = Literal["replay", "remove"]


@dataclass(frozen=True)
class RewritePlan:
    """What rewriting a log will do.

    Attributes:
        how: By which way.
        asked: What is to be left out.
        request: What is left out, earlier corrections of the run that it reaches past included.
        first: First step that changes: that holds any of it and, for `replay`, was applied.
        stop: Steps before it are taken over; `replay` runs those from it on.
        num_steps: Of the old log.
        touched: Steps that hold any of it.
        snapshots: Those that are taken over.
        edits: Steps whose corrections go: nothing of what they corrected is left.
        samples: Distinct samples that go.
        dropped: Files and folders of the old log that have no place in the new one.
    """

    how: How
    asked: Counterfactual
    request: Counterfactual
    first: int
    stop: int
    num_steps: int
    touched: tuple[int, ...]
    snapshots: tuple[int, ...]
    edits: tuple[int, ...]
    samples: int
    dropped: tuple[str, ...]


def plan_rewrite(log: TrajectoryLog, request: Counterfactual, how: How) -> RewritePlan:
    """What rewriting would do. Local.

    Raises:
        LmcError: Nothing of the request is in the log, nothing would be left, what a replay needs is gone, or the log's
            directory or description holds what cannot go along.
    """
    asked = request
    request, passed, first = first_change(log, asked)
    touched = tuple(r.step for r in log.records() if request.touches(r))
    if not touched:
        raise LmcError(f"no step of log {log.path} holds any of the forgotten data: there is nothing to rewrite")
    if others := foreign(log.path):
        raise LmcError(f"log {log.path} holds {others[0]}, which is none of a log's: move it away, it would be deleted")
    check_settings(log.manifest, request)
    if how == "replay":
        check_normalization(log.manifest, request)
    if how == "remove":
        check_companions(log.manifest, passed.values())
        first = touched[0]
    stop = replay_start(log, first) if how == "replay" else first
    snapshots = tuple(n for n in log.snapshots if n <= stop)
    if how == "remove" and (first == 0 or not snapshots):
        raise LmcError(
            f"step {first} of log {log.path} holds forgotten data, and nothing that could be used is left before it: "
            "rewrite it with --how replay, or delete the log"
        )
    seen = {i for step in touched for i in log.record(step).sample_ids if _is_gone(log, step, i, request)}
    names = sorted(p.name for p in log.path.iterdir() if p.name in ("curvature", "train.json", "controls.json"))
    return RewritePlan(
        how,
        asked,
        request,
        first,
        stop,
        log.num_steps,
        touched,
        snapshots,
        tuple(sorted(passed)),
        len(seen),
        tuple(names),
    )


def _is_gone(log: TrajectoryLog, step: int, sample: int, request: Counterfactual) -> bool:
    return sample in request.sample_ids or log.record(step).batch_id in request.batch_ids


def check_companions(manifest: TrajectoryManifest, passed: Iterable[LogEdit]) -> None:
    """Checks that corrections whose steps are removed left nothing for later steps to do. Pure.

    Raises:
        LmcError: They did: a run that is resumed would not take up the other samples of batches that were taken back.
    """
    settings = manifest.run.get("config", {}).get("online", {})
    for edit in passed:
        if edit.relearn and settings.get("relearn_per_step"):
            raise LmcError(
                f"the correction at step {edit.step} took back whole batches, whose {len(edit.relearn)} other samples later "
                "steps take up again; what --how remove leaves could not say so: use --how replay"
            )


def check_normalization(manifest: TrajectoryManifest, request: Counterfactual) -> None:
    """Checks that the steps without the data can be logged as they would be trained. Pure.

    Raises:
        LmcError: What their losses are divided by could not be told from the new log.
    """
    if request.kind == "zero" and manifest.loss_normalization == "micro_batch_token_mean":
        raise LmcError(
            "the log's losses are means over micro-batches: with counterfactual 'zero' they would be divided by target tokens "
            "that are no longer there, which no log can say: use 'renormalize', or --how remove"
        )
    if request.kind == "renormalize" and manifest.loss_normalization == "given":
        raise LmcError("the log's loss was divided by a number of unknown origin: use counterfactual 'zero'")


def check_settings(manifest: TrajectoryManifest, request: Counterfactual) -> None:
    """Checks that the settings in the manifest name none of the forgotten samples. Local.

    Raises:
        LmcError: They do: the run was trained as the reference of an earlier request.
    """
    for segment in manifest.all_segments:
        config = segment.run.get("config")
        named = config.get("forget", {}).get("samples") if isinstance(config, dict) else None
        try:
            ids = set(read_ids(str(named))) if named is not None else set()
        except LmcError:  # a file that is not here, so no ids in the manifest
            continue
        if both := sorted(ids & request.sample_ids):
            raise LmcError(
                f"the run was trained without {len(both)} of the samples already, and its settings in manifest.json name "
                f"them (run.config.forget: {both[0]}, …): leave them out of the request"
            )


def rewritten_manifest(log: TrajectoryLog, plan: RewritePlan, salt: bytes) -> TrajectoryManifest:
    """The manifest of the new log as far as the old one decides it. Local."""
    manifest = log.manifest
    last = plan.num_steps - 1
    entry = {
        "how": plan.how,
        "from": log.fingerprint,
        "request": described(plan.request, salt),
        "asked": described(plan.asked, salt),
        "requests": sorted({name for step in plan.edits for name in log.edits[step].names}),
        "first_step": plan.touched[0],
        "steps": [plan.stop, last],  # that were run anew, or removed
        "snapshots": [n for n in log.snapshots if n > plan.stop],
        "edits": list(plan.edits),
        "samples": plan.samples,
    }
    return replace(
        manifest,
        # the digest of data that is no longer there would keep something of it, and refuse what is left of it
        dataset_fingerprint=None,
        loss_normalization="given" if plan.request.kind == "zero" else manifest.loss_normalization,
        segments=[values for values in manifest.segments if values["first_step"] < plan.stop],
        run=manifest.run | {KEY: [*rewritings(manifest), entry]},
    )
