"""ProductEngine: gradients, Gauss-Newton and Hessian products of a sharded model at one point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lmc_dist.curvature.first_order import FirstOrder
from lmc_dist.curvature.kernels import primal_kernels
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.curvature.second_order import SecondOrder
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.precision import float32_matmuls
from lmc_dist.shards.vector import ShardedVector

T = TypeVar("T")


class ProductEngine:
    """Gradient, Gauss-Newton and Hessian products at one θ over this rank's micro-batches.

    Args:
        module: The model on shards.
        loss: Its loss.
        theta: Where products are taken.
        micro_batches: This rank's part of the batch.
        keep: Keep the forward graphs (and with them the gathered parameters) instead of recomputing block by block.
    """

    def __init__(
        self,
        module: ShardedModule,
        loss: Loss,
        theta: ShardedVector,
        micro_batches: Sequence[MicroBatch],
        keep: bool = False,
    ) -> None:
        self.module, self.loss, self.theta = module, loss, theta
        self.micro_batches, self.keep = micro_batches, keep

    def run(self, vectors: Sequence[ShardedVector], second_order: bool) -> list[ShardedVector]:
        """Without vectors the gradient; else the GGN products, or with `second_order` the Hessian products. Collective."""
        passes = SecondOrder if second_order else FirstOrder
        with self._prepared():
            return passes(self.module, self.loss, self.theta, self.micro_batches, vectors, self.keep).products()

    @torch.no_grad()
    def sample_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(summed losses, numbers of targets) of each sample of each of this rank's micro-batches. Collective."""
        with self._prepared():
            return FirstOrder(self.module, self.loss, self.theta, self.micro_batches, [], False).sample_values()

    @torch.no_grad()
    def map_outputs(self, function: Callable[[torch.Tensor, MicroBatch], T]) -> list[list[T]]:
        """`function` of the outputs of each chunk of samples of this rank's micro-batches. Collective; the function is local."""
        with self._prepared():
            return FirstOrder(self.module, self.loss, self.theta, self.micro_batches, [], False).map_outputs(function)

    @property
    def random(self) -> bool:
        """Whether dropout draws random numbers, those of training."""
        return any(micro.rng_state is not None for micro in self.micro_batches)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The module as a product needs it; the program's mode and random numbers are put back afterwards."""
        module, device = self.module.module, self.module.device
        was_training = module.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=self.random):
            module.train(self.random)
            try:
                # the program may have turned either on, for its training
                with torch.autocast(device.type, enabled=False), float32_matmuls(), primal_kernels(module):
                    yield
            finally:
                module.train(was_training)
