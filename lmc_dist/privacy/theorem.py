"""A bound from constants that the user vouches for, along the steps that were logged (docs/privacy.md derives it).

Plain SGD. With w_s = θ'_s − θ_s the true deviation of the retrained run and r_s = v_s − w_s the error of the recursion,

    w_{s+1} = w_s − η_s (b_s + H̄_s w_s)                       H̄_s: mean of ∇²L'_s on the segment from θ_s to θ_s + w_s
    r_{s+1} = (I − η_s C_s) r_s + η_s (H̄_s − C_s) w_s

so that with c_s = max(|1 − η_s m|, |1 − η_s L|), ‖C_s − ∇²L'_s(θ_s)‖ ≤ E and a Hessian of Lipschitz constant M

    ‖w_{s+1}‖ ≤ c_s ‖w_s‖ + η_s B                             B ≥ ‖b_s‖; only where step s holds forgotten samples
    ‖r_{s+1}‖ ≤ c_s ‖r_s‖ + η_s (E ‖w_s‖ + M ‖w_s‖²/2)

and at a step that is skipped w_{s+1} = w_s − u_s and r_{s+1} = r_s exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lmc_dist.config import PrivacyConfig, UnlearnConfig
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step

if TYPE_CHECKING:
    from lmc_dist.trajectory.record import Trajectory

NAMES = ("smoothness", "convexity", "lipschitz", "curvature_error", "source")


@dataclass(frozen=True)
class Constants:
    """What is assumed of the loss of every step without the forgotten data, wherever the two runs pass.

    Attributes:
        smoothness: L: no eigenvalue of ∇²L'_s, nor of the curvature C_s + λI that is used, is above it.
        convexity: m ≤ L: none is below it; may be negative.
        lipschitz: M: ‖∇²L'_s(x) − ∇²L'_s(y)‖ ≤ M ‖x − y‖.
        curvature_error: E: ‖C_s + λI − ∇²L'_s(θ_s)‖ in the 2-norm; 0 for the exact Hessian without damping.
        source: B: ‖b_s‖ of every step that holds forgotten samples.
    """

    smoothness: float
    convexity: float
    lipschitz: float
    curvature_error: float
    source: float

    def __post_init__(self) -> None:
        if not self.convexity <= self.smoothness < math.inf or not self.convexity > -math.inf:
            raise LmcError(
                f"privacy.convexity ≤ privacy.smoothness are needed, got {self.convexity} and {self.smoothness}"
            )
        for name in ("lipschitz", "curvature_error", "source"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LmcError(f"privacy.{name} must be a number ≥ 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Passage:
    """One applied step as the theorem sees it.

    Attributes:
        lr: η_s.
        kind: `plain`, `source` (it holds forgotten samples) or `skipped` (the retrained run does not take it).
        update: ‖u_s‖, for skipped steps.
    """

    lr: float
    kind: Literal["plain", "source", "skipped"]
    update: float = 0.0


def constants_of(settings: PrivacyConfig) -> Constants | None:
    """The constants of the settings; None where none is given. Local.

    Raises:
        LmcError: Some are given and not all, or out of bounds.
    """
    given = {name: getattr(settings, name) for name in NAMES}
    if all(value is None for value in given.values()):
        return None
    if missing := [f"privacy.{name}" for name, value in given.items() if value is None]:
        raise LmcError(
            f"the bound from constants needs {', '.join(missing)} too; or give the bound itself, privacy.bound"
        )
    return Constants(**given)


def recursion_bound(passages: Iterable[Passage], constants: Constants) -> tuple[float, float]:
    """(bound on ‖v_τ − w_τ‖, bound on ‖w_τ‖), in exact arithmetic. Local.

    Raises:
        LmcError: It is not finite.
    """
    deviation = residual = 0.0
    for step in passages:
        if step.kind == "skipped":
            deviation += step.update
            continue
        factor = max(abs(1 - step.lr * constants.convexity), abs(1 - step.lr * constants.smoothness))
        change = constants.curvature_error * deviation + constants.lipschitz * deviation * deviation / 2
        residual = factor * residual + step.lr * change
        deviation = factor * deviation + (step.lr * constants.source if step.kind == "source" else 0.0)
    if not math.isfinite(residual):
        raise LmcError("the bound from the constants given is infinite: the steps expand too much (η·L > 2, or m < 0)")
    return residual, deviation


def passages_of(log: Trajectory, request: Counterfactual, batches: BatchSource) -> list[Passage]:
    """The applied steps from the first that holds forgotten data on. Local."""
    found: list[Passage] = []
    for record in log.records():
        if not record.applied or not (found or request.touches(record)):
            continue
        if request.touches(record):
            edited = edit_step(record, request, log.manifest.loss_normalization, batches.num_targets)
            assert record.u_norm is not None  # `check_theorem`
            found.append(Passage(record.lr[0], "skipped" if edited.skipped else "source", record.u_norm))
        else:
            found.append(Passage(record.lr[0], "plain"))
    return found


def check_theorem(log: Trajectory, unlearn: UnlearnConfig) -> None:
    """Checks that the theorem is one on the log's steps and on the method. Local.

    Raises:
        LmcError: Another optimizer than plain SGD with one learning rate, clipped steps, or a method that does not
            propagate to the end.
    """
    optimizer, why = log.manifest.optimizer, ""
    records = [record for record in log.records() if record.applied]
    if optimizer["class"] != "SGD":
        why = f"the log is one of {optimizer['class']}"
    elif any(group.get(key) for group in optimizer["groups"] for key in ("momentum", "weight_decay", "maximize")):
        why = "the log's SGD has momentum or weight decay"
    elif any(len(set(record.lr)) != 1 for record in records):
        why = "the log's parameters have several learning rates"
    elif any(record.clip_coef < 1 for record in records):
        why = "steps of the log were clipped"
    elif (unlearn.K, unlearn.replay_head, unlearn.tol) != (None, 0, None) or unlearn.hessian_mode == "secant":
        why = "unlearn.K, replay_head, tol or hessian_mode secant is set"
    elif any(record.u_norm is None for record in records):
        why = "the log does not say how long its steps were"
    if why:
        raise LmcError(
            f"the bound from constants is one for plain SGD and a correction that is propagated to the end, and {why}: "
            "give the bound itself (privacy.bound), or use privacy.basis controls"
        )
