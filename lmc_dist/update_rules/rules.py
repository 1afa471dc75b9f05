"""Update rules Φ as pure functions of plain tensors, elementwise, in the arithmetic of torch's own optimizers.

    (θ, σ, g) ↦ (θ', σ')

σ is a dict of tensors shaped like θ, keyed as torch keys its optimizer state, and the number of steps taken before. The
operations and their order are those of `torch.optim` (its for-loop and foreach paths); results agree to the bit but for
elements that fall into the vectorised part of a kernel here and into its scalar rest there, which differ by one rounding.

`torch.func.jvp` of a rule is its tangent. No derivative is written by hand, except that of √ at 0 (`safe_sqrt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = Mapping[str, torch.Tensor]

MOMENTUM, AVERAGE, SQUARE, MAX_SQUARE = "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"

# Second moments: never negative, whatever is added to them to first order.
SECOND_MOMENTS = (SQUARE, MAX_SQUARE)


class Rule(Protocol):
    """The update rule of one parameter group."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its per-element state, all zero before the first step."""

    @property
    def momentum(self) -> float:
        """Share of the last step's direction that the next one keeps."""

    @property
    def gain(self) -> float:
        """What a gradient is multiplied by on its way into that direction."""

    def clock(self, step: int) -> int:
        """What of the step counter the arithmetic depends on."""

    def __call__(
        self, theta: torch.Tensor, grad: torch.Tensor, state: Tensors, step: int, lr: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(θ', σ'); `step` counts the steps taken before this one. Changes nothing in place."""


def safe_sqrt(x: torch.Tensor) -> torch.Tensor:
    """√x with tangent 0 at x = 0: a second moment is exactly 0 where there has never been a gradient."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (MOMENTUM,) if self.momentum else ()

    @property
    def gain(self) -> float:
        return 1 - self.dampening

    def clock(self, step: int) -> int:
        return min(step, 1) if self.momentum else 0  # the first gradient fills the buffer undampened

    def __call__(
        self, theta: torch.Tensor, grad: torch.Tensor, state: Tensors, step: int, lr: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            grad = grad.add(theta, alpha=self.weight_decay)
        new: dict[str, torch.Tensor] = {}
        if self.momentum:
            buffer = grad if step == 0 else state[MOMENTUM].mul(self.momentum).add(grad, alpha=1 - self.dampening)
            new[MOMENTUM] = buffer
            grad = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return theta.add(grad, alpha=-lr), new


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam and AdamW; DeepSpeed's FusedAdam and DeepSpeedCPUAdam, which round otherwise.

    DeepSpeedCPUAdam takes 1 − β2 in float32: its second moments were measured to differ by 1e-5, its θ by 1e-5 of an update.

    Attributes:
        is_decoupled: Weight decay shrinks θ itself (AdamW); else it is added to the gradient.
        bias_correction: DeepSpeed can leave it out.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    is_decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False
    bias_correction: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return (AVERAGE, SQUARE, MAX_SQUARE) if self.amsgrad else (AVERAGE, SQUARE)

    @property
    def momentum(self) -> float:
        return self.beta1

    @property
    def gain(self) -> float:
        return 1 - self.beta1

    def clock(self, step: int) -> int:
        return step if self.bias_correction else 0

    def __call__(
        self, theta: torch.Tensor, grad: torch.Tensor, state: Tensors, step: int, lr: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            if self.is_decoupled:
                theta = theta.mul(1 - lr * self.weight_decay)
            else:
                grad = grad.add(theta, alpha=self.weight_decay)
        average = torch.lerp(state[AVERAGE], grad, 1 - self.beta1)
        square = state[SQUARE].mul(self.beta2).addcmul(grad, grad, value=1 - self.beta2)
        new = {AVERAGE: average, SQUARE: square}
        if self.amsgrad:
            square = new[MAX_SQUARE] = torch.maximum(state[MAX_SQUARE], square)
        correction1, correction2 = 1.0, 1.0
        if self.bias_correction:
            correction1, correction2 = 1 - self.beta1 ** (step + 1), (1 - self.beta2 ** (step + 1)) ** 0.5
        denominator = safe_sqrt(square).div(correction2).add(self.eps)
        return theta.addcdiv(average, denominator, value=-(lr / correction1)), new
