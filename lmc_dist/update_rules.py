"""Pure update rules Φ on flat shards, and their tangents.

A rule maps (θ, g) to the next θ, elementwise. Its tangent is derived by `torch.func.jvp`, never written by hand, so
that the propagated correction is the derivative of the rule that trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.func import jvp

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector


def sgd(theta: torch.Tensor, grad: torch.Tensor, lr: float, weight_decay: float) -> torch.Tensor:
    """θ − η (g + w θ): torch.optim.SGD without momentum."""
    return theta - lr * (grad + weight_decay * theta)


def check_supported(optimizer: Mapping[str, Any]) -> None:
    """Refuses optimizers whose update rule is not known here.

    Raises:
        LmcError: Anything but plain SGD.
    """
    name = optimizer.get("class")
    if name != "SGD":
        raise LmcError(
            f"the log was trained with {name}; corrections are available for plain SGD only so far: use replay_head=all"
        )
    for group in optimizer["groups"]:
        for key in ("momentum", "dampening", "nesterov", "maximize"):
            if group.get(key):
                raise LmcError(
                    f"the log was trained with SGD and {key}={group[key]}; corrections are available for plain SGD only "
                    "so far: use replay_head=all"
                )


class SGDTangent:
    """The tangent map of one step of the logged run: (v, dg) ↦ JVP of Φ_s.

    Args:
        layout: Layout of the vectors.
        parameters: The manifest's parameter table (each row with its optimizer `group`).
        groups: The manifest's optimizer groups.
    """

    def __init__(
        self, layout: ShardLayout, parameters: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        group_of = {row["name"]: int(row.get("group", 0)) for row in parameters}
        self.groups = groups
        self.runs: list[tuple[int, int, int]] = []  # (start, stop, group) of the flat buffer, neighbours merged
        for slot in layout:
            group, stop = group_of[slot.spec.name], slot.offset + slot.padded
            if self.runs and self.runs[-1][2] == group:
                self.runs[-1] = (self.runs[-1][0], stop, group)
            else:
                self.runs.append((slot.offset, stop, group))

    def gradient(self, theta: ShardedVector, update: ShardedVector, lrs: Sequence[float]) -> ShardedVector:
        """The gradient that the step used, from its update: g = −u/η − wθ. Local.

        Raises:
            LmcError: A learning rate of 0, which leaves no trace of the gradient.
        """
        out = torch.zeros_like(update.flat)
        for start, stop, group in self.runs:
            lr, weight_decay = lrs[group], float(self.groups[group].get("weight_decay", 0.0))
            part = slice(start, stop)
            if lr == 0:
                raise LmcError("a step with learning rate 0 leaves no trace of its gradient: fisher is not available")
            out[part] = update.flat[part] / -lr - weight_decay * theta.flat[part]
        return update.like(out)

    def __call__(
        self, theta: ShardedVector, v: ShardedVector, dg: ShardedVector, lrs: Sequence[float]
    ) -> ShardedVector:
        """v_{s+1} from v_s and dg_s at θ_s with the step's learning rates. Local."""
        out = torch.empty_like(v.flat)
        for start, stop, group in self.runs:
            lr, weight_decay = lrs[group], float(self.groups[group].get("weight_decay", 0.0))
            part = slice(start, stop)
            # SGD is linear in g, so its tangent does not depend on the gradient's value and zero stands for it.
            primal = theta.flat[part].to(v.flat.dtype)
            out[part] = jvp(
                lambda t, g, lr=lr, wd=weight_decay: sgd(t, g, lr, wd),
                (primal, torch.zeros_like(primal)),
                (v.flat[part], dg.flat[part]),
            )[1]
        return v.like(out)
