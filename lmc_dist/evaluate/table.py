"""The result of `evaluate` as text."""

from __future__ import annotations

from typing import Any

from lmc_dist.evaluate.measure import ATTACKS, UTILITY_SETS
from lmc_dist.evaluate.run import RETRAIN
from lmc_dist.log_commands.text import table

METRICS = {
    "probability": "probability",
    "rouge_l": "ROUGE-L recall",
    "truth_ratio": "truth ratio score",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorisation",
}
ATTACK_NAMES = {"loss": "loss", "zlib": "zlib", "min_k": "min-k", "min_k_plus_plus": "min-k++"}
SET_NAMES = {"retain": "retained", "real_authors": "real authors", "world_facts": "world facts"}


def evaluation_table(result: dict[str, Any]) -> str:
    """Forgotten questions as distances to the retrained model, all others as scores."""
    results, asked = result["results"], result["questions"]
    others = [name for name in results if name != RETRAIN]
    retrain = results[RETRAIN]
    rows = [["", RETRAIN, *(f"{name} − {RETRAIN}" for name in others)]]
    for metric in [metric for metric in METRICS if metric in retrain["forget"]]:
        cells = [distance(results[name]["forget"][metric]["distance"]) for name in others]
        rows.append([METRICS[metric], score(retrain["forget"][metric]), *cells])
    for attack in ATTACKS:
        cells = [distance(results[name]["auc"][attack]["distance"]) for name in others]
        rows.append([f"AUC, {ATTACK_NAMES[attack]}", score(retrain["auc"][attack]), *cells])
    for attack in ATTACKS:
        cells = [distance(results[name]["privleak"][attack], 1) for name in others]
        rows.append([f"privleak %, {ATTACK_NAMES[attack]}", "0", *cells])
    qualities = [results[name]["forget_quality"] for name in (RETRAIN, *others)]
    rows.append(["forget quality, p", *(f"{quality['p_value']:.3g}" for quality in qualities)])
    rows.append(["KS statistic", *(f"{quality['ks_statistic']:.3f}" for quality in qualities)])
    lines = [
        f"questions on {asked['forget']} of {result['forgotten_rows']} forgotten rows, {asked['holdout']} of the holdout; "
        "[95 % over questions]. The aim is the retrained model: differences of 0",
        *table(rows),
        "",
        f"{asked['retain']} retained questions, {asked['real_authors']} on real authors, {asked['world_facts']} on the "
        "world: higher is better",
    ]
    names = [RETRAIN, *others]
    rows = [["", *names]]
    for part in UTILITY_SETS:
        for metric in [metric for metric in METRICS if metric in retrain["utility"][part]]:
            cells = [score(results[name]["utility"][part][metric]) for name in names]
            rows.append([f"{SET_NAMES[part]}: {METRICS[metric]}", *cells])
    if retrain["model_utility"] is not None:
        rows.append(["model utility", *(score(results[name]["model_utility"]) for name in names)])
    return "\n".join([*lines, *table(rows)])


def score(found: dict[str, Any]) -> str:
    """`0.512 [0.480, 0.541]`."""
    return _with_bounds(found, ".3f")


def distance(found: dict[str, Any], digits: int = 3) -> str:
    """`+0.102 [+0.080, +0.124]`."""
    return _with_bounds(found, f"+.{digits}f")


def _with_bounds(found: dict[str, Any], form: str) -> str:
    value, low, high = ("-" if found[key] is None else format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
