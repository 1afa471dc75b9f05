"""The replayed head: the first steps of a correction are taken as they are, not linearised (docs/method.md §5).

    dg_s = ∇L_s(θ_s + v_s; w'_s) − ∇L_s(θ_s; w_s)
    (v_{s+1}, dσ_{s+1}) = Φ_s(θ_s + v_s, σ_s + dσ_s, g_s + dg_s) − Φ_s(θ_s, σ_s, g_s)

In exact arithmetic this is exact replay, written as what changes. It takes one gradient a step, of the module on shards,
so that it runs on any number of ranks and without the engine that trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.counterfactual import EditedStep
from lmc_dist.unlearn.path import TrainingPath
from lmc_dist.unlearn.source import micro_batches, share
from lmc_dist.unlearn.windows import Window
from lmc_dist.update_rules import Deviation, Point

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

    def to_json(self) -> dict[str, Any]:
        """How far it is, without the trial's vectors. Local."""
        return {"is_on": self.is_on, "steps": self.steps, "age": self.age, "error": self.error}

    def take_up(self, known: Mapping[str, Any], trial: Window | None) -> None:
        """Goes on from where `to_json` was asked. Local."""
        self.is_on, self.steps, self.age, self.error = (known[key] for key in ("is_on", "steps", "age", "error"))
        self.trial = trial

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
        state = {key: vector.clone() for key, vector in joint.at.state.items()}
        at, skipped = Deviation(joint.at.v.clone(), state), list(joint.skipped)
        self.trial = Window("trial", joint.owner, joint.tz, joint.last_step, at, 0.0, joint.norm, skipped=skipped)
        self.age = 0


def gradient_change(
    path: TrainingPath, step: int, here: Point, edited: EditedStep, v: ShardedVector, b: ShardedVector | None
) -> ShardedVector:
    """∇L_s(θ_s + v; w'_s) − ∇L_s(θ_s; w_s) of a step that was taken and is not skipped. Collective.

    Args:
        path: Stands behind the step.
        step: The step.
        here: Where it was taken from.
        edited: The step as the counterfactual has it.
        v: Deviation of θ.
        b: The step's source.
    """
    changed = _gradient_at(path, edited, here.theta + v) - kept_gradient(path, step, here, edited, b)
    return changed if b is None else changed.add_(b)


def kept_gradient(
    path: TrainingPath, step: int, here: Point, edited: EditedStep, b: ShardedVector | None
) -> ShardedVector:
    """∇L_s(θ_s; w'_s) as the module here computes it: from the run's own where that was computed so as well. Collective."""
    if path.is_precise(step):
        assert here.gradient is not None
        return here.gradient if b is None else here.gradient + b
    return _gradient_at(path, edited, here.theta)


def _gradient_at(path: TrainingPath, edited: EditedStep, theta: ShardedVector) -> ShardedVector:
    assert path.module is not None and path.batches is not None
    path.cost += share(edited, "kept")
    return weighted_gradient(path.module, path.loss, theta, micro_batches(edited, path.batches, path.module, "kept"))
