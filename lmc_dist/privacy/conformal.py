"""A bound from controls, without any assumption on how residuals are distributed (split conformal prediction).

If the residuals of m control deletions and of the request are exchangeable, the request's is as likely to have any
rank among the m + 1 as any other. So the k-th smallest of the controls is not below it with probability ≥ k/(m + 1),
and k = ⌈(m + 1)(1 − α)⌉ is the rank that a coverage of 1 − α takes: that m + 1, where an empirical quantile has m, is
the finite-sample correction (Vovk, Gammerman & Shafer 2005). The coverage is one over the draw of controls and
request together. Given the controls it is itself random, at least Beta(k, m + 1 − k) (Vovk 2012); what it is in
95 of 100 draws of controls is told with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lmc_dist.errors import LmcError

SURE = 0.95


@dataclass(frozen=True)
class Coverage:
    """How often a bound from controls holds.

    Attributes:
        asked: 1 − α.
        level: k/(m + 1) ≥ 1 − α, what the bound has.
        controls: m.
        rank: k: the bound is the k-th smallest residual.
        low: What the coverage given these controls is at least, in 95 of 100 draws of controls.
    """

    asked: float
    level: float
    controls: int
    rank: int
    low: float


def rank_of(controls: int, confidence: float) -> int:
    """k = ⌈(m + 1)(1 − α)⌉, in exact arithmetic of the decimal that was given."""
    return math.ceil((controls + 1) * Fraction(repr(confidence)))


def needed_controls(confidence: float) -> int:
    """The fewest controls among which rank k exists."""
    asked = Fraction(repr(confidence))
    return math.ceil(asked / (1 - asked))


def check_controls(controls: int, confidence: float) -> None:
    """Checks that so many controls can bound anything. Local.

    Raises:
        LmcError: They cannot.
    """
    if not 0 < confidence < 1:
        raise LmcError(f"privacy.confidence must be between 0 and 1, got {confidence}")
    if controls < needed_controls(confidence):
        raise LmcError(
            f"privacy.controls={controls} cannot bound a residual with a coverage of {confidence:g}: that takes at "
            f"least {needed_controls(confidence)}"
        )


def conformal_bound(residuals: Sequence[float], confidence: float) -> tuple[float, Coverage]:
    """The bound and its coverage. Local.

    Args:
        residuals: Of the controls; ∞ where a control gave nothing, which counts like any other.
        confidence: 1 − α.

    Raises:
        LmcError: Too few controls.
    """
    m = len(residuals)
    check_controls(m, confidence)
    k = rank_of(m, confidence)
    return sorted(residuals)[k - 1], Coverage(confidence, k / (m + 1), m, k, beta_quantile(k, m + 1 - k, 1 - SURE))


def beta_quantile(a: int, b: int, share: float) -> float:
    """The x with P(Beta(a, b) ≤ x) = share, for integers: P(Beta(a, b) ≤ x) = P(Binomial(a + b − 1, x) ≥ a)."""
    n = a + b - 1

    def below(x: float) -> float:
        return math.fsum(math.comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(a, n + 1))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return low
