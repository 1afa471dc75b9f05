"""Fine-tuning of a live engine on an objective: the training loop of the baselines, without a log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lmc_dist.baselines.losses import ascent_loss, descent_loss, npo_loss
from lmc_dist.baselines.objective import Plan
from lmc_dist.config import TrainConfig
from lmc_dist.curvature import MicroBatch, TokenCrossEntropy
from lmc_dist.data import split_batch
from lmc_dist.runtime import AgreedError
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.engines.passes import measuring
from lmc_dist.training import micro_steps, pass_seed
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.exchange import all_gather

logger = logging.getLogger(__name__)

# (this rank's samples of a pass, their nll) → its part of the step's loss.
Part = Callable[[list[int], torch.Tensor], torch.Tensor]

FORWARD = 1 / 3  # of a gradient: a backward pass takes two forward passes' worth of products


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning took.

    Attributes:
        steps: Optimizer steps.
        samples: Samples in them, with repetitions.
        forwards: Samples that were only looked at.
        skipped: Steps that the engine dropped, since their gradient was not finite.
        losses: The loss of each step, before it.
    """

    steps: int
    samples: int
    forwards: int
    skipped: int
    losses: list[float]

    def gradients(self, batch_size: float) -> float:
        """Cost in gradients of a training batch of so many samples."""
        return (self.samples + FORWARD * self.forwards) / batch_size


class Tuning:
    """The passes of an objective on a live engine, on every rank.

    Args:
        shards: The engine; its weights are where fine-tuning starts.
        batches: Samples by id.
        plan: Which samples each step sees, and what is minimised.
        train: Settings of the loop: batches, clipping, schedule, seed.
    """

    def __init__(self, shards: EngineShards, batches: BatchSource, plan: Plan, train: TrainConfig) -> None:
        self.shards, self.batches, self.plan, self.train = shards, batches, plan, train
        self.loss = TokenCrossEntropy()
        self.layout, self.micro_steps = shards.layout, micro_steps(train, shards.layout.world_size)
        self.reference: dict[int, float] = {}

    def run(self, progress: Callable[[int], None] = lambda step: None) -> Tuned:
        """Trains to the end. Collective.

        Raises:
            LmcError: On every rank: the loss is not finite.
        """
        from transformers import get_scheduler

        plan, train = self.plan, self.train
        forwards = 0
        if plan.objective.forget == "npo":
            self.reference = self.negative_log_likelihoods(plan.forget)
            forwards = len(plan.forget)
        scheduler = get_scheduler(train.schedule, self.shards.base, train.warmup_steps, plan.num_steps)
        self.shards.module.train()
        losses, samples, skipped = [], 0, 0
        for step, seen in enumerate(plan):
            losses.append(self._step(step, seen.forget, seen.retain))
            scheduler.step()
            samples += len(seen.forget) + len(seen.retain)
            skipped += not self.shards.applied
            progress(step)
        if skipped and self.layout.rank == 0:
            logger.warning("%d of %d steps had a gradient that is not finite and were skipped", skipped, len(losses))
        return Tuned(len(losses), samples, forwards, skipped, losses)

    def negative_log_likelihoods(self, ids: Sequence[int]) -> dict[int, float]:
        """Sample id → −log π(y | x) by the engine's own forward pass without dropout, on every rank. Collective.

        Samples are dealt out over the ranks.
        """
        size, world_size = self.train.micro_batch_size, self.layout.world_size
        mine = list(ids)[self.layout.rank :: world_size]
        found: dict[int, float] = {}
        with measuring(self.shards.module, self.shards.device):
            self.shards.module.eval()
            for start in range(0, -(-len(ids) // world_size), size):
                chunk = mine[start : start + size]
                inputs, labels = self._batch(chunk or list(ids[:1]))  # ranks run equal numbers of passes
                values = self._values(self.shards.forward(inputs), inputs, labels)[: len(chunk)]
                found.update(zip(chunk, values.tolist(), strict=True))
        return {i: value for part in all_gather(found) for i, value in part.items()}

    def _step(self, step: int, forget: list[int], retain: list[int]) -> float:
        """One optimizer step; returns the loss of the global batch."""
        world_size, passes = self.layout.world_size, []
        for ids, part in ((forget, self._forget_part(forget)), (retain, self._retain_part(retain))):
            if ids:
                passes += [(ids, chunks, part) for chunks in split_batch(ids, world_size, self.micro_steps)]
        total = torch.zeros((), device=self.shards.device)
        for m, (ids, chunks, part) in enumerate(passes):
            mine, is_last = chunks[self.layout.rank], m == len(passes) - 1
            inputs, labels = self._batch(mine or ids[:1])

            def value(
                output: object, mine: list[int] = mine, part: Part = part, given=(inputs, labels)
            ) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return part(mine, self._values(output, *given)[: len(mine)])

            torch.manual_seed(pass_seed(self.train.seed, step, m, self.layout.rank))
            total += self.shards.run_loss(inputs, value, is_last, not is_last)
        if world_size > 1:
            dist.all_reduce(total)
        if not math.isfinite(float(total)):
            raise AgreedError(
                f"step {step}: the loss is {float(total)}, the run has diverged: lower baseline.learning_rate, or take "
                "fewer steps"
            )
        self.shards.step()
        return float(total)

    def _forget_part(self, ids: list[int]) -> Part:
        objective = self.plan.objective
        if objective.forget == "npo":

            def npo(mine: list[int], nll_B: torch.Tensor) -> torch.Tensor:
                reference_B = torch.tensor([self.reference[i] for i in mine], dtype=nll_B.dtype, device=nll_B.device)
                return npo_loss(nll_B, reference_B, objective.beta, len(ids))

            return npo
        num_targets = sum(self.batches.num_targets(ids))
        return lambda mine, nll_B: ascent_loss(nll_B, num_targets)

    def _retain_part(self, ids: list[int]) -> Part:
        num_targets, weight = sum(self.batches.num_targets(ids)), self.plan.objective.retain_weight
        return lambda mine, nll_B: weight * descent_loss(nll_B, num_targets)

    def _batch(self, ids: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs, labels = self.batches.inputs(ids)
        device = self.shards.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)

    def _values(self, output: object, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """(B,) summed negative log-likelihoods."""
        micro = MicroBatch(inputs, labels, torch.ones(len(labels)))
        return self.loss.sample_values(self.loss.outputs(output), micro)[0]
