"""What every live training engine offers: its master weights and optimizer state as shards, and gradients at any point.

Masters are the float32 (or float64) weights that the optimizer steps; they are θ, whatever precision the engine
computes in. Working weights are those that its forward pass uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

if TYPE_CHECKING:
    from lmc_dist.curvature.loss import Loss, MicroBatch

# Optimizer state as it is logged: (per-element state by key, scalar state by key).
State = tuple[dict[str, ShardedVector], dict[str, float]]


class EngineShards(ABC):
    """The shards of a live engine. Every rank constructs one, and every rank calls its methods.

    Attributes:
        name: What the log's manifest calls the engine.
        module: The model without the engine's wrapper.
        optimizer: The object whose `step` is an optimizer step.
        parameters: Trainable parameters by name.
        layout: Where their masters lie; its group moves tensors on the CPU.
    """

    name: str
    module: nn.Module
    optimizer: Any
    parameters: dict[str, Any]
    layout: ShardLayout

    @abstractmethod
    def read(self) -> ShardedVector:
        """A copy of the master shards in host memory. Collective."""

    @abstractmethod
    def working(self) -> ShardedVector:
        """A copy of what the forward pass uses of this rank's shards, in its own dtype, in host memory. Collective."""

    @abstractmethod
    def read_state(self) -> State:
        """The optimizer's state, copied. Collective."""

    @abstractmethod
    def write_state(self, vectors: dict[str, ShardedVector], scalars: dict[str, float]) -> None:
        """Replaces all optimizer state by what `read_state` returned; an optimizer that never stepped has none. Collective."""

    @abstractmethod
    def gradient(self, theta: ShardedVector, micro_batches: Sequence[MicroBatch], loss: Loss) -> ShardedVector:
        """∇ Σ_i weights_i ℓ_i(θ) over the micro-batches of all ranks, computed by the engine itself. Collective.

        Ranks may have different numbers of micro-batches, none included. Weights, gradients, optimizer state and
        random numbers are afterwards what they were, to the bit.

        Args:
            theta: Where the gradient is taken, laid out like the engine, float32 or better.
            micro_batches: This rank's part of the batch.
            loss: The model's loss.

        Raises:
            LmcError: The engine computes in less than float32, or is inside an accumulation window.
        """

    @abstractmethod
    def _write_masters(self, theta: ShardedVector) -> None:
        """Masters and working weights ← θ."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the working weights, in which the engine computes its gradients unless told otherwise."""
        return next(iter(self.parameters.values())).dtype

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the settings of the present step."""

    @property
    @abstractmethod
    def has_state(self) -> bool:
        """Whether the optimizer keeps anything from one step to the next."""

    @property
    @abstractmethod
    def group_of(self) -> dict[str, int]:
        """Parameter name → index of the optimizer group it belongs to."""

    @property
    @abstractmethod
    def optimizer_class(self) -> str:
        """Name of the update rule's class."""

    def write(self, theta: ShardedVector) -> None:
        """Sets masters and working weights to θ, and checks that they agree. Collective.

        Raises:
            LmcError: θ is laid out differently, or a copy does not hold θ afterwards.
        """
        self.check_layout(theta)
        self._write_masters(theta)
        self.verify(theta)

    def check_layout(self, theta: ShardedVector) -> None:
        """Raises LmcError on every rank unless θ is laid out like the engine. Collective."""
        with agreement(self.layout.group):
            if theta.layout != self.layout:
                raise LmcError("the vector's layout is not the engine's: other parameters or another world size")

    def verify(self, theta: ShardedVector) -> str:
        """Checks that masters and working weights hold θ (the latter rounded to their dtype); its checksum. Collective."""
        expected = checksum(theta)
        if checksum(self.read()) != expected:
            raise LmcError("the engine's master shards do not hold the written weights")
        working = self.working()
        if checksum(working) != checksum(theta.to(working.flat.dtype)):
            raise LmcError("the engine's working shards do not hold the written weights")
        return expected


def check_precision(dtype: torch.dtype, what: str) -> None:
    """Raises LmcError unless gradients in `dtype` are exact enough to be differenced. Local."""
    if dtype not in (torch.float32, torch.float64):
        raise LmcError(
            f"{what} in {str(dtype).removeprefix('torch.')}: gradients so coarse cannot be differenced, a Hessian product "
            "made of them never came below 5 % error at any step size; pass the sharded module (module=) instead of the "
            "engine (engine=), which computes in float32"
        )
