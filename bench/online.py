"""Deletion while training runs: how close the end is to a retrain, and what training loses.

    .venv/bin/python bench/online.py
    .venv/bin/python bench/online.py --optimizers sgd --methods GGN replay --json online.json

DeepSpeed ZeRO-3 on two gloo ranks fine-tunes a pretrained Llama of 260 thousand parameters on TOFU: 60 steps of 8 samples. Ten
requests of one to three samples come at random step boundaries and are answered there, by each method in a run of its own.
`rel_error` is the distance of the run's end to a run that never saw any of the samples, over that of the run that nothing
was asked of (do nothing 1, retrain 0); `at the end` is the same method in one request after training. `lost` is what the
boundaries took, of the time of the whole run. `replayed` counts answers by replay where the method was not trusted (online.max_growth). `polling` compares steps with and without a look at the ledger, nothing being
asked: whole runs that take turns, medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import add_tofu_arguments, on_ranks, write_results

from lmc_dist.config import Config, DataConfig, ForgetConfig, LogConfig, ModelConfig, OnlineConfig, TrainConfig
from lmc_dist.trajectory.files import ledger_folder

STEPS, BATCH, REQUESTS, RANKS = 60, 8, 10, 2
# As in bench/accuracy.py.
TRAININGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "linear"},
    "adamw": {
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "GGN": {"replay_head": 0, "hessian_mode": "GGN"},
    "exact": {"replay_head": 0, "hessian_mode": "exact"},
    "secant": {"replay_head": 0, "hessian_mode": "secant"},
    "replay": {"replay_head": "all"},
}
Asked = Mapping[int, Sequence[Sequence[int]]]


def base_config(folder: Path, data: str, model: str, optimizer: str, seed: int) -> Config:
    return Config(
        data=DataConfig("tofu", data, f"0:{STEPS * BATCH // 2}", max_length=96, prompt="{question}\n"),
        model=ModelConfig(model),
        train=TrainConfig(
            epochs=2,
            batch_size=BATCH,
            micro_batch_size=BATCH // RANKS,
            warmup_steps=5,
            max_steps=STEPS,
            seed=seed,
            **TRAININGS[optimizer],
        ),
        log=LogConfig("update" if optimizer == "sgd" else "gradient", 10),
        log_dir=str(folder / "nothing"),
    )


def run(config: Config, asked: Asked) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """(seconds, what answering cost, requests) of a training; rank 0 files requests at boundaries."""
    from lmc_dist.online.ledger import Ledger
    from lmc_dist.runtime import Runtime
    from lmc_dist.training import Trainer

    trainer = Trainer(config, Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))

    def file(step: int) -> None:
        for ids in asked.get(step, ()) if dist.get_rank() == 0 else ():
            Ledger(ledger_folder(config.log_dir)).submit(ids)

    trainer.logger.boundaries.append(file)
    dist.barrier()
    started = time.perf_counter()
    summary = trainer.run()
    seconds = time.perf_counter() - started
    trainer.engine.destroy()
    if not asked or dist.get_rank():
        return seconds, summary["online"] or {}, []
    requests = Ledger(ledger_folder(config.log_dir)).requests()[0]
    return seconds, summary["online"], [{"status": r.status, "step": r.step, **r.result} for r in requests]


def work(folder: str, data: str, model: str, optimizer: str, methods: Sequence[str], seed: int, rounds: int) -> Any:
    """(rows of methods, seconds of runs without and with polling), on every rank."""
    from lmc_dist.curvature import HVPConfig
    from lmc_dist.evaluate.distance import relative_error
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.runtime import Runtime
    from lmc_dist.shards.checksum import checksum
    from lmc_dist.trajectory.store import TrajectoryLog
    from lmc_dist.unlearn.correction import compute_correction
    from lmc_dist.unlearn.request import make_request

    config = base_config(Path(folder), data, model, optimizer, seed)
    run(config, {})
    plain = TrajectoryLog(config.log_dir)
    chance = random.Random(seed)
    asked: dict[int, list[list[int]]] = {}
    seen: set[int] = set()
    for step in sorted(chance.sample(range(5, STEPS - 2), REQUESTS)):  # of samples that training has met
        met = sorted({i for s in range(step) for i in plain.record(s).sample_ids} - seen)
        ids = chance.sample(met, chance.randint(1, 3))
        seen |= set(ids)
        asked[step] = [ids]
    forget = ForgetConfig(samples=",".join(map(str, sorted(seen))))
    retrain = replace(config, forget=forget, log_dir=str(Path(folder) / "retrain"), log=LogConfig("replay", None))
    run(retrain, {})
    end = lambda path: (log := TrajectoryLog(path)).theta(log.num_steps)  # noqa: E731
    theta, reference = end(config.log_dir), end(retrain.log_dir)
    opened = open_logged_run(config, Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    rows = []
    for name in methods:
        online = replace(config, online=OnlineConfig(enabled=True, **METHODS[name]), log_dir=str(Path(folder) / name))
        seconds, cost, requests = run(online, asked)
        reached = end(online.log_dir)
        row: dict[str, Any] = {
            "method": name,
            "rel_error": relative_error(reached, theta, reference),
            "at_the_end": 0.0,
        }
        if name == "replay":
            row["is_retraining"] = checksum(reached) == checksum(reference)
        else:
            found = compute_correction(
                opened.log, opened.module, opened.batches, make_request(seen), HVPConfig(METHODS[name]["hessian_mode"])
            )
            row["at_the_end"] = relative_error(theta + found.v, theta, reference)
        latencies = [request["latency_seconds"] for request in requests]
        row |= {
            "optimizer": optimizer,
            "seed": seed,
            "applied": sum(request["status"] == "applied" for request in requests),
            "samples": len(seen),
            "replayed": sum("instead_of" in request for request in requests),
            "seconds": seconds,
            "lost_seconds": cost["lost_seconds"],
            "lost": cost["lost_seconds"] / seconds,
            "latency_median": statistics.median(latencies) if latencies else None,
            "latency_max": max(latencies, default=None),
        }
        rows.append(row)
    polls: dict[str, list[float]] = {"off": [], "on": []}
    for i in range(rounds):
        for name in polls:
            again = replace(
                config, online=OnlineConfig(enabled=name == "on"), log_dir=str(Path(folder) / f"poll-{name}-{i}")
            )
            polls[name].append(run(again, {})[0])
    return rows, polls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tofu_arguments(parser)
    parser.add_argument("--optimizers", nargs="*", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of the order of data and of what is asked for")
    parser.add_argument("--rounds", type=int, default=3, help="runs with and without polling; 0 leaves them out")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    rows, polling = [], {}
    for optimizer in options.optimizers:
        with tempfile.TemporaryDirectory() as folder:
            where = (folder, str(Path(options.data).resolve()), str(Path(options.model).resolve()))
            found, polls = on_ranks(RANKS, work, *where, optimizer, options.methods, options.seed, options.rounds)
        rows += found
        if options.rounds:
            polling[optimizer] = statistics.median(polls["on"]) / statistics.median(polls["off"])
    print(
        f"{REQUESTS} requests, {rows[0]['samples']} samples, {STEPS} steps of {BATCH} samples, ZeRO-3 on {RANKS} ranks\n"
    )
    print(
        f"{'':<8}{'method':<8}{'applied':>8}{'replayed':>9}{'rel_error':>11}{'at the end':>12}{'latency s':>11}{'largest':>9}{'lost':>8}"
    )
    for row in rows:
        line = f"{row['optimizer']:<8}{row['method']:<8}{row['applied']:>8}{row['replayed']:>9}{row['rel_error']:>11.4f}{row['at_the_end']:>12.4f}"
        print(f"{line}{row['latency_median']:>11.2f}{row['latency_max']:>9.2f}{row['lost']:>8.0%}")
    summary = {
        "methods_worse_than_at_the_end": sum(r["rel_error"] > r["at_the_end"] for r in rows),
        "replay_is_retraining": all(row.get("is_retraining", True) for row in rows),
    } | {f"polling_{name}": ratio for name, ratio in polling.items()}
    print()
    for name, value in summary.items():
        print(f"{name}: {value if isinstance(value, bool) else f'{value:.3g}'}")
    write_results(options.json, "online", rows, {name: float(value) for name, value in summary.items()})


if __name__ == "__main__":
    main()
