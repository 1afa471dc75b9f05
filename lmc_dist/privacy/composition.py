"""What several releases of models give away together.

A release is a Gaussian μ away from what it is to be taken for, and independent Gaussians next to each other are one,
with μ² = Σ μ_i²: exactly, whatever their number and also where a later request was chosen after seeing earlier
releases (Dong, Roth & Su 2022). A sum of ε, or Rényi's moments turned into (ε, δ), are
upper bounds of the same. Where a bound behind a μ holds with some probability alone, what is missing adds to δ (union
bound).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lmc_dist.errors import LmcError
from lmc_dist.privacy.gaussian import epsilon_of

Basis = Literal["exact", "controls", "assumed"]
STRENGTH: tuple[Basis, ...] = ("exact", "controls", "assumed")  # what a bound rests on, the strongest first


@dataclass(frozen=True)
class Release:
    """One released model.

    Attributes:
        mu: ‖Σ^{-1/2}(θ̂ − θ_retrain)‖ at most.
        failure: Probability that this bound does not hold.
        basis: What it rests on.
    """

    mu: float
    failure: float = 0.0
    basis: Basis = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf or not 0 <= self.failure <= 1:
            raise LmcError(f"a release needs 0 ≤ μ < ∞ and a failure in [0, 1], got {self.mu} and {self.failure}")
        if self.basis not in STRENGTH:
            raise LmcError(f"a release rests on one of {', '.join(STRENGTH)}, not on '{self.basis}'")

    @classmethod
    def of_result(cls, privacy: Mapping[str, Any] | None) -> Release:
        """What the `privacy` object of a result.json says. Local.

        Raises:
            LmcError: It says nothing that could be composed.
        """
        if privacy is None or privacy.get("mu") is None:
            raise LmcError("a release without a residual bound has no ε, and neither has anything it is a part of")
        return cls(privacy["mu"], privacy["failure"], privacy["basis"])


class Composed(NamedTuple):
    """(ε, δ) of all releases together."""

    epsilon: float
    delta: float


def compose(releases: Iterable[Release], delta: float) -> Composed:
    """The (ε, δ) of releases with independent noise, taken together. Local.

    Args:
        releases: In any order; none are (0, δ).
        delta: The δ that the Gaussians alone get; failures of bounds are added to it in the result.

    Raises:
        LmcError: δ not in (0, 1), or with the failures of the bounds no longer below 1: nothing can be said.
    """
    parts = list(releases)
    total = math.fsum([delta, *(part.failure for part in parts)])
    epsilon = epsilon_of(math.sqrt(math.fsum(part.mu**2 for part in parts)), delta)
    if total >= 1:
        raise LmcError(
            f"the bounds of {len(parts)} releases fail with a probability of up to {total - delta:.3g} together: with "
            "more controls and a higher privacy.confidence each they would say something"
        )
    return Composed(epsilon, total)


def weakest(releases: Iterable[Release]) -> Basis:
    """What releases rest on together: a statement on all is as strong as the weakest of them. Local."""
    return max((part.basis for part in releases), key=STRENGTH.index, default="exact")
