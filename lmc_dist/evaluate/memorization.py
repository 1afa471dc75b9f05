"""How well a model knows an answer, from its values at the answer's N tokens (`samples.TokenValues`)."""

from __future__ import annotations

import numpy as np

from lmc_dist.evaluate.samples import TokenValues


def mean_log_prob(values: TokenValues) -> float:
    """(1/N) Σ_t log p(a_t | q, a_<t), end token included."""
    return float(values.log_probs.mean())


def answer_probability(values: TokenValues) -> float:
    """P(a | q)^(1/N) = exp((1/N) Σ_t log p(a_t | q, a_<t)).

    TOFU (Maini et al. 2024, arXiv:2401.06121, §2.2), "Probability"; open-unlearning's `probability`.
    """
    return float(np.exp(mean_log_prob(values)))


def exact_memorization(values: TokenValues) -> float:
    """(1/N) Σ_t 1[argmax_v p(v | q, a_<t) = a_t], end token left out.

    Tirumala et al. 2022 (arXiv:2205.10770); open-unlearning's `exact_memorization`.
    """
    return float(values.without_end().hits.mean())


def extraction_strength(values: TokenValues) -> float:
    """1 − k/N with k the fewest tokens of the answer after which all others are the most likely ones, end left out.

    Carlini et al. 2021 (arXiv:2012.07805) in the form of open-unlearning's `extraction_strength`. Where even the last
    token is not the most likely one, k is N and the strength 0; open-unlearning's loop ends at k = N − 1 and gives 1/N.
    """
    hits = values.without_end().hits
    missed = np.flatnonzero(~hits)
    k = 0 if not len(missed) else int(missed[-1]) + 1
    return 1 - k / len(hits)
