"""Predicted against measured: seconds, gradients and peak memory of strategies for several requests on one log.

    .venv/bin/python bench/plan.py
    .venv/bin/python bench/plan.py --num_ranks 2 --steps 60 --json plan.json

A small Llama is trained with a log. Every round calibrates anew and then runs every strategy for every request, so that what
else the machine does meets both alike; medians over the rounds are compared. Peaks are those of live tensors on rank 0, each
from one further run that does not read ahead, since the count does not see what the reading thread makes; the prediction
leaves these two vectors out as well.
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

MODES = [("none", 0), ("GGN", 0), ("exact", 0), ("secant", 0), ("GGN", 10)]
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6}


def work(folder: str, steps: int, rounds: int, optimizer: str) -> list[dict[str, Any]]:
    """Rows of predictions and measurements, on every rank."""
    import torch
    import torch.distributed as dist

    from lmc_dist.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig
    from lmc_dist.curvature import HVPConfig
    from lmc_dist.logged_run import open_logged_run, starting_model
    from lmc_dist.planner.calibrate import calibrate
    from lmc_dist.planner.facts import model_facts
    from lmc_dist.planner.reading import log_facts, request_facts
    from lmc_dist.planner.strategies import plan, strategy_name
    from lmc_dist.runtime import Runtime
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
        "one sample, late": make_request([record(steps // 2).sample_ids[3]]),
        f"{len(spread)} samples": make_request(spread),
        "a batch": make_request(batch_ids=[4]),
    }
    facts = {name: request_facts(log, request, run.batches, run.dataset) for name, request in requests.items()}
    model = model_facts(run.module.module)
    logged = {name: log_facts(log, model, run.dataset, fact.first) for name, fact in facts.items()}

    def correct(name: str, mode: str, head: int) -> Any:
        return compute_correction(
            log, run.module, run.batches, requests[name], HVPConfig(mode), replay_head=head
        ).gradients_equivalent

    def replay_once(name: str) -> Any:
        engine = replay_engine(starting_model(config, run.model_config, log), log)
        steps = replay(engine, log, run.batches, requests[name]).steps
        engine.destroy()
        return float(steps)

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=not runtime.is_main):
        for name, fact in facts.items():
            make = lambda: starting_model(config, run.model_config, log)  # noqa: E731
            machine = calibrate(log, logged[name], run.module, run.batches, fact.first, make)
            plans = {s.name: s for s in plan(fact, logged[name], machine)}
            peaks = {s.name: s for s in plan(fact, replace(logged[name], step_bytes=0), machine)}
            chosen = [(m, h) for m, h in MODES if not (h and fact.kind == "skip")]
            calls = {strategy_name(m, h): (lambda m=m, h=h: correct(name, m, h)) for m, h in chosen}  # noqa: B023
            calls["replay"] = lambda: replay_once(name)  # noqa: B023
            for strategy, call in calls.items():
                dist.barrier()
                began = time.perf_counter()
                gradients = call()
                row = rows.setdefault((name, strategy), {"predicted": [], "measured": []})
                row["measured"].append(time.perf_counter() - began)
                row["predicted"].append(plans[strategy].seconds)
                row |= {"gradients_predicted": plans[strategy].gradients, "gradients": gradients}
                if strategy != "replay":
                    row["peak_predicted"] = peaks[strategy].peak_bytes
    found = []
    log.read_ahead = lambda start, stop: nullcontext()
    for (name, strategy), row in rows.items():
        if strategy != "replay":
            mode, head = next((m, h) for m, h in MODES if strategy_name(m, h) == strategy)
            row["peak"] = live_peak(lambda: correct(name, mode, head))  # noqa: B023
        medians = {key: statistics.median(row[key]) for key in ("predicted", "measured")}
        found.append({"request": name, "strategy": strategy, **row, **medians})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ranks", type=int, default=1, help="processes")
    parser.add_argument("--steps", type=int, default=40, help="steps of the logged run")
    parser.add_argument("--rounds", type=int, default=3, help="of calibration and measurement")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of the logged run")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder) / "log")
        rows = on_ranks(options.num_ranks, work, log, options.steps, options.rounds, options.optimizer)
    print(f"{'request':<20}{'strategy':<10}{'s predicted':>12}{'measured':>10}{'ratio':>7}", end="")
    print(f"{'gradients':>11}{'reported':>10}{'MB predicted':>14}{'live':>7}{'ratio':>7}")
    for row in rows:
        row["ratio"] = row["predicted"] / row["measured"]
        line = f"{row['request']:<20}{row['strategy']:<10}{row['predicted']:>12.2f}{row['measured']:>10.2f}"
        line += f"{row['ratio']:>7.2f}{row['gradients_predicted']:>11.1f}{row['gradients']:>10.1f}"
        if "peak" in row:
            row["peak_ratio"] = row["peak_predicted"] / row["peak"]
            line += f"{row['peak_predicted'] / 1e6:>14.1f}{row['peak'] / 1e6:>7.1f}{row['peak_ratio']:>7.2f}"
        print(line)
    worst = max(max(row["ratio"], 1 / row["ratio"]) for row in rows)
    print(f"worst_peak_ratio: {max(max(r['peak_ratio'], 1 / r['peak_ratio']) for r in rows if 'peak_ratio' in r):.2f}")
    print(f"worst_seconds_ratio: {worst:.2f}")
    write_results(options.json, "plan", rows, worst_seconds_ratio=worst)


if __name__ == "__main__":
    main()
