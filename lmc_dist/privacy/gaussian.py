"""The Gaussian mechanism, exactly (Balle & Wang 2018): (ε, δ) from how far apart two Gaussians are, and back.

N(x, Σ) and N(y, Σ) differ, for whoever tells them apart, by μ = ‖Σ^{-1/2}(x − y)‖ alone, and the smallest δ of an ε is

    δ(ε; μ) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)

(their theorem 8 in the form of Dong, Roth & Su 2022), the same in both directions. It holds for every ε
≥ 0, small and large, which σ = √(2 ln(1.25/δ))/ε does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lmc_dist.errors import LmcError

_ROOT2 = math.sqrt(2.0)


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest δ with which two unit Gaussians μ apart are (ε, δ)-indistinguishable. Local.

    With a = ε/μ − μ/2 and b = ε/μ + μ/2 both terms have the factor φ(a), since e^ε φ(b) = φ(a): taken out, nothing
    overflows, and a δ far below the rounding of Φ keeps its digits.

    Raises:
        LmcError: ε or μ below 0.
    """
    if not epsilon >= 0 or not mu >= 0:
        raise LmcError(f"ε and μ must be ≥ 0, got {epsilon} and {mu}")
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    weight = math.exp(-a * a / 2)
    if a >= 0:
        return max(weight * (_erfcx(a / _ROOT2) - _erfcx(b / _ROOT2)) / 2, 0.0)
    return (math.erfc(a / _ROOT2) - weight * _erfcx(b / _ROOT2)) / 2


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε of a δ, rounded up. Local.

    Raises:
        LmcError: μ below 0 or not finite, or δ not in (0, 1).
    """
    _check_delta(delta)
    if not 0 <= mu < math.inf:
        raise LmcError(f"μ must be a number ≥ 0, got {mu}: a residual without a bound has no ε")
    if delta_of(0.0, mu) <= delta:
        return 0.0
    return _bisect(lambda epsilon: delta_of(epsilon, mu) <= delta)[1]


def mu_of(epsilon: float, delta: float) -> float:
    """The largest μ that is (ε, δ)-indistinguishable, rounded down: the least noise is σ = bound / μ. Local.

    Raises:
        LmcError: ε below 0 or not finite, or δ not in (0, 1).
    """
    _check_delta(delta)
    if not 0 <= epsilon < math.inf:
        raise LmcError(f"privacy.epsilon must be a number ≥ 0, got {epsilon}")
    return _bisect(lambda mu: delta_of(epsilon, mu) > delta)[0]


def _erfcx(x: float) -> float:
    """e^{x²} erfc(x)."""
    return float(torch.special.erfcx(torch.tensor(x, dtype=torch.float64)))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise LmcError(f"privacy.delta must be between 0 and 1, got {delta}")


def _bisect(is_above: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbouring numbers > 0 between which a condition becomes true."""
    low, high = 0.0, 1.0
    while not is_above(high):
        low, high = high, 2 * high
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return low, high
