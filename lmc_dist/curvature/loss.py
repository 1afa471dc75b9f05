"""Losses as the curvature engine sees them: a weighted sum of per-sample losses and its derivatives at the outputs.

    L = Σ_i weights_i Σ_t nll_{i,t}

so that every batch loss, every counterfactual and every source (docs/method.md §2, §3) is a choice of weights.

Shapes: B samples, T positions, V classes, N targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, pad


@dataclass
class MicroBatch:
    """What one forward pass sees.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        targets: Labels as the loss reads them (causal LM: (B, T), -100 is no target).
        weights: (B,) coefficient of each sample's summed loss.
        rng_state: Random state before the pass in training; None runs without dropout.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    weights: torch.Tensor
    rng_state: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on a device; random state stays in host memory. Local."""
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets.to(device), weights=self.weights.to(device))


OutputCurvature = Callable[[torch.Tensor], torch.Tensor]


class Loss(Protocol):
    """A loss with a known Hessian at the model's outputs."""

    def outputs(self, model_output: Any) -> torch.Tensor:
        """The tensor the loss is a function of."""

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """Scalar Σ_i weights_i Σ_t nll_{i,t}, differentiable."""

    def output_curvature(self, outputs: torch.Tensor, micro: MicroBatch) -> OutputCurvature:
        """u ↦ H_ℓ u with H_ℓ the Hessian of `value` at `outputs`; shapes of `outputs`."""

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unweighted (B,) sums of the losses of each sample, and (B,) numbers of targets."""


class TokenCrossEntropy:
    """Next-token cross-entropy of a causal language model: position t predicts label t + 1.

    Logits are raised to float32 at least, as transformers' own loss does. Labels are shifted and not the logits, which
    are by far the largest tensor: a shifted or masked view of them would be a copy.
    """

    ignore_index = -100

    def outputs(self, model_output: Any) -> torch.Tensor:
        return model_output.logits

    def _labels(self, micro: MicroBatch) -> torch.Tensor:
        """(B, T): the label each position predicts."""
        return pad(micro.targets[:, 1:], (0, 1), value=self.ignore_index)

    def _losses(self, outputs_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        logits_NV = raised(outputs_BTV).flatten(0, 1)
        nll_N = cross_entropy(logits_NV, labels_BT.flatten(), reduction="none", ignore_index=self.ignore_index)
        return nll_N.view(labels_BT.shape)

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        nll_BT = self._losses(outputs, self._labels(micro))
        return (nll_BT * micro.weights.to(nll_BT.dtype)[:, None]).sum()

    def output_curvature(self, outputs: torch.Tensor, micro: MicroBatch) -> OutputCurvature:
        """u ↦ (diag p − p pᵀ) u, weighted: exact for softmax cross-entropy (Schraudolph 2002, §3)."""
        p_BTV = raised(outputs).softmax(-1)
        weights_BT = micro.weights.to(p_BTV.dtype)[:, None] * (self._labels(micro) != self.ignore_index)

        def product(u_BTV: torch.Tensor) -> torch.Tensor:
            pu_BTV = p_BTV * u_BTV.to(p_BTV.dtype)
            pu_BTV.addcmul_(p_BTV, pu_BTV.sum(-1, keepdim=True), value=-1)
            return pu_BTV.mul_(weights_BT[..., None]).to(outputs.dtype)

        return product

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        labels_BT = self._labels(micro)
        return self._losses(outputs, labels_BT).sum(-1), (labels_BT != self.ignore_index).sum(-1)


def raised(outputs: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 if they are."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


class SquaredError:
    """½‖y − f(x)‖² a sample (Gaussian likelihood with unit variance): its output Hessian is the identity."""

    def outputs(self, model_output: Any) -> torch.Tensor:
        return model_output

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        return (self.sample_values(outputs, micro)[0] * micro.weights).sum()

    def output_curvature(self, outputs: torch.Tensor, micro: MicroBatch) -> OutputCurvature:
        weights = micro.weights.to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        return lambda u: u * weights

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        residual = (outputs - micro.targets).flatten(1)
        return 0.5 * residual.square().sum(-1), torch.ones(len(residual), dtype=torch.long, device=residual.device)
