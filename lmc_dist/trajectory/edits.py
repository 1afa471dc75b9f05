"""Corrections made while training went on: at an edit θ and the optimizer's state jump, and the log says why.

An edit at step N is the snapshot of N, taken after the correction, with a file that says what was forgotten. Steps before
it were trained with the data, steps from N on without, from the corrected θ_N. Whoever carries a deviation past an
edit takes the jump off it: what the correction has already made up for. So all requests that are open where a propagation
starts are propagated together (`with_open_edits`), and what a correction missed is caught by the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.sealed import read_sealed

EDIT_FILE = "edit.json"


@dataclass(frozen=True)
class LogEdit:
    """A correction of the run at a step.

    Attributes:
        step: N: θ_N is the corrected one.
        request: What was forgotten.
        method: How the correction was found: a hessian_mode, with a head or without, or `replay`.
        names: Of the requests in the ledger that it answers.
        relearn: Samples of removed batches that training takes up again, in order.
        figures: What is known of the correction.
    """

    step: int
    request: Counterfactual
    method: str
    names: tuple[str, ...] = ()
    relearn: tuple[int, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "kind": self.request.kind,
            "sample_ids": sorted(self.request.sample_ids),
            "batch_ids": sorted(self.request.batch_ids),
            "method": self.method,
            "names": list(self.names),
            "relearn": list(self.relearn),
            "figures": dict(self.figures),
        }


def read_edits(log_dir: Path, snapshots: Iterable[int]) -> dict[int, LogEdit]:
    """Step → edit, of the snapshots that are one. Local.

    Raises:
        LmcError: A file that says what was edited is damaged.
    """
    found = {}
    for step in snapshots:
        path = log_dir / "snapshots" / f"step-{step}" / EDIT_FILE
        if path.exists():
            found[step] = _edit(path, read_sealed(path), step)
    return found


def _edit(path: Path, value: Mapping[str, Any], step: int) -> LogEdit:
    try:
        request = Counterfactual(value["kind"], _ids(value["sample_ids"]), _ids(value["batch_ids"]))
        names, relearn = tuple(map(str, value["names"])), tuple(value["relearn"])
        if value["step"] != step or not all(type(i) is int for i in relearn) or not isinstance(value["figures"], dict):
            raise ValueError("step, relearn or figures")
        return LogEdit(step, request, str(value["method"]), names, relearn, value["figures"])
    except (KeyError, TypeError, ValueError, LmcError) as error:
        raise LmcError(f"{path} is damaged: it describes no edit of step {step} ({error})") from None


def _ids(values: Any) -> frozenset[int]:
    if not isinstance(values, list) or not all(type(i) is int for i in values):
        raise ValueError("ids are no integers")
    return frozenset(values)


def union(one: Counterfactual, other: Counterfactual) -> Counterfactual:
    """What is left out where both are. Pure.

    Raises:
        LmcError: Samples are taken out of the loss in two ways.
    """
    kinds = {each.kind for each in (one, other) if each.sample_ids}
    if len(kinds) > 1:
        raise LmcError(
            "the log was corrected with counterfactual 'zero' and 'renormalize', which cannot be propagated together: "
            "use the same for all requests of a run"
        )
    kind = kinds.pop() if kinds else "skip"
    return Counterfactual(kind, one.sample_ids | other.sample_ids, one.batch_ids | other.batch_ids)


def first_touched(request: Counterfactual, records: Iterable[StepRecord], stop: int | None = None) -> int | None:
    """First step before `stop` that changed the weights and holds what is forgotten. Pure."""
    for record in records:
        if stop is not None and record.step >= stop:
            return None
        if record.applied and request.touches(record):
            return record.step
    return None


def with_open_edits(
    request: Counterfactual, edits: Mapping[int, LogEdit], records: Iterable[StepRecord]
) -> tuple[Counterfactual, dict[int, LogEdit]]:
    """The request together with all that earlier corrections took out and that reaches past its first step. Pure.

    An edit at N whose data was first seen at step a is open from a to N: a propagation that starts in between starts at a
    instead, for both. Returns (what is left out, edits that are passed).
    """
    records, found, passed = list(records), request, {}
    first = first_touched(request, records)
    while first is not None:
        more = {step: edit for step, edit in edits.items() if step > first and step not in passed}
        if not more:
            break
        for step, edit in more.items():
            found, passed[step] = union(found, edit.request), edit
        starts = [first_touched(edit.request, records, step) for step, edit in more.items()]
        first = min([first, *(start for start in starts if start is not None)])
    return found, dict(sorted(passed.items()))
