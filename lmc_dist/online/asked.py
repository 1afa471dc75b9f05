"""What requests ask of a run: which samples and batches leave it, and which samples come back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lmc_dist.errors import shorten
from lmc_dist.online.ledger import Request
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.record import StepRecord

NOTHING = Counterfactual("skip", batch_ids=frozenset({-1}))  # touches no step


@dataclass(frozen=True)
class Asked:
    """A request as all ranks know it: its digests, and the ids among them that training knows."""

    request: Request
    sample_ids: tuple[int, ...] = ()


@dataclass
class Relearning:
    """Companions of the batches that an edit removed, on their way back into training.

    Attributes:
        step: That is next.
        waiting: Samples that no step has taken up yet.
    """

    step: int
    waiting: list[int]

    def take(self, step: int, own: Collection[int], count: int) -> list[int]:
        """What a step takes up beside its own samples; steps in between that were not asked for had no such samples."""
        taken: list[int] = []
        while self.step <= step:
            taken = [i for i in self.waiting if self.step < step or i not in own][:count]
            self.waiting = [i for i in self.waiting if i not in taken]
            self.step += 1
        return taken


def unknown_batches(request: Request, records: Iterable[StepRecord]) -> str | None:
    """Why a request's batches cannot be taken back; None where they can. Pure."""
    unknown = sorted(set(request.batches) - {record.batch_id for record in records})
    return f"{len(unknown)} batches are not in the log: {shorten(unknown)}" if unknown else None


def counterfactual(one: Asked, records: Sequence[StepRecord]) -> Counterfactual:
    """What a request leaves out of the run so far: samples, or the batches that held them. Pure."""
    ids = frozenset(one.sample_ids)
    if one.request.unit == "sample" and ids:
        return Counterfactual("renormalize", ids)
    held = {record.batch_id for record in records if not ids.isdisjoint(record.sample_ids)}
    return (
        Counterfactual("skip", batch_ids=frozenset(one.request.batches) | held)
        if held or one.request.batches
        else NOTHING
    )


def companions(
    seen: Sequence[Asked], records: Sequence[StepRecord], removed: Collection[int] = frozenset()
) -> list[int]:
    """Samples that lay in the removed batches beside those that are forgotten, as training met them. Pure.

    Args:
        seen: The requests.
        records: Of the steps so far.
        removed: Batches that earlier requests took back, whose companions have been taken up again since or wait for it.
            Where a step that took them up is itself removed now, they are companions of that step.
    """
    found: dict[int, None] = {}
    for one in seen:
        ids = set(one.sample_ids)
        if one.request.unit == "batch":
            batches = {record.batch_id for record in records if not ids.isdisjoint(record.sample_ids)} - set(removed)
            found |= dict.fromkeys(i for r in records if r.batch_id in batches for i in r.sample_ids)
    return list(found)
