"""A thread that writes while training computes: jobs in order, a bounded queue, and no error that goes unseen."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs one after the other on its own thread.

    Args:
        limit_bytes: Memory that waiting jobs may hold. A job that does not fit waits for room in `submit`, which slows
            training down to the speed of the disk; one that is larger than the limit alone is let in alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.error: Exception | None = None
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lmc log writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], num_bytes: int = 0) -> None:
        """Queues a job that keeps `num_bytes` of memory alive until it is done. Blocks while the queue is full.

        After an error nothing more is written: the caller sees `error` at its next step.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.error is not None or not self._held or self._held + num_bytes <= self.limit_bytes
            )
            if self.error is None:
                self._jobs.append((job, num_bytes))
                self._held += num_bytes
                self._changed.notify_all()

    @property
    def more_waits(self) -> bool:
        """Whether a job that keeps memory alive waits behind the one that runs; for that one to ask."""
        with self._changed:
            return len(self._jobs) > 1 and self._held > self._jobs[0][1]

    def drain(self) -> None:
        """Waits until all jobs are done, or one has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or not self._jobs)

    def close(self) -> None:
        """Ends the thread after the job it is at; what still waits is dropped (`drain` first to keep it)."""
        with self._changed:
            self._closed = True
            self._jobs = deque(list(self._jobs)[:1])
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job, num_bytes = self._jobs[0]  # it leaves the queue when it is done, so that `drain` waits for it
            try:
                job()
            except Exception as error:
                with self._changed:
                    self.error = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                if self._jobs:
                    self._jobs.popleft()
                self._held -= num_bytes
                self._changed.notify_all()
            del job  # its vectors are free before the next job is waited for
