"""What the benchmarks share: ranks on this machine, interleaved timing, live bytes, results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in tensors that were made or looked at inside the block and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # a DTensor's own is but its size
                _, known = self.storages.get(storage._cdata, (None, 0))
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.total += storage.nbytes() - known
        if self.total > self.peak:  # it still counts the dead, which only matters here
            self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.total)
        return result


def _rank(rank: int, world_size: int, port: int, work: Callable[..., Any], args: Sequence[Any], answers: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from lmc_dist.runtime import init

    init()
    torch.set_num_threads(1)
    answer = work(*args)
    if rank == 0:
        answers.put(answer)
        answers.close()
        answers.join_thread()  # the hard exit must not cut it off
    torch.distributed.barrier()
    os._exit(0)


def on_ranks(num_ranks: int, work: Callable[..., Any], *args: Any) -> Any:
    """Runs `work(*args)` in a fresh gloo group of one-threaded processes; returns rank 0's answer."""
    from lmc_dist.ports import free_port

    context = mp.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, port, work, args, answers)) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    while answers.empty():
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.kill()
            raise SystemExit("a rank failed")
        time.sleep(0.1)
    answer = answers.get()
    for process in processes:
        process.join()
    return answer


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, show: bool = True) -> dict[str, float]:
    """Median seconds of each call over rounds in which all take turns, after one round to warm up. Collective."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in tqdm(range(rounds + 1), desc="rounds", disable=not show):
        for name, call in calls.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def live_peak(call: Callable[[], Any]) -> int:
    """Peak live bytes of a call on this rank, what it reads included."""
    with LiveBytes() as live:
        call()
    return live.peak


def add_tofu_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--model`, by default those of the test data."""
    folder = Path(os.environ.get("LMC_TEST_DATA", REPO.parent / "shared" / "data"))
    parser.add_argument("--data", default=str(folder / "tofu"), help="folder with full.jsonl")
    parser.add_argument("--model", default=str(folder / "models" / "stories260K"), help="checkpoint folder")


def write_results(
    path: str | None, name: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, float], **more: Any
) -> None:
    """{name, machine, summary, rows, …} as JSON, where a path is given; `summary` is what bench/summary.py shows."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    text = json.dumps(
        {"name": name, "machine": machine, "summary": dict(summary), "rows": list(rows), **more}, indent=2
    )
    Path(path).write_text(text + "\n")
