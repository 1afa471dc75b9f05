"""Losses of the baselines, as functions of samples' negative log-likelihoods nll = −log π_θ(y | x), summed over tokens.

Every function gives one forward pass's part of a step's loss: what it divides by is counted over the step's whole global
batch, so that the parts of all passes and ranks add up to the loss.

Shapes: B samples of the pass.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def descent_loss(nll_B: torch.Tensor, num_targets: float) -> torch.Tensor:
    """Σ_i nll_i / N, the token mean that training minimises: `retain`, and the retain term of the others.

    The retain loss of Maini et al. 2024 (TOFU, arXiv:2401.06121); open-unlearning's `retain_loss_type: NLL`.

    Args:
        nll_B: Retained samples.
        num_targets: Target tokens N of the step's retained samples.
    """
    return nll_B.sum() / num_targets


def ascent_loss(nll_B: torch.Tensor, num_targets: float) -> torch.Tensor:
    """−Σ_i nll_i / N: gradient ascent, `ga`.

    TOFU's "Gradient Ascent"; open-unlearning's GradAscent, which takes the mean over tokens likewise (Zhang et al. 2024,
    Eq. 1, the mean over samples of their sums). With α · `descent_loss` added it is TOFU's "Gradient Difference" (Liu et
    al. 2022, arXiv:2203.12817), `graddiff`: open-unlearning's GradDiff, γ = 1, α = 1 by default.

    Args:
        nll_B: Forgotten samples.
        num_targets: Target tokens N of the step's forgotten samples.
    """
    return -descent_loss(nll_B, num_targets)


def npo_loss(nll_B: torch.Tensor, reference_B: torch.Tensor, beta: float, num_samples: float) -> torch.Tensor:
    """−(2/β) (1/n) Σ_i log σ(−β log(π_θ(y_i|x_i) / π_ref(y_i|x_i))): negative preference optimization, `npo`.

    Zhang et al. 2024 (arXiv:2404.05868), Eq. 3; open-unlearning's NPO, which adds the retain term too. Its gradient is
    −(1/n) Σ_i W_i ∇nll_i with W_i = 2π_θ^β / (π_θ^β + π_ref^β) (Eq. 5): that of gradient ascent on the mean over samples
    of their summed nll where π_θ = π_ref, and in the limit β → 0 (Proposition 1).

    Args:
        nll_B: Forgotten samples.
        reference_B: Their nll under the model that unlearning started from.
        beta: Inverse temperature β > 0.
        num_samples: Forgotten samples n of the step.
    """
    return -2 / beta * logsigmoid(beta * (nll_B - reference_B)).sum() / num_samples
