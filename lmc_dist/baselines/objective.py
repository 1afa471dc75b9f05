"""What a baseline minimises: L_forget + α L_retain, and over which samples in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from lmc_dist.config import BaselineConfig
from lmc_dist.data import epoch_order
from lmc_dist.training import Schedule


@dataclass(frozen=True)
class Objective:
    """The terms of a method's loss.

    Attributes:
        forget: Loss on forgotten samples: `ascent`, `npo`, or None for none.
        retain_weight: α.
        beta: `npo`: β.
        label: In tables.
    """

    forget: str | None
    retain_weight: float
    beta: float
    label: str


def objective_of(config: BaselineConfig) -> Objective:
    """The objective of a method."""
    weight, beta = config.retain_weight, config.beta
    if config.method == "retain":
        return Objective(None, 1.0, beta, "retain fine-tuning")
    if config.method == "ga":
        return Objective("ascent", 0.0, beta, "gradient ascent")
    if config.method == "graddiff":
        return Objective("ascent", weight, beta, f"GradDiff, α={weight:g}")
    return Objective("npo", weight, beta, f"NPO, β={beta:g}, α={weight:g}")


@dataclass(frozen=True)
class Samples:
    """The samples of one step, in order, the same on all ranks."""

    forget: list[int]
    retain: list[int]


@dataclass(frozen=True)
class Plan:
    """Which samples each step sees.

    An epoch goes once over the retained samples where they alone are trained on, else once over the forgotten ones, beside
    whom as many retained ones are taken, from one shuffled pass over all of them after the other. (open-unlearning draws
    these with replacement.)

    Attributes:
        objective: What is minimised.
        forget: Forgotten samples.
        retain: Retained samples.
        config: Batches, epochs, steps.
        seed: Of the order.
    """

    objective: Objective
    forget: Sequence[int]
    retain: Sequence[int]
    config: BaselineConfig
    seed: int

    @property
    def _anchor(self) -> Schedule:
        c, ids = self.config, self.retain if self.objective.forget is None else self.forget
        return Schedule(list(ids), c.batch_size, c.epochs, c.max_steps, self.seed)

    @property
    def num_steps(self) -> int:
        return self._anchor.num_steps

    def __iter__(self) -> Iterator[Samples]:
        beside = (i for epoch in count() for i in epoch_order(self.retain, self.seed, epoch))
        for _, _, ids in self._anchor:
            if self.objective.forget is None:
                yield Samples([], ids)
            else:
                yield Samples(ids, list(islice(beside, len(ids))) if self.objective.retain_weight else [])
