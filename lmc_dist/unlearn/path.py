"""The path that training took, step by step: θ_s from the log, σ_s rebuilt by the update rule, g_s logged or computed.

Plain SGD has no state and needs no gradient unless it is clipped, and then its own update tells it. Every other optimizer
is followed from the snapshot before the first step of interest, one gradient a step. Each step of the rule is compared
with the logged one, so that a tangent is never taken of an update that did not happen.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from lmc_dist.curvature import Loss
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.precision import IEEE
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory import certify
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import edit_step
from lmc_dist.trajectory.record import TIERS, StepRecord, Trajectory, TrajectoryManifest
from lmc_dist.unlearn.source import micro_batches, share
from lmc_dist.update_rules import Deviation, Point, State, UpdateRule

_CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class Tolerance:
    """How far a step of the rule may be from the logged one: ‖θ' − θ_{s+1}‖ ≤ relative·‖u‖ + rounding of θ_{s+1}.

    Attributes:
        relative: Share of the update.
        floor: Elements whose gradient is below this share of its root mean square are left out. Where a gradient is but
            rounding (the biases of attention keys, whose true gradient is 0), Adam makes a full step of its sign.
    """

    relative: float
    floor: float


# A gradient that was logged in float32 leaves the rounding of the rule itself: a few units in the last place of u, and of
# moments that forget them in up to 1/(1 − β2) steps.
EXACT = Tolerance(1e-4, 0.0)
# bfloat16 keeps 8 bits: of a logged gradient, or of the update that is compared with.
ROUNDED = Tolerance(3e-2, 0.0)
# A float32 gradient summed in another order is off by 1e-6 of its size: 1e-4 of an element at the floor. Measured on small
# models under ZeRO-3 with AdamW, dropout and clipping: 9e-7 at most, and 2e-5 without a floor.
COMPUTED = Tolerance(1e-4, 1e-2)
# Training computed in 16 bits, the gradient here is of float32: measured 0.015 in the first 35 steps from a snapshot, 0.037
# in 140 (bfloat16, AdamW, momentum); without the floor 0.084.
COARSE = Tolerance(0.1, 0.1)
# How far the norm of a gradient computed in float32 may be from the logged one for it to be training's; `certify.COARSE` where
# training computed in 16 bits.
NORM = 1e-2


def logs_gradients(manifest: TrajectoryManifest) -> bool:
    """Whether the run's storage tier keeps g_s."""
    return "gradient" in TIERS[manifest.storage]


def trained_coarsely(manifest: TrajectoryManifest, step: int) -> bool:
    """Whether the step's gradient was computed in less than float32, as far as the manifest says."""
    run = manifest.segment(step).run
    deepspeed = run.get("deepspeed") or {}
    enabled = any(
        isinstance(deepspeed.get(key), dict) and deepspeed[key].get("enabled")
        for key in ("bf16", "bfloat16", "fp16", "torch_autocast")
    )
    stored = any(row.get("dtype") in ("bfloat16", "float16") for row in manifest.parameters)
    named = json.dumps([run.get("autocast"), run.get("engine")], default=str)
    return enabled or stored or "float16" in named or run.get("matmul", IEEE) != IEEE


class TrainingPath:
    """Where training was before each step.

    Args:
        trajectory: The logged run.
        module: The model on shards; with `batches` needed where gradients are neither logged nor told by the updates.
        loss: Its loss.
        batches: Samples by id.

    Attributes:
        rule: The run's update rule.
        cost: Gradients of a whole batch computed so far.
        theta: θ at the present step.
        state: σ there.
    """

    theta: ShardedVector
    state: State

    def __init__(
        self, trajectory: Trajectory, module: ShardedModule | None, loss: Loss, batches: BatchSource | None
    ) -> None:
        self.trajectory, self.module, self.loss, self.batches = trajectory, module, loss, batches
        self.rule = update_rule(trajectory)
        self.cost = 0.0

    def start(self, first: int) -> int:
        """The step to walk from so that σ_first is known. Collective."""
        if not self.rule.keys:
            return first
        with agreement(self.trajectory.layout.group):
            return self.trajectory.nearest_anchor(first)

    def seek(self, step: int) -> None:
        """Stands before a step that `start` has named. Collective.

        Raises:
            LmcError: The snapshot lacks what the update rule needs.
        """
        if not self.rule.keys:
            self.theta, self.state = self.trajectory.theta(step), State()
            return
        vectors, scalars = self.trajectory.snapshot(step)
        self.theta = vectors["theta"]
        self.state = self._initial(step, vectors, scalars)

    def stand(self, step: int, state: State) -> None:
        """Stands before a step at a state that was kept when it was there before. Collective."""
        self.theta, self.state = self.trajectory.theta(step), state

    def _initial(self, step: int, vectors: dict[str, ShardedVector], scalars: dict[str, float]) -> State:
        keys = self.rule.keys
        found = {key: vectors[key] for key in keys if key in vectors}
        if not found:  # the optimizer has not stepped yet
            if any(self.trajectory.record(s).applied for s in range(self.trajectory.num_steps) if s < step):
                raise LmcError(
                    f"the snapshot of step {step} holds no optimizer state, which {', '.join(keys)} are: corrections of "
                    "this optimizer need it"
                )
            zeros = {key: self.theta.like(torch.zeros_like(self.theta.flat)) for key in keys}
            return State(zeros, 0)
        if missing := [key for key in keys if key not in found]:
            raise LmcError(f"the snapshot of step {step} holds no '{missing[0]}' of the optimizer's state")
        counts = any(rule.clock(2) == 2 for rule in self.rule.rules)
        if counts and "step" not in scalars:
            raise LmcError(f"the snapshot of step {step} does not say how many steps the optimizer had taken ('step')")
        # Without a counter all that matters is that there has been a step: the momentum buffer exists.
        return State(found, int(scalars["step"]) if counts else 1)

    def step(self, step: int, needs_gradient: bool = False) -> tuple[Point, ShardedVector]:
        """Takes the step; returns where it was taken from and u_s. Collective.

        Args:
            step: The present step.
            needs_gradient: Whether g_s is wanted beyond what following the optimizer takes.

        Raises:
            LmcError: Damaged log, or a step that the update rule does not reproduce.
        """
        record = self.trajectory.record(step)
        stands = not self.rule.keys and not any(record.lr)  # then clipping changes nothing either
        here = Point(self.theta, record.lr, self.state, None, 1.0 if stands else record.clip_coef)
        wanted = record.applied and (bool(self.rule.keys) or needs_gradient or here.clip_coef < 1)
        is_told = self._is_told(record)
        if wanted and not is_told:
            here = replace(here, gradient=self._gradient(step, record))
        self.theta = here.theta.clone()
        update = self.trajectory.advance(self.theta, step)
        if wanted and is_told:
            told = self.rule.gradient_of(here.theta, update, record.lr)
            here = replace(here, gradient=told if here.clip_coef == 1 else told.scale_(1 / here.clip_coef))
        if wanted and self.rule.keys:
            found, self.state = self.rule.apply(here)
            self._check(step, here, found, update)
        return here, update

    def pass_edit(self, step: int) -> Deviation | None:
        """Goes over to the weights and state that a correction after `step` has set; what they make up for. Collective.

        Returns:
            (θ, σ) that the step led to minus the corrected ones, to be added to a deviation; None where nothing was edited.
        """
        if step + 1 not in self.trajectory.edits:
            return None
        vectors, scalars = self.trajectory.snapshot(step + 1)
        theta, state = self.theta, self.state
        self.theta, self.state = vectors["theta"], State()
        if self.rule.keys:
            self.state = self._initial(step + 1, vectors, scalars)
        made_up = {key: vector - self.state.vectors[key] for key, vector in state.vectors.items()}
        return Deviation(theta - self.theta, made_up)

    def is_precise(self, step: int) -> bool:
        """Whether g_s, where `step` hands it out, is that of float32 or better, as the module here computes it. Local."""
        manifest = self.trajectory.manifest
        if self._is_told(self.trajectory.record(step)):
            dtype = manifest.update_dtype
        elif not logs_gradients(manifest):
            return True  # the module here has computed it
        else:
            dtype = manifest.gradient_dtype
        return dtype != "bfloat16" and not trained_coarsely(manifest, step)

    def _is_told(self, record: StepRecord) -> bool:
        """Whether the update itself tells the gradient."""
        return not self.rule.keys and all(record.lr)

    def _gradient(self, step: int, record: StepRecord) -> ShardedVector:
        """g_s, logged or computed."""
        if logs_gradients(self.trajectory.manifest):
            with agreement(self.trajectory.layout.group):
                return self.trajectory.gradient(step)
        if self.module is None or self.batches is None:
            raise LmcError(no_gradients(self.trajectory))
        counts, normalization = self.batches.num_targets, self.trajectory.manifest.loss_normalization
        edited = edit_step(record, None, normalization, counts)
        self.cost += share(edited, "kept")
        micros = micro_batches(edited, self.batches, self.module, "kept")
        return weighted_gradient(self.module, self.loss, self.theta, micros)

    # --- comparison with the logged step -------------------------------------------------------------------------

    def _tolerance(self, step: int) -> Tolerance:
        manifest = self.trajectory.manifest
        if not logs_gradients(manifest):
            return COARSE if trained_coarsely(manifest, step) else COMPUTED
        rounded = "bfloat16" in (manifest.gradient_dtype, manifest.update_dtype)
        return ROUNDED if rounded else EXACT

    def _check(self, step: int, here: Point, found: ShardedVector, update: ShardedVector) -> None:
        assert here.gradient is not None
        tolerance, record = self._tolerance(step), self.trajectory.record(step)
        g, error, moved, size = self._sums(here.gradient, found, update, 0.0)
        if tolerance.floor:
            floor = tolerance.floor * math.sqrt(g / self.theta.layout.total_numel)
            _, error, moved, size = self._sums(here.gradient, found, update, floor)
        rounding = 2 * torch.finfo(found.flat.dtype).eps * math.sqrt(size)
        if math.sqrt(error) <= tolerance.relative * math.sqrt(moved) + rounding:  # false for NaN
            return
        optimizer = self.trajectory.manifest.optimizer["class"]
        logged, norm = record.grad_norm, math.sqrt(g)
        told = "" if logged is None else f", the logged one {logged:.6g}"
        allowed = certify.COARSE if trained_coarsely(self.trajectory.manifest, step) else NORM
        if (
            logged is not None
            and not logs_gradients(self.trajectory.manifest)
            and not abs(norm - logged) <= allowed * logged
        ):
            off = f"its gradient has norm {norm:.6g}{told}, and the update is off by {math.sqrt(error):.3g} of {math.sqrt(moved):.3g}"
            raise LmcError(certify.not_training(step, off))
        raise LmcError(
            f"step {step}: the update rule of {optimizer} does not give the logged step: off by {math.sqrt(error):.3g} of an "
            f"update of norm {math.sqrt(moved):.3g} ({tolerance.relative:g} of it is allowed); its gradient has norm "
            f"{norm:.6g}{told}. Either the gradient is another one (dropout whose random state was not logged, "
            "other data, a model in another precision) or the update is (settings that changed during training, such as "
            "betas or weight decay, parameters without a gradient): use replay_head=all, or log gradients "
            "(log.storage=gradient)"
        )

    def _sums(
        self, gradient: ShardedVector, found: ShardedVector, update: ShardedVector, floor: float
    ) -> tuple[float, ...]:
        """‖g‖²; over the elements with |g| ≥ floor: ‖θ' − θ_{s+1}‖², ‖u‖², ‖θ_{s+1}‖². One all-reduce."""
        sums = torch.zeros(4, dtype=torch.float64, device=found.flat.device)
        for i in range(0, found.flat.numel(), _CHUNK):
            part = slice(i, i + _CHUNK)
            g, reached = gradient.flat[part].double(), self.theta.flat[part].double()
            parts = (found.flat[part].double() - reached, update.flat[part].double(), reached)
            if floor:
                counted = g.abs() >= floor
                parts = tuple(p * counted for p in parts)  # type: ignore[assignment]
            sums += torch.stack([(p * p).sum() for p in (g, *parts)])
        layout = found.layout
        if layout.world_size > 1:
            dist.all_reduce(sums, group=layout.group)
        return tuple(sums.tolist())


def update_rule(trajectory: Trajectory) -> UpdateRule:
    """The run's update rule. Local."""
    manifest = trajectory.manifest
    return UpdateRule(trajectory.layout, manifest.parameters, manifest.optimizer, manifest.max_grad_norm)


def no_gradients(trajectory: Trajectory) -> str:
    """Why the optimizer cannot be followed without a model, and what would let it."""
    return (
        f"following {trajectory.manifest.optimizer['class']} takes the gradient of every step, and storage "
        f"'{trajectory.manifest.storage}' keeps none: pass module= and batches=, which compute it, or train with "
        "log.storage=gradient"
    )
