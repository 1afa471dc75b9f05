"""What to forget, checked against the dataset and the log before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lmc_dist.config import Counterfactual as Kind
from lmc_dist.errors import LmcError, shorten
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.record import StepRecord

logger = logging.getLogger(__name__)


def make_request(
    sample_ids: Iterable[int] | None = None, batch_ids: Iterable[int] | None = None, kind: Kind | None = None
) -> Counterfactual:
    """The counterfactual of a request for samples or for batches; `kind` None picks renormalize or skip.

    Raises:
        LmcError: Neither or both given, an empty list, or a kind that does not fit.
    """
    samples = None if sample_ids is None else frozenset(sample_ids)
    batches = None if batch_ids is None else frozenset(batch_ids)
    if (samples is None) == (batches is None):
        raise LmcError("say what to forget: sample ids, a split, or batch ids (exactly one of them)")
    if samples is not None:
        if not samples:
            raise LmcError("the list of samples to forget is empty")
        return Counterfactual(kind or "renormalize", sample_ids=samples)
    if not batches:
        raise LmcError("the list of batches to forget is empty")
    return Counterfactual(kind or "skip", batch_ids=batches)


def check_request(
    counterfactual: Counterfactual, records: Iterable[StepRecord], batches: BatchSource | None, normalization: str
) -> list[StepRecord]:
    """Checks a request against the log; returns the steps that hold forgotten data. Local.

    Without `batches` there is no data, and nothing of it is checked.

    Raises:
        LmcError: Ids the dataset or the log does not know, or batches that cannot be regenerated as they were.
    """
    records = list(records)
    if batches is not None and (unknown := batches.unknown(counterfactual.sample_ids)):
        raise LmcError(f"{len(unknown)} ids to forget are not in the dataset: {shorten(unknown)}")
    known_batches = {record.batch_id for record in records}
    if unknown := sorted(counterfactual.batch_ids - known_batches):
        raise LmcError(
            f"{len(unknown)} batch ids are not in the log: {shorten(unknown)} "
            f"(it holds {min(known_batches)} to {max(known_batches)})"
        )
    seen = {i for record in records for i in record.sample_ids}
    if unseen := sorted(counterfactual.sample_ids - seen):
        if len(unseen) == len(counterfactual.sample_ids):
            raise LmcError(f"none of the {len(unseen)} samples to forget was trained on: nothing to correct")
        logger.warning("%d samples to forget were never trained on: %s", len(unseen), shorten(unseen))
    if batches is not None and (unknown := batches.unknown(seen)):
        raise LmcError(f"the log was trained on samples the dataset lacks: {shorten(unknown)}; is it the same dataset?")
    if batches is not None and normalization == "global_token_mean":
        for record in records:
            targets = sum(batches.num_targets(record.sample_ids))
            if record.applied and targets != record.denominator:
                raise LmcError(
                    f"step {record.step}: the log divided by {record.denominator:g} target tokens, the dataset gives "
                    f"{targets} for the same samples; other tokenizer, prompt or max_length than in training?"
                )
    return [record for record in records if record.applied and counterfactual.touches(record)]
