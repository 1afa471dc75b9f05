"""Reading ahead: a thread fetches the next steps' vectors while the caller computes with the present one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lmc_dist.errors import LmcError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Results of `read(step)` for steps that are asked for in order.

    Args:
        read: Fetches one step; runs on the thread, so it must not enter a collective.
        steps: The steps to fetch.
        depth: Results that may be there or under way before they are asked for, which bounds the memory.
    """

    def __init__(self, read: Callable[[int], T], steps: Sequence[int], depth: int = 2) -> None:
        self._read, self._steps, self._depth = read, steps, depth
        self._found: dict[int, T] = {}
        self._errors: dict[int, Exception] = {}
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lmc log reader", daemon=True)
        self._thread.start()

    def __contains__(self, step: int) -> bool:
        """Whether the next step to be taken is this one."""
        return not self._closed and self._taken < len(self._steps) and self._steps[self._taken] == step

    def take(self, step: int) -> T:
        """The result of the next step, waited for. Its error is raised here, where the caller can agree on it.

        Raises:
            LmcError: Another step than the next one, or what `read` raised.
        """
        if step not in self:
            raise LmcError(f"step {step} is not the next one that is read ahead")
        with self._changed:
            self._changed.wait_for(lambda: step in self._found or step in self._errors)
            self._taken += 1
            self._changed.notify_all()
            if step in self._errors:
                self._taken = len(self._steps)  # the thread has ended
                raise self._errors[step]
            return self._found.pop(step)

    def close(self) -> None:
        """Ends the thread after the step it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._found.clear()

    def _run(self) -> None:
        for place, step in enumerate(self._steps):
            with self._changed:
                self._changed.wait_for(lambda place=place: self._closed or place < self._taken + self._depth)  # type: ignore[misc]
                if self._closed:
                    return
            try:
                result = self._read(step)
            except Exception as error:
                with self._changed:
                    self._errors[step] = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._found[step] = result
                self._changed.notify_all()
            del result
