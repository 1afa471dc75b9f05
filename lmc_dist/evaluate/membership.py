"""Membership inference: can one tell from a model which samples it was trained on?

Every score is higher for a sample that looks trained on, so an AUC of 1/2 is a guess and 1 gives every member away.
What counts for a model that has forgotten is not 1/2 but the AUC of a model that never had the samples (`privleak`):
other samples may be easier or harder than the forgotten ones for reasons of their own.

open-unlearning (src/evals/metrics/mia) has the opposite signs of scores and labels, which gives the same AUC.
"""

from __future__ import annotations

import zlib

import numpy as np
from scipy.stats import rankdata

from lmc_dist.evaluate.samples import TokenValues

MIN_K = 0.4  # open-unlearning's configs/eval/tofu_metrics/mia_min_k.yaml
_SMALLEST_VARIANCE = 1e-6  # as in open-unlearning's min_k_plus_plus.py


def loss_score(values: TokenValues) -> float:
    """(1/N) Σ_t log p(a_t): minus the loss (Yeom et al. 2018, arXiv:1709.01604), end token included."""
    return float(values.log_probs.mean())


def zlib_score(values: TokenValues, text: str) -> float:
    """(1/N) Σ_t log p(a_t) over the bytes of the zlib-compressed answer (Carlini et al. 2021, arXiv:2012.07805)."""
    return loss_score(values) / len(zlib.compress(text.encode()))


def min_k_score(values: TokenValues, fraction: float = MIN_K) -> float:
    """Mean of the ⌊fraction · N⌋ lowest log p(a_t), at least one, end token left out (Shi et al. 2023, arXiv:2310.16789)."""
    return _mean_of_lowest(values.without_end().log_probs, fraction)


def min_k_plus_plus_score(values: TokenValues, fraction: float = MIN_K) -> float:
    """`min_k_score` of (log p(a_t) − μ_t) / σ_t instead of log p(a_t) (Zhang et al. 2024, arXiv:2404.02936).

    μ_t and σ_t² are mean and variance of log p(v) over v drawn from the model; σ_t² is taken as at least 1e-6.
    """
    tokens = values.without_end()
    deviations = np.sqrt(np.maximum(tokens.variances, _SMALLEST_VARIANCE))
    return _mean_of_lowest((tokens.log_probs - tokens.means) / deviations, fraction)


def _mean_of_lowest(scores: np.ndarray, fraction: float) -> float:
    return float(np.sort(scores)[: max(1, int(len(scores) * fraction))].mean())


def auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """P(a member scores higher than another) + ½ P(they score the same), along the last axis.

    Args:
        members: (..., n) scores of samples that are said to be members.
        others: (..., m) scores of samples that are not.
    """
    n, m = members.shape[-1], others.shape[-1]
    ranks = rankdata(np.concatenate([members, others], axis=-1), axis=-1)
    return (ranks[..., :n].sum(-1) - n * (n + 1) / 2) / (n * m)


def privleak(found: np.ndarray, retrain: np.ndarray) -> np.ndarray:
    """100 · (AUC_retrain − AUC) / (1 − AUC_retrain), in percent; 0 is retraining. NaN where AUC_retrain is 1.

    MUSE (Shi et al. 2024, arXiv:2407.06460, §3.3) with open-unlearning's orientation: its AUC' is 1 − AUC of ours, and
    the leak 100 · (AUC' − AUC'_retrain) / AUC'_retrain. Below 0 the samples look more trained on than to the retrained
    model, above 0 less: they are conspicuous either way.
    """
    found, room = np.asarray(found, dtype=float), 1 - np.asarray(retrain, dtype=float)
    return np.where(room > 0, 100 * (1 - found - room) / np.where(room > 0, room, 1), np.nan)
