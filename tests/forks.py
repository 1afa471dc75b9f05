"""Ranks by fork: a process that has imported everything gives birth to whole groups of ranks, which may be killed.

Importing torch, DeepSpeed and transformers takes seconds, forking takes milliseconds. Ranks are forked before there is
any thread or process group, so each group is as real as one that a launcher starts; it can die at any moment without
harm to others.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from lmc_dist.sweeps.children import import_all

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what `initialize` imports: torch's compiler, most of all
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.optimization",
    "lmc_dist.training",
)


def _rank(rank: int, world_size: int, port: int, folder: str, job: tuple[Callable[..., Any], Any, Any]) -> None:
    """A rank from its birth to its end: 0, 2 after an LmcError, 1 after another one."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in local.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(f"{folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from lmc_dist.runtime import init, run

    function, args, before = job

    def main() -> None:
        if before is not None:
            before(rank)
        init(timeout_minutes=1)
        function(*args)

    run(main)


def _serve(connection: Any) -> None:
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    import_all(PRELOADED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, tuple[int, int]] = {}  # pid → (group, rank)
    statuses: dict[int, dict[int, int]] = {}
    connection.send(len(os.listdir("/proc/self/task")))
    while True:
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            group, rank = children.pop(pid)
            statuses[group][rank] = os.waitstatus_to_exitcode(status)
        if not connection.poll(0.005):
            continue
        try:
            message = connection.recv()
        except EOFError:
            message = None
        if message is None:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        kind, group, *rest = message
        if kind == "start":
            world_size, port, folder, job = rest
            pids = []
            statuses[group] = {}
            for rank in range(world_size):
                if not (pid := os.fork()):
                    try:
                        _rank(rank, world_size, port, folder, job)
                    except BaseException:
                        traceback.print_exc()
                        os._exit(1)
                children[pid] = (group, rank)
                pids.append(pid)
            connection.send(pids)
        else:
            connection.send(dict(statuses[group]))


class Group:
    """Ranks that run one function."""

    def __init__(self, forks: Forks, number: int, pids: list[int], folder: Path) -> None:
        self.forks, self.number, self.pids, self.folder = forks, number, pids, folder

    def statuses(self) -> dict[int, int]:
        """Exit status of the ranks that have ended; below 0 the signal that ended them."""
        return self.forks.ask("ask", self.number)

    def kill(self, ranks: Any) -> None:
        for rank in ranks:
            if rank not in self.statuses():
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, seconds: float = 60) -> list[int]:
        """The statuses of all ranks in order; ends those that hang, which fails."""
        deadline = time.monotonic() + seconds
        while len(found := self.statuses()) < len(self.pids):
            if time.monotonic() > deadline:
                self.kill(range(len(self.pids)))
                raise AssertionError(f"ranks {sorted(set(range(len(self.pids))) - set(found))} hang\n{self.output()}")
            time.sleep(0.005)
        return [found[rank] for rank in range(len(self.pids))]

    def output(self) -> str:
        """What all ranks have printed."""
        return "\n".join(f"rank {i}: {p.read_text()}" for i, p in enumerate(sorted(self.folder.glob("rank-*.txt"))))


class Forks:
    """The process that forks ranks."""

    def __init__(self) -> None:
        self._connection, theirs = mp.get_context("spawn").Pipe()
        self._process = mp.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
        with pytest.MonkeyPatch.context() as patch:  # it imports numpy, whose OpenBLAS starts threads at once
            patch.setenv("OMP_NUM_THREADS", "1")
            self._process.start()
        self.threads = self._connection.recv()
        self._count = 0

    def ask(self, *message: Any) -> Any:
        self._connection.send(message)
        return self._connection.recv()

    def start(
        self, folder: Path, world_size: int, function: Callable[..., Any], *args: Any, before: Any = None
    ) -> Group:
        """Ranks that call `function(*args)` once they are a group; `before(rank)` is called first on each."""
        from lmc_dist.ports import free_port

        folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        job = (function, args, before)
        pids = self.ask("start", self._count, world_size, free_port(), str(folder), job)
        return Group(self, self._count, pids, folder)

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(10)
