"""What every live training engine offers: its master weights and optimizer state as shards, gradients at any point, and
all that logging and replaying its steps needs.

Masters are the float32 (or float64) weights that the optimizer steps; they are θ, whatever precision the engine
computes in. Working weights are those that its forward pass uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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
        base: The optimizer of torch (or of its kind) inside: the update rule and its groups.
        parameters: Trainable parameters by name.
        layout: Where their masters lie; its group moves tensors on the CPU.
        max_grad_norm: Global-norm clipping of its steps, 0 for none.
        applied: Whether the last step changed the weights (no overflow, no NaN gradient).
        autocast: What the training loop computes in by `torch.autocast`; None without, or where the engine sees to it.
    """

    name: str
    module: nn.Module
    optimizer: Any
    base: Any
    parameters: dict[str, Any]
    layout: ShardLayout
    max_grad_norm: float = 0.0
    applied: bool = True
    autocast: torch.dtype | None = None

    @abstractmethod
    def read(self) -> ShardedVector:
        """A copy of the master shards in host memory. Collective."""

    @abstractmethod
    def held(self) -> Iterable[torch.Tensor]:
        """The masters themselves, without padding, each element on one rank. Local."""

    @abstractmethod
    def working(self) -> ShardedVector:
        """A copy of what the forward pass uses of this rank's shards, in its own dtype, in host memory. Collective."""

    @abstractmethod
    def read_state(self) -> State:
        """The optimizer's state, copied. Collective."""

    @abstractmethod
    def check_state(self) -> None:
        """Checks that the log can hold what the optimizer keeps. Local.

        Raises:
            LmcError: Something is neither of a parameter's shape nor a number.
        """

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

    # --- logging ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        """Has every optimizer step reported, also one that ends up not applied; returns what ends it. Local.

        Args:
            before: Called before the step; `step_gradient` and `loss_scale` are then those of the step.
            after: Called after it; `applied` and `grad_norm` are then known. Both are called on every rank or on none.
            keeps_gradient: Whether `before` asks for `step_gradient`.
        """

    @abstractmethod
    def step_gradient(self) -> ShardedVector:
        """g_s, between the last backward pass and the step: reduced over ranks, unscaled, unclipped. Collective."""

    @property
    @abstractmethod
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradient before clipping; None if it is not known. Local."""

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by against underflow of its gradient. Local."""
        return 1.0

    @abstractmethod
    def is_local_pass(self) -> bool:
        """Whether the gradient of the pass that begins stays on its rank until a later one reduces it (`no_sync`). Local."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON of all that rounding depends on, by which `build.build_engine` makes the same engine. Local."""

    @abstractmethod
    def declare_clipping(self, max_grad_norm: float | None) -> None:
        """Takes what the training loop says it clips to; None says nothing. Local.

        Raises:
            LmcError: The engine itself clips to something else.
        """

    # --- replaying -------------------------------------------------------------------------------------------------

    @abstractmethod
    def run_pass(
        self, inputs: dict[str, torch.Tensor], num_items: float, scale: float, is_last: bool, is_local: bool
    ) -> torch.Tensor:
        """One forward and backward pass of scale · Σ nll / num_items; returns Σ nll / num_items. Collective.

        The engine averages over ranks, so a loss meant as a sum over W ranks needs scale = W.

        Args:
            inputs: Keyword arguments of the model's forward, `labels` among them.
            num_items: What the model divides its loss by.
            scale: What the loss is multiplied by.
            is_last: Whether the step follows.
            is_local: Whether the gradient may stay on the rank until the last pass; engines that know no such thing
                go by `is_last`.
        """

    @abstractmethod
    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The model's output, computed as in training but without gradients, for which there is `run_loss`. Collective."""

    @abstractmethod
    def run_loss(
        self, inputs: dict[str, torch.Tensor], loss: Callable[[Any], torch.Tensor], is_last: bool, is_local: bool
    ) -> torch.Tensor:
        """One forward and backward pass of any loss of the model's output; returns it. Collective.

        The step's gradient is that of the sum over all passes of all ranks.

        Args:
            inputs: Keyword arguments of the model's forward.
            loss: This pass's part of the loss, a scalar.
            is_last: As of `run_pass`.
            is_local: As there.
        """

    @abstractmethod
    def step(self) -> bool:
        """Clips, steps the optimizer and clears the gradients. Collective.

        Returns:
            Whether it did: false where float16 overflowed, and the passes are to be run again at the smaller scale that
            has been set.
        """

    @abstractmethod
    def clear_gradients(self) -> None:
        """Drops the gradients of a step that has been taken, which loops clear only after it. Local."""

    @property
    def first_differs(self) -> bool:
        """Whether a fresh engine's first step is computed otherwise than later ones, so that none may come before it."""
        return False

    def warm_up(self, inputs: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Brings a fresh engine to where it computes as one that has stepped before. Collective.

        Args:
            inputs: Of any pass, without targets.
        """

    def destroy(self) -> None:  # noqa: B027
        """Frees what the engine holds beside the model. Collective."""

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return next(iter(self.parameters.values())).device

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the masters, and of the log: float32 or float64."""
        return torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of the working weights, in which the engine computes its gradients unless told otherwise."""
        return next(iter(self.parameters.values())).dtype

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the settings of the present step."""
        return self.base.param_groups

    @property
    @abstractmethod
    def has_state(self) -> bool:
        """Whether the optimizer keeps anything from one step to the next."""

    @property
    @abstractmethod
    def group_of(self) -> dict[str, int]:
        """Parameter name → index of the optimizer group it belongs to."""

    @property
    def optimizer_class(self) -> str:
        """Name of the update rule's class."""
        return type(self.base).__name__

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


def check_kept(optimizer: Any, key: str, value: Any, shape: torch.Size, name: str) -> None:
    """Checks that the log can hold a value of an optimizer's state. Local.

    Args:
        optimizer: Whose it is.
        key: Its key.
        value: The value.
        shape: Of the master.
        name: Of the master.

    Raises:
        LmcError: It is neither of the master's shape nor a number.
    """
    if value is None or isinstance(value, (int, float)):
        return
    if torch.is_tensor(value) and (value.shape == shape or value.numel() == 1):
        return
    found = f"of shape {tuple(value.shape)}" if torch.is_tensor(value) else f"of type {type(value).__name__}"
    raise LmcError(
        f"{type(optimizer).__name__} keeps '{key}' {found} for {name} of shape {tuple(shape)}: the log holds state of the "
        "parameter's own shape and single numbers only, use an optimizer that keeps such (SGD, Adam, AdamW)"
    )


def check_precision(dtype: torch.dtype, what: str) -> None:
    """Raises LmcError unless gradients in `dtype` are exact enough to be differenced. Local."""
    if dtype not in (torch.float32, torch.float64):
        raise LmcError(
            f"{what} in {str(dtype).removeprefix('torch.')}: gradients so coarse cannot be differenced, a Hessian product "
            "made of them never came below 5 % error at any step size; pass the sharded module (module=) instead of the "
            "engine (engine=), which computes in float32"
        )
