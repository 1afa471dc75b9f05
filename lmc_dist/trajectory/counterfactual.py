"""What "without the data" means for one step (docs/method.md §2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.record import LossNormalization, MicroRecord, StepRecord

Kind = Literal["skip", "zero", "renormalize"]
TargetCounts = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True)
class EditedMicro:
    """One pass of the counterfactual step: which samples stay, and what their summed loss is divided by."""

    record: MicroRecord
    kept: tuple[bool, ...]
    denominator: float

    @property
    def weights(self) -> list[float]:
        """Coefficient w'_i / D' of each sample's summed loss."""
        return [1.0 / self.denominator if keep else 0.0 for keep in self.kept]

    @property
    def source_weights(self) -> list[float]:
        """w'_i / D' − w_i / D: what the source is the weighted gradient of."""
        return [weight - 1.0 / self.record.denominator for weight in self.weights]


@dataclass(frozen=True)
class EditedStep:
    """A step as the counterfactual run would have taken it."""

    record: StepRecord
    skipped: bool
    micro_batches: tuple[EditedMicro, ...] = ()

    @property
    def is_changed(self) -> bool:
        return self.skipped or not all(all(micro.kept) for micro in self.micro_batches)


@dataclass(frozen=True)
class Counterfactual:
    """The edit of every step that a request stands for.

    Attributes:
        kind: `skip` forgets `batch_ids` as whole steps; `zero` and `renormalize` forget `sample_ids`, and beside them
            `batch_ids` where several requests are taken together.
        sample_ids: Forgotten samples, wherever they occur.
        batch_ids: Forgotten batches.
    """

    kind: Kind
    sample_ids: frozenset[int] = field(default_factory=frozenset)
    batch_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.kind == "skip" and (self.sample_ids or not self.batch_ids):
            raise LmcError(
                "counterfactual 'skip' forgets whole batches: give batch ids, or use 'renormalize' or 'zero'"
            )
        if self.kind in ("zero", "renormalize") and not self.sample_ids:
            raise LmcError(f"counterfactual '{self.kind}' forgets samples: give sample ids, or use 'skip' for batches")
        if self.kind not in ("skip", "zero", "renormalize"):
            raise LmcError(f"unknown counterfactual '{self.kind}'; available: skip, zero, renormalize")

    def touches(self, record: StepRecord) -> bool:
        """Whether the step holds anything that is forgotten."""
        return record.batch_id in self.batch_ids or not self.sample_ids.isdisjoint(record.sample_ids)

    def edit(self, record: StepRecord, normalization: LossNormalization, num_targets: TargetCounts) -> EditedStep:
        """The step without the forgotten data.

        Args:
            record: The logged step.
            normalization: The manifest's `loss_normalization`.
            num_targets: Target tokens of samples by id.
        """
        if record.batch_id in self.batch_ids:
            return EditedStep(record, skipped=True)
        kept = [tuple(i not in self.sample_ids for i in micro.sample_ids) for micro in record.micro_batches]
        denominators = [micro.denominator for micro in record.micro_batches]
        if self.kind == "renormalize" and not all(map(all, kept)):
            counts = [num_targets(micro.sample_ids) for micro in record.micro_batches]
            removed = [
                sum(n for n, keep in zip(c, k, strict=True) if not keep) for c, k in zip(counts, kept, strict=True)
            ]
            totals = [sum(c) for c in counts]
            if sum(removed) == sum(totals):
                return EditedStep(record, skipped=True)
            if normalization == "given":
                raise LmcError("the log's loss was divided by a number of unknown origin: use counterfactual 'zero'")
            if normalization == "global_token_mean":
                denominators = [d - sum(removed) for d in denominators]
            else:  # mean over passes of token means: an emptied pass divides nothing by nothing, which counts as zero
                denominators = [
                    d * (t - r) / t if r < t else d for d, t, r in zip(denominators, totals, removed, strict=True)
                ]
        micros = zip(record.micro_batches, kept, denominators, strict=True)
        return EditedStep(record, False, tuple(EditedMicro(*parts) for parts in micros))


def edit_step(
    record: StepRecord, counterfactual: Counterfactual | None, normalization: LossNormalization, counts: TargetCounts
) -> EditedStep:
    """The step as `counterfactual` would have it; as it was with None."""
    if counterfactual is not None and counterfactual.touches(record):
        return counterfactual.edit(record, normalization, counts)
    micros = (EditedMicro(m, (True,) * len(m.sample_ids), m.denominator) for m in record.micro_batches)
    return EditedStep(record, False, tuple(micros))
