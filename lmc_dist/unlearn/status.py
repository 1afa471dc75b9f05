"""How far a correction is: what progress is told after each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """How far a group of ranks is.

    Attributes:
        step: Step that is done.
        done: Units of all groups that are through, as of when one of this group last was.
        active: Vectors that this group carries.
        left: Units that are not through.
        v_min: Smallest ‖v‖ of these vectors, of those that have just come to their end too.
        v_max: Largest.
        growth: Largest mean growth of ‖v‖ a step, over the last steps of each; None where it is not watched.
    """

    step: int
    done: int
    active: int
    left: int
    v_min: float
    v_max: float
    growth: float | None = None


Progress = Callable[[Status], None]


def unwatched(status: Status) -> None:
    """Progress that nobody looks at."""
