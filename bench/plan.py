"""Predicted against measured: seconds, gradients and peak memory of strategies for six requests on one log, and whether the
recommended strategy is the fastest that keeps the asked error.

    .venv/bin/python bench/plan.py
    .venv/bin/python bench/plan.py --num_ranks 2 --steps 60 --json plan.json

A small Llama is trained with a log. Every round calibrates anew and then runs every strategy for every request, so that what
else the machine does meets both alike; medians over the rounds are compared. Peaks are those of live tensors on rank 0, each
from one further run that does not read ahead, since the count does not see what the reading thread makes; the prediction
leaves these two vectors out as well. The recommendation knows the errors of control deletions alone (`--controls` of each
kind and size); it is right where it names the strategy that measured fastest among those whose own error, against replay of
the request itself, is within `--max_error`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import live_peak, on_ranks, write_results
from tqdm import tqdm

MODES = [("none", 0), ("GGN", 0), ("exact", 0), ("secant", 0), ("GGN", 10), ("exact", 10)]
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6}


def work(
    folder: str, steps: int, rounds: int, optimizer: str, controls: int, max_error: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row a request and strategy: predictions and measurements, a row a request: what was recommended), on every rank."""
    import torch
    import torch.distributed as dist

    from lmc_dist.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig
    from lmc_dist.curvature import HVPConfig
    from lmc_dist.evaluate.distance import relative_error
    from lmc_dist.logged_run import open_logged_run, starting_model
    from lmc_dist.planner.calibrate import calibrate
    from lmc_dist.planner.controls import Candidate, control_requests, measure_controls, measurements
    from lmc_dist.planner.facts import model_facts
    from lmc_dist.planner.reading import log_facts, request_facts
    from lmc_dist.planner.recommendation import recommend
    from lmc_dist.planner.strategies import Options, plan, strategy_name
    from lmc_dist.runtime import Runtime
    from lmc_dist.shards.relayout import relayout
    from lmc_dist.training import Trainer
    from lmc_dist.trajectory.replay import replay, replay_engine
    from lmc_dist.unlearn.correction import compute_correction
    from lmc_dist.unlearn.request import make_request

    runtime = Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    rate = 0.03 if optimizer == "sgd" else 0.001
    config = Config(
        data=DataConfig(people=60, facts_per_person=12, max_length=96),
        model=ModelConfig(
            config={"model_type": "llama", **SHAPE, "num_key_value_heads": 6, "tie_word_embeddings": True}
        ),
        train=TrainConfig(max_steps=steps, optimizer=optimizer, learning_rate=rate, schedule="linear"),  # type: ignore[arg-type]
        log=LogConfig(save_interval=10),
        log_dir=folder,
    )
    trainer = Trainer(config, runtime)
    trainer.run()
    trainer.engine.destroy()
    run = open_logged_run(config, runtime)
    log: Any = run.log
    record = log.record
    spread = [record(s).sample_ids[0] for s in range(3, steps, 4)]
    requests = {
        "one sample, early": make_request([record(2).sample_ids[3]]),
        "one sample, middle": make_request([record(steps // 2).sample_ids[3]]),
        "one sample, late": make_request([record(steps - steps // 8).sample_ids[3]]),
        f"{len(spread)} samples": make_request(spread),
        "a batch": make_request(batch_ids=[4]),
        "two batches, late": make_request(batch_ids=[steps // 2, steps // 2 + 5]),
    }
    facts = {name: request_facts(log, request, run.batches, run.dataset) for name, request in requests.items()}
    model = model_facts(run.module.module)
    logged = {name: log_facts(log, model, run.dataset, fact.first) for name, fact in facts.items()}

    make = lambda: starting_model(config, run.model_config, log)  # noqa: E731
    theta = log.theta(steps)
    references: dict[str, Any] = {}

    def correct(name: str, mode: str, head: int) -> tuple[float, Any]:
        found = compute_correction(log, run.module, run.batches, requests[name], HVPConfig(mode), replay_head=head)
        return found.gradients_equivalent, found

    def replay_once(name: str) -> tuple[float, Any]:
        engine = replay_engine(make(), log)
        found = replay(engine, log, run.batches, requests[name])
        engine.destroy()
        references[name] = relayout(found.theta, theta.layout)
        return float(found.steps), None

    candidates = [Candidate(mode, head) for mode, head in MODES]  # type: ignore[arg-type]
    engine, known = replay_engine(make(), log), []
    for request in {(r.kind, len(r.sample_ids or r.batch_ids)): r for r in requests.values()}.values():
        drawn = control_requests(log, request, controls)
        known += measure_controls(run, engine, drawn, candidates, HVPConfig)
    engine.destroy()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    advice: dict[str, tuple[str | None, str]] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=not runtime.is_main):
        for name, fact in facts.items():
            machine = calibrate(log, logged[name], run.module, run.batches, fact.first, make)
            plans = {s.name: s for s in plan(fact, logged[name], machine)}
            peaks = {s.name: s for s in plan(fact, replace(logged[name], step_bytes=0), machine)}
            calls = {"replay": lambda: replay_once(name)}  # noqa: B023
            calls |= {strategy_name(m, h): (lambda m=m, h=h: correct(name, m, h)) for m, h in MODES}  # type: ignore[misc]  # noqa: B023
            for strategy, call in calls.items():
                dist.barrier()
                began = time.perf_counter()
                gradients, correction = call()
                row = rows.setdefault((name, strategy), {"predicted": [], "measured": []})
                row["measured"].append(time.perf_counter() - began)
                row["predicted"].append(plans[strategy].seconds)
                row |= {"gradients_predicted": plans[strategy].gradients, "gradients": gradients, "rel_error": 0.0}
                if correction is not None:
                    row["rel_error"] = relative_error(correction.corrected(theta), theta, references[name])
                row["peak_predicted"] = peaks[strategy].peak_bytes
            measured = measurements(known, fact.kind, fact.size)
            options = Options(max_error=max_error)
            chosen, sentence = recommend(plan(fact, logged[name], machine, options, measured), max_error)
            advice[name] = (None if chosen is None else chosen.name, sentence)  # the last round's
    found = []
    log.read_ahead = lambda start, stop: nullcontext()
    for (name, strategy), row in rows.items():
        if strategy == "replay":
            row["peak"] = live_peak(lambda: replay_once(name))  # noqa: B023
        else:
            mode, head = next((m, h) for m, h in MODES if strategy_name(m, h) == strategy)
            row["peak"] = live_peak(lambda: correct(name, mode, head))  # noqa: B023
        medians = {key: statistics.median(row[key]) for key in ("predicted", "measured")}
        found.append({"request": name, "strategy": strategy, **row, **medians})
    advised = []
    for name, (chosen_name, sentence) in advice.items():
        good = [r for r in found if r["request"] == name and r["rel_error"] <= max_error]
        fastest = min(good, key=lambda r: r["measured"])["strategy"]
        advised.append({"request": name, "recommended": chosen_name, "fastest": fastest, "sentence": sentence})
    return found, advised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ranks", type=int, default=1, help="processes")
    parser.add_argument("--steps", type=int, default=40, help="steps of the logged run")
    parser.add_argument("--rounds", type=int, default=3, help="of calibration and measurement")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of the logged run")
    parser.add_argument("--controls", type=int, default=2, help="control deletions of each kind and size")
    parser.add_argument("--max_error", type=float, default=0.1, help="rel_error that will do")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder) / "log")
        asked = options.steps, options.rounds, options.optimizer, options.controls, options.max_error
        rows, advised = on_ranks(options.num_ranks, work, log, *asked)
    print(f"{'request':<20}{'strategy':<10}{'s predicted':>12}{'measured':>10}{'ratio':>7}", end="")
    print(f"{'gradients':>11}{'reported':>10}{'rel_error':>11}{'MB predicted':>14}{'live':>7}{'ratio':>7}")
    for row in rows:
        row["ratio"] = row["predicted"] / row["measured"]
        line = f"{row['request']:<20}{row['strategy']:<10}{row['predicted']:>12.2f}{row['measured']:>10.2f}"
        line += (
            f"{row['ratio']:>7.2f}{row['gradients_predicted']:>11.1f}{row['gradients']:>10.1f}{row['rel_error']:>11.3f}"
        )
        row["peak_ratio"] = row["peak_predicted"] / row["peak"]
        line += f"{row['peak_predicted'] / 1e6:>14.1f}{row['peak'] / 1e6:>7.1f}{row['peak_ratio']:>7.2f}"
        print(line)
    worst = max(max(row["ratio"], 1 / row["ratio"]) for row in rows)
    print()
    for row in advised:
        right = "right" if row["recommended"] == row["fastest"] else "WRONG"
        print(f"{row['request']:<20}recommended {row['recommended']}, fastest {row['fastest']}: {right}")
    hits = sum(row["recommended"] == row["fastest"] for row in advised)
    print(f"recommended_is_fastest: {hits} of {len(advised)}")
    worst_peak = max(max(r["peak_ratio"], 1 / r["peak_ratio"]) for r in rows)
    summary = {"worst_seconds_ratio": worst, "worst_peak_ratio": worst_peak, "recommended_is_fastest": hits}
    for name, value in summary.items():
        print(f"{name}: {value:.3g}")
    write_results(options.json, "plan", rows, summary, recommendations=advised)


if __name__ == "__main__":
    main()
