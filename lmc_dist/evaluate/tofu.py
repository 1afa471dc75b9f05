"""The measures of TOFU (Maini et al. 2024, arXiv:2401.06121), from probabilities and texts.

ℓ(a) stands for the mean log-probability of an answer's tokens, P(a | q)^(1/|a|) = exp ℓ(a). Formulas are those of TOFU's
aggregate_eval_stat.py, which open-unlearning has taken over.

Shapes: N questions, K wrong answers to each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import hmean, ks_2samp


def option_probability(right_N: np.ndarray, wrong_NK: np.ndarray) -> np.ndarray:
    """(N,) exp ℓ(a) / (exp ℓ(a) + Σ_k exp ℓ(a_k)): the right answer among all, for real authors and world facts.

    Args:
        right_N: ℓ of the right answers.
        wrong_NK: ℓ of the wrong ones.
    """
    return 1 / (1 + np.exp(wrong_NK - right_N[:, None]).sum(-1))


def truth_ratio(right_N: np.ndarray, wrong_NK: np.ndarray) -> np.ndarray:
    """(N,) R = exp((1/K) Σ_k ℓ(a_k) − ℓ(ã)): below 1 the model prefers the truth.

    The paper's equation 1 has the arithmetic mean of the wrong answers' probabilities; TOFU's code and open-unlearning
    compute the geometric one, and so does this.

    Args:
        right_N: ℓ of the paraphrased right answers ã; of the answers themselves where there is no paraphrase.
        wrong_NK: ℓ of the wrong ones.
    """
    return np.exp(wrong_NK.mean(-1) - right_N)


def evenness(ratio_N: np.ndarray) -> np.ndarray:
    """(N,) min(R, 1/R), the truth ratio's score on forgotten questions: 1 where truth and falsehood are equally likely."""
    return np.minimum(ratio_N, 1 / ratio_N)


def truthfulness(ratio_N: np.ndarray) -> np.ndarray:
    """(N,) max(0, 1 − R), the truth ratio's score on all other questions: 1 where falsehood is impossible."""
    return np.maximum(0, 1 - ratio_N)


def rouge_l_recall(references: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(N,) |longest common subsequence of words| / |words of the reference|, words stemmed (Lin 2004; rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(a, b)["rougeL"].recall for a, b in zip(references, texts, strict=True)])


def forget_quality(ratio_N: np.ndarray, retrain_N: np.ndarray) -> tuple[float, float]:
    """(p-value, statistic) of the two-sample Kolmogorov-Smirnov test of two models' truth ratios on forgotten questions.

    The p-value is TOFU's forget quality: the hypothesis is that the model is like the retrained one, so a small value
    says that it is not, and a large one only that N questions do not show a difference.
    """
    found = ks_2samp(ratio_N, retrain_N)
    return float(found.pvalue), float(found.statistic)


def model_utility(scores: np.ndarray) -> np.ndarray:
    """Harmonic mean along the first axis.

    TOFU's nine scores: probability, ROUGE-L recall and truthfulness on retained questions, real authors, world facts,
    with `option_probability` on the latter two.
    """
    return hmean(scores, axis=0)
