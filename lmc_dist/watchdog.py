"""Which rank died: every rank gives a sign of life, its neighbour looks for it, and a job that lost a rank ends with its name.

A rank that is killed leaves the others waiting in a collective, for as long as the group's timeout, or with a message
about a connection and no rank. Each rank therefore counts up in the job's store, from a thread of its own, and watches the
rank before it; the thread also runs while the main one waits.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

PATIENCE = "LMC_WATCHDOG_SECONDS"  # without a sign of life, before a rank counts as dead; 0 turns the watchdog off
DEFAULT_PATIENCE = 40.0
INTERVAL = 1.0  # seconds between signs of life
_LEFT = "left"  # in place of a count: ended by itself


class Watchdog:
    """This rank's sign of life and its watch over the rank before it.

    Args:
        rank: This rank.
        world_size: All of them.
        store: The job's store, by a connection of its own.
        patience: Seconds without a sign of life before a rank counts as dead.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, patience: float) -> None:
        self.rank, self.world_size, self.store, self.patience = rank, world_size, store, patience
        self._lock, self._done = threading.Lock(), threading.Event()
        self.store.set(f"who-{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        self._beat(0)
        self._thread = threading.Thread(target=self._watch, name="lmc-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch. After all ranks have given their first sign."""
        self._thread.start()

    def _beat(self, count: int) -> None:
        self.store.set(f"life-{self.rank}", str(count))

    def _look(self, rank: int) -> str:
        return self.store.get(f"life-{rank}").decode()

    def _watch(self) -> None:
        before, seen, since, count = (self.rank - 1) % self.world_size, "", time.monotonic(), 0
        while not self._done.wait(INTERVAL):
            count += 1
            try:
                with self._lock:
                    if self._done.is_set():
                        return
                    self._beat(count)
                    found = self._look(before)
            except Exception as error:  # the store went with the process that held it
                self._end(f"the job's store is gone, and with it the process that started the group ({error})")
                return
            if found != seen:
                seen, since = found, time.monotonic()
            elif found != _LEFT and time.monotonic() - since > self.patience:
                self._end(
                    f"{self._name(before)} gave no sign of life for {self.patience:.0f} s: it died or was stopped"
                )
                return

    def _name(self, rank: int) -> str:
        return self.store.get(f"who-{rank}").decode()

    def _end(self, why: str) -> None:
        """Ends this process: its main thread waits for a rank that is not there."""
        if self._done.is_set():
            return
        sys.stderr.write(f"error: {why}. Rank {self.rank} ends as well\n")
        sys.stderr.flush()
        os._exit(1)

    def leave(self) -> None:
        """Says that this rank ends by itself. Local."""
        with self._lock:
            self._done.set()
            try:
                self.store.set(f"life-{self.rank}", _LEFT)
            except Exception:  # the process that held it has left already
                return

    def dead(self) -> list[str]:
        """Ranks that give no sign of life for some seconds and have not ended by themselves. Local; takes as long."""
        with self._lock:
            ranks = [rank for rank in range(self.world_size) if rank != self.rank]
            first = [self._look(rank) for rank in ranks]
        time.sleep(3 * INTERVAL)
        with self._lock:
            second = [self._look(rank) for rank in ranks]
            still = [rank for rank, a, b in zip(ranks, first, second, strict=True) if a == b != _LEFT]
            return [self._name(rank) for rank in still]


_running: list[Watchdog] = []


def start(rank: int, world_size: int) -> None:
    """Starts this rank's watchdog over the job's store (MASTER_ADDR, MASTER_PORT). Collective; once a process."""
    patience = float(os.environ.get(PATIENCE, DEFAULT_PATIENCE))
    if world_size == 1 or patience <= 0 or _running:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, timedelta(seconds=20), wait_for_workers=False)
    found = Watchdog(
        rank,
        world_size,
        dist.PrefixStore(f"lmc-life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
        patience,
    )
    dist.barrier()
    found.start()
    _running.append(found)


def explain() -> None:
    """After an error in a collective: says which ranks died, if any did. Local."""
    for found in _running:
        try:
            names = found.dead()
        except Exception:
            names = []
        if names:
            sys.stderr.write(f"error: {', '.join(names)} died; rank {found.rank} ends as well\n")


def leave() -> None:
    """This rank ends by itself. Local."""
    while _running:
        _running.pop().leave()
