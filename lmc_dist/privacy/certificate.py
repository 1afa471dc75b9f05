"""What may be said of a released model: pure functions from a bound and the noise to words and numbers.

The comparison is that of (ε, δ)-unlearning (Guo et al. 2020; Sekhari et al. 2021): the released θ̂ + N(0, Σ) against
θ_retrain + N(0, Σ), which never saw the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmc_dist.config import PrivacyConfig
from lmc_dist.errors import LmcError
from lmc_dist.privacy.composition import Basis
from lmc_dist.privacy.conformal import Coverage
from lmc_dist.privacy.covariance import SLACK
from lmc_dist.privacy.gaussian import epsilon_of, mu_of

CERTIFIED = "certified"
COVERED = "holds with the stated coverage"
ON_WORD = "holds on the user's word"
HEURISTIC = "heuristic noise"
UNPROVEN = "not certified"


@dataclass(frozen=True)
class Bound:
    """A bound on the residual, and what it rests on.

    Attributes:
        basis: `exact`, `controls`, `assumed`; or `heuristic`: there is none.
        norm: On ‖θ̂ − θ_retrain‖.
        distance: On ‖S^{-1/2}(θ̂ − θ_retrain)‖, which is what the noise is measured by.
        coverage: Of `controls`.
        constants: Of `assumed`: what the user vouches for.
        unmet: Assumptions of the statement that this run does not meet, in words.
    """

    basis: Basis | Literal["heuristic"]
    norm: float | None = None
    distance: float | None = None
    coverage: Coverage | None = None
    constants: Mapping[str, float] | None = None
    unmet: tuple[str, ...] = ()

    @property
    def failure(self) -> float:
        """Probability that it does not hold."""
        return 0.0 if self.coverage is None else 1 - self.coverage.level


def sigma_of(settings: PrivacyConfig, bound: Bound) -> float:
    """σ of Σ = σ² S: the one that is given, or the least that ε and δ take with this bound. Local.

    Raises:
        LmcError: The bound is infinite.
    """
    if bound.basis == "exact":
        return 0.0
    if settings.sigma is not None:
        return settings.sigma
    assert bound.distance is not None
    if not math.isfinite(bound.distance):
        raise LmcError(
            "no noise hides this residual: the method failed on so many control deletions that the bound is infinite"
        )
    return bound.distance * (1 + SLACK) / mu_of(settings.epsilon, settings.delta)


def certificate(settings: PrivacyConfig, bound: Bound, sigma: float, covariance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of result.json's `privacy` that follows from bound and noise. Local.

    Args:
        settings: For ε and δ.
        bound: On the residual.
        sigma: σ of Σ = σ² S.
        covariance: What S is, as its `describe` says.
    """
    mu: float | None = None
    if bound.distance is not None and not bound.unmet:
        mu = 0.0 if bound.distance == 0 else bound.distance * (1 + SLACK) / sigma if sigma > 0 else math.inf
        mu = mu if math.isfinite(mu) else None
    found: dict[str, Any] = {
        "basis": bound.basis,
        "bound": bound.norm if bound.norm is None or math.isfinite(bound.norm) else None,
        "distance": bound.distance if bound.distance is None or math.isfinite(bound.distance) else None,
        "coverage": None if bound.coverage is None else vars(bound.coverage),
        "constants": None if bound.constants is None else dict(bound.constants),
        "covariance": dict(covariance),
        "sigma": sigma,
        "mu": mu,
        "epsilon": None,
        "delta": None,
        "failure": bound.failure,
        "delta_total": None,
        "certified": status(bound, sigma, mu),
        "unmet": list(bound.unmet),
    }
    if mu is not None:
        # With μ = 0 nothing is left to tell apart, at any δ.
        delta = 0.0 if mu == 0 else settings.delta
        epsilon = 0.0 if mu == 0 else epsilon_of(mu, delta)
        found |= {"epsilon": epsilon, "delta": delta, "delta_total": min(delta + bound.failure, 1.0)}
    return {**found, "statement": statement(found)}


def status(bound: Bound, sigma: float, mu: float | None) -> str:
    """One of the words above."""
    if mu is None:
        return HEURISTIC if sigma > 0 else UNPROVEN
    return {"exact": CERTIFIED, "controls": COVERED, "assumed": ON_WORD}[bound.basis]


def statement(found: Mapping[str, Any]) -> str:
    """What may be said, in a sentence or two."""
    unmet = "; ".join(found["unmet"])
    if found["mu"] is None:
        why = unmet or "there is no bound on the distance to the retrained model"
        return f"{found['certified']}: no (ε, δ) is claimed, since {why}"
    if found["basis"] == "exact":
        return "certified: the weights are those of the run without the data, to the bit; (ε, δ) = (0, 0) without noise"
    is_round = found["covariance"]["kind"] == "isotropic"
    bounded = (
        f"‖θ̂ − θ_retrain‖ ≤ {found['bound']:.4g}"
        if is_round
        else f"‖S^(-1/2) (θ̂ − θ_retrain)‖ ≤ {found['distance']:.4g}"
    )
    pair = f"(ε, δ) = ({found['epsilon']:.4g}, {found['delta']:.3g}) against retraining without the data"
    if found["basis"] == "assumed":
        return f"{pair}, if {bounded}: that is on the user's word, and was not checked"
    coverage = found["coverage"]
    return (
        f"{pair}, if the bound {bounded} holds. It does with probability {coverage['level']:.3g} "
        f"for a request that is as random as its {coverage['controls']} control deletions (the residual of rank "
        f"{coverage['rank']}; given these controls at least {coverage['low']:.2g}, in 95 of 100 draws of them). With its "
        f"failure counted δ is {found['delta_total']:.3g}"
    )
