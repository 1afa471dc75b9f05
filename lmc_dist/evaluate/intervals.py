"""Bootstrap confidence intervals (Efron 1979): how far a number depends on which questions were asked.

They say nothing about another training seed, whose effect may be the larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its confidence interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic, sizes: Sequence[int], resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic under resampling of groups of questions, each by itself. Local.

    Args:
        statistic: Takes one array of indices a group, each (..., size), and returns the statistic for each row of
            indices (...). What belongs to one question is taken by the same index and so stays together: a difference of two
            models on the same questions is resampled in pairs.
        sizes: Number of questions of each group.
        resamples: Draws.
        confidence: Coverage of the interval.
        seed: Of the draws; the same on every rank.
    """
    rng = np.random.default_rng(seed)
    value = statistic(*(np.arange(size) for size in sizes))
    drawn = statistic(*(rng.integers(size, size=(resamples, size)) for size in sizes))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def mean_interval(values: np.ndarray, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean of one number a question. Local."""
    return bootstrap(lambda rows: values[rows].mean(-1), [len(values)], resamples, confidence, seed)
