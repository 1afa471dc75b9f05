"""Losses as the curvature engine sees them: a weighted sum of per-sample losses and its derivatives at the outputs.

    L = Σ_i weights_i Σ_t nll_{i,t}

so that every batch loss, every counterfactual and every source (docs/method.md §2, §3) is a choice of weights.

Shapes: B samples, T positions, V classes, N targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy


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


class Loss(Protocol):
    """A loss with a known Hessian at the model's outputs."""

    def outputs(self, model_output: Any) -> torch.Tensor:
        """The tensor the loss is a function of."""

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """Scalar Σ_i weights_i Σ_t nll_{i,t}, differentiable."""

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """H_ℓ · tangent with H_ℓ the Hessian of `value` at `outputs`; shape of `outputs`."""

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unweighted (B,) sums of the losses of each sample, and (B,) numbers of targets."""


class TokenCrossEntropy:
    """Next-token cross-entropy of a causal language model: position t predicts label t + 1.

    Logits are raised to float32 at least, as transformers' own loss does.
    """

    ignore_index = -100

    def outputs(self, model_output: Any) -> torch.Tensor:
        return model_output.logits

    def _rows(self, outputs_BTV: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = micro.targets[:, 1:]
        mask_BT = labels != self.ignore_index
        logits_NV = outputs_BTV[:, :-1][mask_BT]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        return logits_NV, labels[mask_BT], mask_BT

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        logits_NV, labels_N, mask_BT = self._rows(outputs, micro)
        weights_N = micro.weights.to(logits_NV.dtype)[:, None].expand(mask_BT.shape)[mask_BT]
        return (cross_entropy(logits_NV, labels_N, reduction="none") * weights_N).sum()

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """(diag p − p pᵀ) u, weighted: exact for softmax cross-entropy (Schraudolph 2002, §3)."""
        logits_NV, _, mask_BT = self._rows(outputs, micro)
        u_NV = tangent[:, :-1][mask_BT].to(logits_NV.dtype)
        weights_N1 = micro.weights.to(logits_NV.dtype)[:, None].expand(mask_BT.shape)[mask_BT][:, None]
        p_NV = logits_NV.softmax(-1)
        pu_NV = p_NV * u_NV
        product = torch.zeros_like(outputs)
        product[:, :-1][mask_BT] = (weights_N1 * (pu_NV - p_NV * pu_NV.sum(-1, keepdim=True))).to(outputs.dtype)
        return product

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV, labels_N, mask_BT = self._rows(outputs, micro)
        nll_BT = logits_NV.new_zeros(mask_BT.shape)
        nll_BT[mask_BT] = cross_entropy(logits_NV, labels_N, reduction="none")
        return nll_BT.sum(-1), mask_BT.sum(-1)


class SquaredError:
    """½‖y − f(x)‖² a sample (Gaussian likelihood with unit variance): its output Hessian is the identity."""

    def outputs(self, model_output: Any) -> torch.Tensor:
        return model_output

    def value(self, outputs: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        return (self.sample_values(outputs, micro)[0] * micro.weights).sum()

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        return tangent * micro.weights.to(tangent.dtype).view(-1, *[1] * (tangent.dim() - 1))

    def sample_values(self, outputs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        residual = (outputs - micro.targets).flatten(1)
        return 0.5 * residual.square().sum(-1), torch.ones(len(residual), dtype=torch.long, device=residual.device)
