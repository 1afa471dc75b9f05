"""Models against the retrained one, with intervals: what `measure` found → plain numbers.

On forgotten questions the aim is the retrained model and not the lowest score: a model that knows less of them than one that
never saw them has been damaged, and shows what it was made to forget. So there every number is a difference to the retrained
model, resampled on the same questions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lmc_dist.evaluate.intervals import Interval, bootstrap, mean_interval
from lmc_dist.evaluate.measure import ATTACKS, UTILITY_SETS, Measured
from lmc_dist.evaluate.membership import auc, privleak
from lmc_dist.evaluate.tofu import forget_quality, model_utility


def compare(found: Measured, retrain: Measured, resamples: int = 1000) -> dict[str, Any]:
    """One model's results, ready for JSON. Local.

    Returns:
        `forget` and `auc`: metric → the value itself, and under `distance` model − retrain; `privleak` by attack;
        `forget_quality`; `utility`: set → metric → value, and `model_utility` where texts were generated. Values are
        {value, low, high}, null where undefined.
    """
    n, m = len(found.truth_ratios), len(found.holdout["loss"])
    forget = {}
    for name, scores in found.forget.items():
        difference = mean_interval(scores - retrain.forget[name], resamples)
        forget[name] = {**plain(mean_interval(scores, resamples)), "distance": plain(difference)}
    aucs, leaks = {}, {}
    for attack in ATTACKS:
        pairs = [(x.members[attack], x.holdout[attack]) for x in (found, retrain)]

        def areas(f: np.ndarray, h: np.ndarray, pairs: Any = pairs) -> tuple[np.ndarray, np.ndarray]:
            own, reference = (auc(members[f], others[h]) for members, others in pairs)
            return own, reference

        value = bootstrap(lambda f, h, areas=areas: areas(f, h)[0], [n, m], resamples)
        difference = bootstrap(lambda f, h, areas=areas: np.subtract(*areas(f, h)), [n, m], resamples)
        aucs[attack] = {**plain(value), "distance": plain(difference)}
        leaks[attack] = plain(bootstrap(lambda f, h, areas=areas: privleak(*areas(f, h)), [n, m], resamples))
    p_value, statistic = forget_quality(found.truth_ratios, retrain.truth_ratios)
    utility: dict[str, Any] = {
        name: {metric: plain(mean_interval(scores, resamples)) for metric, scores in found.utility[name].items()}
        for name in UTILITY_SETS
    }
    sets = [found.utility[name] for name in UTILITY_SETS]
    whole = None
    if all("rouge_l" in scores for scores in sets):

        def nine(*rows: np.ndarray) -> np.ndarray:
            means = [x[r].mean(-1) for scores, r in zip(sets, rows, strict=True) for x in scores.values()]
            return model_utility(np.stack(means))

        whole = plain(bootstrap(nine, [len(scores["probability"]) for scores in sets], resamples))
    return {
        "forget": forget,
        "auc": aucs,
        "privleak": leaks,
        "forget_quality": {"p_value": p_value, "ks_statistic": statistic},
        "utility": utility,
        "model_utility": whole,
    }


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON."""
    return {key: float(x) if np.isfinite(x) else None for key, x in asdict(interval).items()}
