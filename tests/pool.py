"""Real process groups for tests: ranks that stay alive for the whole session, so that a group is started once.

`Pool(world_size).run(function, *args)` calls an importable function on every rank of a gloo group and returns the
ranks' results. A failure on any rank fails the test with that rank's traceback; a hang ends the pool.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.multiprocessing as mp

CLOSING_SECONDS = 5.0


def _worker(rank: int, world_size: int, port: int, connection: Any, join: bool) -> None:
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in local.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    from lmc_dist.runtime import init

    torch.set_num_threads(1)
    if join:
        init(timeout_minutes=2)
    while (job := connection.recv()) is not None:
        function, args = job
        try:
            connection.send(("done", function(*args)))
        except BaseException:
            connection.send(("failed", traceback.format_exc()))
    os._exit(0)


class Pool:
    """`world_size` processes in one gloo group, or, without `join`, as a launcher starts them."""

    def __init__(self, world_size: int, join: bool = True) -> None:
        from lmc_dist.ports import free_port

        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, world_size, port, theirs, join), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        self.broken = False

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """Results of `function(*args)` by rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < len(self.pipes):
            for rank, pipe in enumerate(self.pipes):
                if rank in results or rank in failures:
                    continue
                try:
                    if not pipe.poll(0.01):
                        continue
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "failed", f"rank {rank} died"
                (results if kind == "done" else failures)[rank] = value
            if failures and time.monotonic() + 5 < deadline:
                deadline = time.monotonic() + 5  # the others either fail as well, or wait for ever
            if time.monotonic() > deadline:
                break
        if failures or len(results) < len(self.pipes):
            self.broken = len(results) + len(failures) < len(self.pipes)
            if self.broken:
                self.close()
            stuck = sorted(set(range(len(self.pipes))) - set(results) - set(failures))
            details = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
            raise AssertionError(f"failed on ranks {sorted(failures)}, no answer from {stuck}\n{details}")
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Ends the ranks: idle ones by themselves, so that `make coverage` learns what they did, others by force."""
        if not self.broken:
            for pipe in self.pipes:
                with suppress(OSError):  # it is gone already
                    pipe.send(None)
            for process in self.processes:
                process.join(CLOSING_SECONDS)
        for process in self.processes:
            process.kill()
        self.broken = True
