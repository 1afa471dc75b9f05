"""Cost of curvature products over one plain gradient: interleaved medians of one run.

    .venv/bin/python bench/hvp.py                 one process
    .venv/bin/python bench/hvp.py --num_ranks 2   two gloo ranks

A Llama-shaped model of about 5 M parameters, 8 sequences of 128 tokens. The plain gradient is an ordinary forward and
backward of the unsharded module with fused attention, or, at several ranks, the sharded blocked gradient. A product of
m vectors is reported per vector. `gathered/p` and `reduced/p` are what the collectives move, in whole models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from lmc_dist.ports import free_port

SEQUENCES, LENGTH, VOCAB = 8, 128, 4096
COUNTS = (2, 4, 8)


def build(rank: int, world_size: int) -> dict[str, Any]:
    """Sharded modules, θ, vectors and this rank's batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmc_dist.curvature import MicroBatch
    from lmc_dist.shards.layout import ShardLayout
    from lmc_dist.shards.module import ShardedModule, build_skeleton
    from lmc_dist.shards.vector import ShardedVector

    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=4, max_position_embeddings=LENGTH, **sizes)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    skeleton = build_skeleton(config)
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.from_full(layout, model.get_parameter)
    ids = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = torch.full((SEQUENCES,), 1.0 / (SEQUENCES * (LENGTH - 1)))
    mine = slice(rank * SEQUENCES // world_size, (rank + 1) * SEQUENCES // world_size)
    micro = MicroBatch({"input_ids": ids[mine]}, ids[mine], weights[mine])
    vectors = [theta.like(torch.randn_like(theta.flat) * (theta.flat != 0)) for _ in range(max(COUNTS))]
    modules = {blocked: ShardedModule(skeleton, layout, blocked=blocked) for blocked in (True, False)}
    return {"model": model, "modules": modules, "theta": theta, "micro": micro, "vectors": vectors, "ids": ids}


def cases(setup: dict[str, Any], world_size: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """name → (call, vectors it multiplies); the first is what all others are compared with."""
    from lmc_dist.curvature import HVPConfig, TokenCrossEntropy, hvp_apply
    from lmc_dist.curvature.products import weighted_gradient

    theta, micro, vectors, loss = setup["theta"], setup["micro"], setup["vectors"], TokenCrossEntropy()
    modules, model = setup["modules"], setup["model"]
    parameters = list(model.parameters())

    def product(mode: str, m: int, blocked: bool = True, **options: Any) -> Callable[[], Any]:
        config = HVPConfig(mode, **options)
        return lambda: hvp_apply(vectors[:m], config, modules[blocked], loss, theta, [micro])

    def plain() -> None:
        out = model(input_ids=micro.inputs["input_ids"], labels=micro.targets, use_cache=False)
        torch.autograd.grad(out.loss, parameters)

    blocked_gradient = lambda: weighted_gradient(modules[True], loss, theta, [micro])  # noqa: E731
    gradient = blocked_gradient()
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    if world_size == 1:
        found["gradient, plain"] = (plain, 1)
        found["gradient, unblocked"] = (lambda: weighted_gradient(modules[False], loss, theta, [micro]), 1)
    found["gradient, blocks recomputed"] = (blocked_gradient, 1)
    found["GGN, unblocked"] = (product("GGN", 1, blocked=False, keep_activations=True), 1)
    found["GGN, blocks kept"] = (product("GGN", 1, keep_activations=True), 1)
    found["GGN, blocks recomputed"] = (product("GGN", 1), 1)
    for m in COUNTS:
        found[f"GGN, blocks kept, m={m}"] = (product("GGN", m, keep_activations=True), m)
        found[f"GGN, blocks recomputed, m={m}"] = (product("GGN", m), m)
    found["exact"] = (product("exact", 1), 1)
    found["fd, blocks kept"] = (product("fd", 1, keep_activations=True), 1)
    found["fd, blocks recomputed"] = (product("fd", 1), 1)
    found["fisher"] = (lambda: hvp_apply(vectors[0], HVPConfig("fisher"), gradient=gradient), 1)
    return found


def measure(rank: int, world_size: int, port: int, rounds: int, results: Any) -> None:
    """One rank's part; rank 0 sends the rows."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
    from lmc_dist.runtime import init
    from lmc_dist.shards.gather import count_traffic

    init()
    torch.set_num_threads(1)
    setup = build(rank, world_size)
    timed = cases(setup, world_size)
    traffic, seconds = {}, {name: [] for name in timed}  # type: ignore[var-annotated]
    for name, (call, _) in timed.items():  # also warms up
        with count_traffic() as counter:
            call()
        traffic[name] = (counter.gathered, counter.reduced)
    for _ in tqdm(range(rounds), desc="rounds", disable=rank != 0):
        for name, (call, _) in timed.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    if rank == 0:
        numel = setup["theta"].layout.total_numel
        first = next(iter(timed))
        base = statistics.median(seconds[first])
        results.put(
            [
                {
                    "case": name,
                    "vectors": m,
                    "ratio": statistics.median(seconds[name]) / base / m,
                    "ratio_to": first,
                    "seconds": statistics.median(seconds[name]),
                    "gathered_over_p": traffic[name][0] / numel,
                    "reduced_over_p": traffic[name][1] / numel,
                    "parameters": numel,
                    "world_size": world_size,
                }
                for name, (_, m) in timed.items()
            ]
        )
        time.sleep(1)  # let the queue's thread send before the hard exit
    torch.distributed.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ranks", type=int, default=1, help="gloo processes, one thread each")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median is reported")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=measure, args=(rank, options.num_ranks, port, options.rounds, results))
        for rank in range(options.num_ranks)
    ]
    for process in processes:
        process.start()
    rows = results.get()
    for process in processes:
        process.join()
    print(f"{'product':<34}{'x gradient, per vector':>24}{'seconds':>10}{'gathered/p':>12}{'reduced/p':>11}")
    for row in rows:
        print(
            f"{row['case']:<34}{row['ratio']:>24.3f}{row['seconds']:>10.3f}{row['gathered_over_p']:>12.2f}"
            f"{row['reduced_over_p']:>11.2f}"
        )
    kept = next(row["ratio"] for row in rows if row["case"] == "GGN, blocks kept")
    print(f"ggn_over_gradient: {kept:.3f}")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        Path(options.json).write_text(json.dumps({"name": "hvp", "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
