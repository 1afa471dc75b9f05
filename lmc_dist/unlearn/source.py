"""Where a correction starts: b_s = ∇L_s(θ_s; w'_s) − ∇L_s(θ_s; w_s), or a unit's share of it (docs/method.md §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lmc_dist.curvature import Loss, MicroBatch
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.runtime import agreement
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource, logged_batch, seen_batch
from lmc_dist.trajectory.counterfactual import EditedStep
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.units import Unit, kept_gain, own_loss, sources_by_step, step_shares


def micro_batches(
    edited: EditedStep, batches: BatchSource, module: ShardedModule, weights: Literal["kept", "source"]
) -> list[MicroBatch]:
    """This rank's passes of a step, weighted as the counterfactual (`kept`) or as the source. Local.

    Passes are dealt out in the logged order, so at the logged world size each rank gets its own. Samples of weight
    zero are left out, except where dropout needs the whole pass to draw the logged masks.
    """
    layout = module.layout
    built = []
    for micro in edited.micro_batches[layout.rank :: layout.world_size]:
        coefficients = micro.weights if weights == "kept" else micro.source_weights
        ids = micro.record.sample_ids
        state = micro.record.random_state
        if state is None:
            chosen = [i for i, c in enumerate(coefficients) if c != 0.0]
            ids, coefficients = tuple(ids[i] for i in chosen), [coefficients[i] for i in chosen]
        if not ids or not any(coefficients):
            continue
        if state is None:
            inputs, targets = batches.inputs(ids)
        else:  # dropout draws as many numbers as the whole pass has elements
            inputs, targets = logged_batch(micro.record, batches)
            for row in micro.record.blanks:
                coefficients.insert(row, 0.0)
        built.append(
            MicroBatch(
                inputs,
                targets,
                torch.tensor(coefficients, dtype=torch.float64, device=targets.device),
                None if state is None else torch.frombuffer(bytearray(state), dtype=torch.uint8),
            )
        )
    return built


def source(
    edited: EditedStep, theta: ShardedVector, batches: BatchSource, module: ShardedModule, loss: Loss
) -> ShardedVector:
    """b_s at θ_s: one gradient with the weights w'_i/D' − w_i/D. Collective."""
    return weighted_gradient(module, loss, theta, micro_batches(edited, batches, module, "source"))


def share(edited: EditedStep, weights: Literal["kept", "source"]) -> float:
    """Fraction of the step's samples that a product with these weights works on: its cost in gradients."""
    chosen = [
        c != 0.0 or (m.record.random_state is not None)
        for m in edited.micro_batches
        for c in (m.weights if weights == "kept" else m.source_weights)
    ]
    return sum(chosen) / max(len(chosen), 1)


@dataclass(frozen=True)
class Source:
    """What a step brings to a unit.

    Attributes:
        unit: Its name.
        vector: Its share of b_s; None where the step is not taken.
        part: Its share of such a step.
        counts: Whether that step counts as its own; one unit answers for the optimizer's counter.
    """

    unit: str
    vector: ShardedVector | None
    part: float = 1.0
    counts: bool = False


class Sources:
    """The sources of some units along a trajectory.

    Args:
        units: Whose.
        trajectory: The logged run.
        module: The model on shards; None where only whole steps are forgotten.
        loss: Its loss.
        batches: Samples by id; None as `module`.

    Attributes:
        steps: Steps that have one, ascending.
        last: The last of each unit that has any.
        cost: Gradients of a whole batch computed so far.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        trajectory: Trajectory,
        module: ShardedModule | None,
        loss: Loss,
        batches: BatchSource | None,
    ) -> None:
        self.units, self.trajectory, self.module, self.loss, self.batches = units, trajectory, module, loss, batches
        self.cost = 0.0
        present = range(trajectory.first_step, trajectory.num_steps)
        self._at = sources_by_step(units, (trajectory.record(step) for step in present))
        self.steps = list(self._at)
        self.last = {unit.name: step for step, touched in self._at.items() for unit in touched}

    def at(self, edited: EditedStep, theta: ShardedVector) -> list[Source]:
        """Those of a step. Collective."""
        units = self._at.get(edited.record.step, [])
        if not units:
            return []
        self._check(edited)
        counts = None if self.batches is None else self.batches.num_targets
        normalization = self.trajectory.manifest.loss_normalization
        shares = step_shares(edited, units, normalization, counts)  # type: ignore[arg-type]
        if edited.skipped:
            first = self._owner(edited, shares[0].unit)
            return [Source(s.unit.name, None, s.of_kept, s.unit.name == first) for s in shares]
        is_shared = len(shares) > 1 and normalization == "global_token_mean"
        if not is_shared:
            return [Source(s.unit.name, self._gradient(s.edited, theta)) for s in shares if s.edited is not None]
        gain = self._gradient(kept_gain(edited), theta)  # one gradient for all of them
        return [Source(s.unit.name, self._gradient(own_loss(s), theta).add_(gain, alpha=s.of_kept)) for s in shares]

    def only(self, step: int) -> None:
        """Leaves all sources out but those of one step. Local."""
        self._at = {step: self._at[step]}
        self.steps = [step]
        self.last = {unit.name: step for unit in self._at[step]}

    def _check(self, edited: EditedStep) -> None:
        """Checks that the data is training's, where a step has something forgotten in it. Collective.

        Raises:
            LmcError: It gives another batch than the model saw.
        """
        layout = self.trajectory.layout
        with agreement(layout.group):
            for micro in edited.micro_batches[layout.rank :: layout.world_size]:
                if self.batches is not None and micro.record.sample_ids and not edited.skipped:
                    seen_batch(micro.record, self.batches)

    def _owner(self, edited: EditedStep, first: Unit) -> str | None:
        """The unit that answers for a step that is not taken: that of its first sample, wherever that unit is swept."""
        if edited.record.batch_id in first.batch_ids:
            return first.name
        sample = edited.record.sample_ids[0]
        return next((unit.name for unit in self.units if sample in unit.sample_ids), None)

    def _gradient(self, edited: EditedStep, theta: ShardedVector) -> ShardedVector:
        assert self.module is not None and self.batches is not None
        self.cost += share(edited, "source")
        return source(edited, theta, self.batches, self.module, self.loss)
