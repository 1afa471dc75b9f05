"""Bounds from control deletions: how often the true residual of a deletion is within the bound that its controls gave.

    .venv/bin/python bench/bound_coverage.py            one process of one thread; takes some minutes
    .venv/bin/python bench/bound_coverage.py --quick    fewer deletions: to see that it works

A Llama-shaped model of a few thousand parameters, plain SGD, two epochs of 120 samples in steps of 12. A trial draws
a deletion, then the controls that `lmc unlearn --privacy.basis controls` would draw for it, bounds the deletion's
residual by theirs and compares with the residual itself, ‖θ̂ − θ_retrain‖ against exact replay. Deletions that
several trials draw are computed once: of one sample there are only 120.

The last row breaks the assumption on purpose: it deletes all samples of a person, and its controls are as many random
samples. They are not exchangeable, and the coverage need not be the stated one. It has no target. The row before it
has other people as controls (privacy.groups).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import on_ranks, write_results

from lmc_dist.config import Config, DataConfig, ForgetConfig, LogConfig, ModelConfig, TrainConfig, UnlearnConfig

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True, **SIZES}
PEOPLE, FACTS, STRIDE = 20, 6, 100  # ids are person · STRIDE + fact
CONFIDENCE, TARGET = 0.9, 0.85


@dataclass(frozen=True)
class Case:
    """What is deleted, how, and with how many controls.

    Attributes:
        what: In words.
        mode: hessian_mode.
        size: Samples of a deletion; None is a whole person.
        controls: m.
        trials: Deletions whose bound is checked.
        by_person: Whether the controls are other people.
        has_target: Whether the controls are exchangeable with the deletion.
    """

    what: str
    mode: str
    size: int | None
    controls: int
    trials: int
    by_person: bool = False
    has_target: bool = True


CASES = (
    Case("one sample", "GGN", 1, 19, 200),
    Case("one sample", "none", 1, 19, 200),
    Case("four samples", "GGN", 4, 9, 60),
    Case("a person, controls people", "GGN", None, 9, 100, by_person=True),
    Case("a person, controls random", "GGN", None, 9, 20, has_target=False),
)


def run_config(folder: Path) -> Config:
    return Config(
        data=DataConfig(people=PEOPLE, facts_per_person=FACTS, max_length=96),
        model=ModelConfig(config=LLAMA, vocab_size=280),
        train=TrainConfig(epochs=2, batch_size=12, micro_batch_size=12, learning_rate=0.3, engine="single"),
        log=LogConfig("update", 5),
        log_dir=str(folder / "log"),
        output_dir=str(folder / "unlearn"),
        progress="none",
    )


def work(folder: Path, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """A row a case."""
    import torch

    from lmc_dist.runtime import Runtime
    from lmc_dist.training import Trainer
    from lmc_dist.unlearn.run import UnlearningRun

    runtime, config = Runtime(0, 1, torch.device("cpu")), run_config(folder)
    Trainer(config, runtime).run()
    rows = []
    for case in cases:
        asked = replace(config, forget=ForgetConfig(samples="0"), unlearn=UnlearnConfig(hessian_mode=case.mode))
        rows.append(measure(UnlearningRun(asked, runtime), case))
    return rows


def measure(run: Any, case: Case) -> dict[str, Any]:
    """The row of a case."""
    import torch
    from scipy.stats import beta
    from tqdm import tqdm

    from lmc_dist.privacy.conformal import conformal_bound
    from lmc_dist.privacy.controls import disjoint_requests, group_requests
    from lmc_dist.trajectory.counterfactual import Counterfactual

    generator = torch.Generator().manual_seed(case.size or 0)
    ids = [person * STRIDE + fact for person in range(PEOPLE) for fact in range(FACTS)]
    people = {str(person): ids[person * FACTS : (person + 1) * FACTS] for person in range(PEOPLE)}
    residual, known = residuals(run)
    held, widths = 0, []
    for trial in tqdm(range(case.trials), desc=f"{case.what}, {case.mode}"):
        if case.size is None:
            chosen = people[str(trial % PEOPLE)]
        else:
            chosen = [ids[i] for i in torch.randperm(len(ids), generator=generator)[: case.size].tolist()]
        request = Counterfactual("renormalize", sample_ids=frozenset(chosen))
        if case.by_person:
            controls = group_requests(run.log, request, people, case.controls, seed=trial)
        else:
            controls = disjoint_requests(run.log, request, case.controls, seed=trial)
        found = residual([request, *controls])
        bound, coverage = conformal_bound(found[1:], CONFIDENCE)
        held += found[0] <= bound
        widths.append(bound / found[0])
    low = float(beta.ppf(0.025, held, case.trials - held + 1)) if held else 0.0
    high = float(beta.ppf(0.975, held + 1, case.trials - held)) if held < case.trials else 1.0
    return {
        "what": case.what,
        "mode": case.mode,
        "controls": case.controls,
        "stated": coverage.level,
        "trials": case.trials,
        "deletions": len(known),
        "coverage": held / case.trials,
        "low": low,
        "high": high,
        "bound_over_residual": sorted(widths)[len(widths) // 2],
        "has_target": case.has_target,
    }


def residuals(run: Any) -> tuple[Callable[[list[Any]], list[float]], dict[Any, float]]:
    """(‖θ̂ − θ_retrain‖ of requests, what is known of it)."""
    from lmc_dist.privacy.controls import control_residuals

    theta, method, known = run.log.theta(run.log.num_steps), run.methods()[0], {}

    def look(requests: list[Any]) -> list[float]:
        new = [request for request in dict.fromkeys(requests) if request not in known]
        for request, found in zip(new, control_residuals(run, method, new, theta, lambda r: 0.0), strict=True):
            known[request] = found.norm
        return [known[request] for request in requests]

    return look, known


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'deleted':<28}{'mode':>6}{'m':>4}{'stated':>8}{'trials':>8}{'covered':>9}{'95 %':>16}{'bound/residual':>16}"
    )
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        print(
            f"{row['what']:<28}{row['mode']:>6}{row['controls']:>4}{row['stated']:>8.3f}{row['trials']:>8}"
            f"{row['coverage']:>9.3f}{interval:>16}{row['bound_over_residual']:>16.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer deletions")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    cases = tuple(replace(case, trials=case.trials // 10) for case in CASES) if options.quick else CASES
    with tempfile.TemporaryDirectory() as place:
        rows = on_ranks(1, work, Path(place), cases)
    show(rows)
    least = min(row["coverage"] for row in rows if row["has_target"])
    print(f"\nleast_coverage (target {TARGET:g}): {least:.3f}")
    write_results(options.json, "coverage", rows, {"least_coverage": least})


if __name__ == "__main__":
    main()
