"""What the trajectory log costs training: step times with and without it, interleaved in one run.

    .venv/bin/python bench/training_log.py

DeepSpeed ZeRO-3 on two gloo ranks trains a Llama-shaped model of about 5 M parameters with AdamW on batches of 8
sequences of 128 tokens. Every case has an engine of its own, with the same weights and the same batches; the engines
take turns of a few steps. The first step of a turn is not counted: no writing of an earlier step runs beside it. At the
end of a turn the writer thread is waited for (`drain`), so that no case pays for another's writing.

`ratio` is the median step over the median step without a log, with the cost of snapshots spread over their interval;
`steps` is the same without snapshots, `mean` of means instead of medians, `CPU` of the processor time of all ranks and
threads, which tells less of the load of the machine. A snapshot's cost is what a turn takes longer that has one after
its first step, waiting for the disk included. All weights are compared at the end: logging must not change training.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import on_ranks, write_results
from tqdm import tqdm

SEQUENCES, LENGTH, VOCAB, RANKS = 8, 128, 4096, 2
TURN = 6  # steps
INTERVAL = 100  # steps between snapshots, over which their cost is spread
RUN = 1000  # steps of the run whose size is extrapolated
OFF, SNAPSHOTS = "no log", "replay, a snapshot a turn"
CASES: dict[str, dict[str, Any] | None] = {
    OFF: None,
    "replay": {"mode": "replay"},
    "update": {"mode": "update"},
    "update, bfloat16": {"mode": "update", "update_dtype": "bfloat16"},
    "update, zstd": {"mode": "update", "compression": "zstd"},
    "gradient": {"mode": "gradient"},
    "full": {"mode": "full"},
    SNAPSHOTS: {"mode": "replay", "save_interval": TURN},
}
TARGETS = {"replay": 1.02, "update": 1.10}


class Case:
    """One engine, with a logger of its own unless `settings` is None. Every rank constructs it."""

    def __init__(self, folder: Path, settings: dict[str, Any] | None) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from lmc_dist.config import TrainConfig
        from lmc_dist.training import build_engine
        from lmc_dist.trajectory.logger import TrainingLogger

        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=4, max_position_embeddings=LENGTH, **sizes)
        config.tie_word_embeddings, config.use_cache = True, False
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        train = TrainConfig(
            optimizer="adamw", learning_rate=1e-4, batch_size=SEQUENCES, micro_batch_size=SEQUENCES // RANKS
        )
        self.engine = build_engine(model, train, dist.get_world_size())
        self.engine.train()
        self.folder, self.logger, self.step = folder, None, 0
        if settings is not None:
            self.logger = TrainingLogger(folder, **({"save_interval": None} | settings))
            self.logger.attach(self.engine)

    def train_step(self) -> float:
        """One optimizer step; its seconds."""
        rank, share = dist.get_rank(), SEQUENCES // RANKS
        ids = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(self.step))
        mine = ids[rank * share : (rank + 1) * share]
        inputs = {"input_ids": mine, "labels": mine}
        if self.logger is not None:
            inputs["index"] = torch.arange(share) + (self.step * RANKS + rank) * share
        dist.barrier()
        started = time.perf_counter()
        self.engine.set_gradient_accumulation_boundary(True)
        items = torch.tensor(float(SEQUENCES * (LENGTH - 1)))
        loss = self.engine(**inputs, num_items_in_batch=items).loss
        self.engine.backward(loss * RANKS, scale_wrt_gas=False)  # DeepSpeed averages over ranks, the loss is a sum
        self.engine.step()
        self.step += 1
        return time.perf_counter() - started

    def turn(self, num_steps: int) -> tuple[list[float], float, float]:
        """(seconds of each step, seconds until all of them are on disk, processor seconds of a step on all ranks)."""
        used = time.process_time()
        seconds = [self.train_step() for _ in range(num_steps)]
        started = time.perf_counter()
        if self.logger is not None:
            self.logger._attached.writer.finish()
        waited = time.perf_counter() - started
        processor = torch.tensor((time.process_time() - used) / num_steps)
        dist.all_reduce(processor)
        return seconds, waited, float(processor)

    def sizes(self) -> dict[str, float]:
        """Bytes on disk of a step (tensors and row) and of a snapshot, over all ranks."""
        count = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())  # noqa: E731
        snapshots = sorted((self.folder / "snapshots").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
        rows = (self.folder / "steps.sqlite").stat().st_size
        return {
            "step_bytes": (count(self.folder / "steps") + rows) / self.step,
            "first_snapshot_bytes": count(snapshots[0]),
            "snapshot_bytes": count(snapshots[-1]),
        }


def work(folder: str, turns: int, chosen: list[str]) -> list[dict[str, Any]]:
    """One rank's part; the rows of all cases on every rank."""
    from lmc_dist.shards.checksum import checksum
    from lmc_dist.shards.engines import engine_shards

    cases = {
        name: Case(Path(folder) / str(i), settings)
        for i, (name, settings) in enumerate(CASES.items())
        if name in chosen
    }
    steps: dict[str, list[float]] = {name: [] for name in cases}
    whole: dict[str, list[float]] = {name: [] for name in cases}
    drains: dict[str, list[float]] = {name: [] for name in cases}
    processors: dict[str, list[float]] = {name: [] for name in cases}
    for i in tqdm(range(turns + 1), desc="turns", disable=dist.get_rank() != 0):
        for name, case in cases.items():
            # The first turn warms up, and is short: snapshots then fall after the first step of a turn.
            seconds, drain, processor = case.turn(TURN if i else TURN - 1)
            if i:
                steps[name] += seconds[1:]
                whole[name].append(sum(seconds) + drain)
                drains[name].append(drain)
                processors[name].append(processor)
    sums = {name: checksum(engine_shards(case.engine).read()) for name, case in cases.items()}
    numel = engine_shards(cases[OFF].engine).layout.total_numel
    snapshot = statistics.median(whole[SNAPSHOTS]) - statistics.median(whole["replay"]) if SNAPSHOTS in cases else 0.0
    base = statistics.median(steps[OFF])
    rows = []
    for name, case in cases.items():
        seconds = statistics.median(steps[name])
        row = {
            "case": name,
            "steps_ratio": seconds / base,
            "mean_ratio": statistics.mean(steps[name]) / statistics.mean(steps[OFF]),
            "processor_ratio": statistics.median(processors[name]) / statistics.median(processors[OFF]),
            "processor_seconds": statistics.median(processors[name]),
            "ratio_to": OFF,
            "step_seconds": seconds,
            "drain_seconds": statistics.median(drains[name]),
            "target": TARGETS.get(name),
            "steps": case.step,
            "parameters": numel,
            "world_size": dist.get_world_size(),
            "same_weights": sums[name] == sums[OFF],
        }
        if case.logger is not None:
            case.logger.close()
            row |= case.sizes()
        spread = 0.0 if name == OFF else snapshot / (TURN if name == SNAPSHOTS else INTERVAL)
        row["ratio"] = (seconds + spread) / base
        row["snapshot_seconds"] = None if name == OFF else snapshot
        rows.append(row)
    return rows


def run_bytes(row: dict[str, Any], num_steps: int) -> float:
    """Size of a log of so many steps, from the measured sizes of a step and of snapshots; θ_0 has no optimizer state."""
    return row["first_snapshot_bytes"] + num_steps * row["step_bytes"] + num_steps // INTERVAL * row["snapshot_bytes"]


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['world_size']} ranks, {first['parameters']:,} parameters, {first['step_seconds']:.3f} s a step")
    print(
        f"{'case':<28}{'ratio':>8}{'target':>8}{'steps':>8}{'mean':>8}{'CPU':>8}{'drain s':>9}{'B/step/p':>10}{'B/p in run':>12}{'same':>6}"
    )
    for row in rows:
        target = f"{row['target']:g}" if row["target"] else ""
        sizes = f"{'':>10}{'':>12}"
        if "step_bytes" in row and row["case"] != SNAPSHOTS:
            sizes = f"{row['step_bytes'] / row['parameters']:>10.4f}{row['run_bytes'] / row['parameters']:>12.1f}"
        print(
            f"{row['case']:<28}{row['ratio']:>8.3f}{target:>8}{row['steps_ratio']:>8.3f}{row['mean_ratio']:>8.3f}"
            f"{row['processor_ratio']:>8.3f}"
            f"{row['drain_seconds']:>9.3f}{sizes}{'yes' if row['same_weights'] else 'NO':>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help=f"of {TURN} steps, for each case")
    parser.add_argument("--cases", nargs="*", default=list(CASES)[1:], choices=list(CASES)[1:])
    parser.add_argument("--folder", help="where the logs are written; default: a temporary folder")
    parser.add_argument("--json")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="lmc-bench-", dir=options.folder)
    try:
        rows = on_ranks(RANKS, work, folder, options.turns, [OFF, *options.cases])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        if "step_bytes" in row:
            row["run_bytes"] = run_bytes(row, RUN)
    show(rows)
    by_case = {row["case"]: row for row in rows}
    more: dict[str, Any] = {}
    if {"replay", "full", SNAPSHOTS} <= set(by_case):
        sizes = {n: run_bytes(by_case["full"], n) / run_bytes(by_case["replay"], n) for n in (INTERVAL, RUN)}
        more = {"full_over_replay_bytes": sizes[RUN], "full_over_replay_bytes_short": sizes[INTERVAL]}
        print(
            f"\na snapshot takes {by_case['replay']['snapshot_seconds']:.3f} s, one every {INTERVAL} steps is in `ratio`; "
            f"extrapolated from these sizes, `full` is {sizes[INTERVAL]:.0f} times as large as `replay` after {INTERVAL} "
            f"steps and {sizes[RUN]:.0f} times after {RUN}"
        )
    last = "update" if "update" in by_case else rows[-1]["case"]
    summary = {f"{last.replace(' ', '_')}_over_no_log": by_case[last]["ratio"]}
    for name, value in summary.items():
        print(f"{name}: {value:.3f}")
    write_results(options.json, "training_log", rows, summary, **more)


if __name__ == "__main__":
    main()
