"""The replayed head: the first steps of a correction are taken as they are, not linearised (docs/method.md §5).

    dg_s = ∇L_s(θ_s + v_s; w'_s) − ∇L_s(θ_s; w_s)
    (v_{s+1}, dσ_{s+1}) = Φ_s(θ_s + v_s, σ_s + dσ_s, g_s + dg_s) − Φ_s(θ_s, σ_s, g_s)

In exact arithmetic this is exact replay, written as what changes. It takes one gradient a step, of the module on shards,
so that it runs on any number of ranks and without the engine that trained.
"""

from __future__ import annotations

from typing import Literal

from lmc_dist.errors import LmcError
from lmc_dist.unlearn.windows import Window
from lmc_dist.update_rules import Deviation

Length = int | Literal["auto"]

# `auto` watches the recursion over this many steps before it trusts it.
TRIAL_STEPS = 5


def check_head(length: Length, tolerance: float) -> None:
    """Local.

    Raises:
        LmcError: No number of steps, or a tolerance that is none.
    """
    if length != "auto" and not (isinstance(length, int) and not isinstance(length, bool) and length >= 0):
        raise LmcError(f"replay_head must be a number of steps ≥ 0, 'auto' or 'all', got {length!r}")
    if not 0 < tolerance < 1:
        raise LmcError(f"head_tolerance must be between 0 and 1, got {tolerance}")


class Head:
    """How many steps are replayed, and when the recursion takes over.

    With `auto` the recursion runs beside the replay, from where it was last set right; it takes over once the two have
    stayed together for `TRIAL_STEPS` steps.

    Args:
        length: Steps from the first that holds forgotten data on, or `auto`.
        tolerance: `auto`: largest ‖difference of v‖ / ‖v‖ at which they count as together.

    Attributes:
        is_on: Whether the next step is to be replayed.
        steps: Steps replayed so far.
        trial: `auto`: the recursion.
        error: `auto`: how far the two were apart after the last step.
    """

    def __init__(self, length: Length, tolerance: float) -> None:
        check_head(length, tolerance)
        self.length, self.tolerance = length, tolerance
        self.is_on = length != 0
        self.steps, self.age = 0, 0
        self.trial: Window | None = None
        self.error: float | None = None

    def advance(self, joint: Window) -> None:
        """Counts a step that both have taken. Collective with `auto`."""
        self.steps += 1
        if self.length != "auto":
            self.is_on = self.steps < self.length
            return
        if self.trial is not None and joint.norm > 0:
            self.age += 1
            self.error = (self.trial.at.v - joint.at.v).norm() / joint.norm
            if self.error <= self.tolerance:
                self.is_on = self.age < TRIAL_STEPS
                return
        vectors = {key: vector.clone() for key, vector in joint.at.state.items()}
        self.trial = Window(
            "trial", joint.tz, joint.last_step, Deviation(joint.at.v.clone(), vectors), 0.0, joint.norm, joint.behind
        )
        self.age = 0
