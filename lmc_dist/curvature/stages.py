"""One stage of a model (its prefix, a block, or its suffix) as a function of parameters and hidden states, and the four
things done with it: evaluate, keep its graph, push tangents forward, pull cotangents back.

All of this is local. Dual numbers live in the level that the caller has opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as fwAD

from lmc_dist.shards.segments import Parameters

Stage = Callable[[Parameters, torch.Tensor | None], torch.Tensor]
# Tangents (or cotangents) of the parameters and of the hidden states; None is zero.
Direction = tuple[Parameters, torch.Tensor | None]


@dataclass
class Graph:
    """An evaluation that can be differentiated: its output and the leaves it came from."""

    output: torch.Tensor
    parameters: Parameters
    hidden: torch.Tensor | None

    def pull(self, cotangent: torch.Tensor, retain: bool = False) -> Direction:
        """Vector-Jacobian product: gradients of the leaves; dual where the graph and the cotangent are."""
        names = list(self.parameters)
        leaves = [self.parameters[name] for name in names]
        if self.hidden is not None:
            leaves.append(self.hidden)
        if not self.output.requires_grad:  # it depends on frozen parameters only
            return {}, None if self.hidden is None else torch.zeros_like(self.hidden)
        grads = torch.autograd.grad(self.output, leaves, cotangent, retain_graph=retain, allow_unused=True)
        found = {name: grad for name, grad in zip(names, grads, strict=False) if grad is not None}
        if self.hidden is None:
            return found, None
        return found, torch.zeros_like(self.hidden) if grads[-1] is None else grads[-1]


def make_graph(stage: Stage, parameters: Parameters, hidden: torch.Tensor | None) -> Graph:
    """Evaluates with a graph over fresh leaves."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    leaf = None if hidden is None else hidden.detach().requires_grad_()
    with torch.enable_grad():
        return Graph(stage(leaves, leaf), leaves, leaf)


def make_dual_graph(stage: Stage, parameters: Parameters, hidden: torch.Tensor | None, direction: Direction) -> Graph:
    """Evaluates dual numbers with a graph: pulling a dual cotangent back is forward over reverse."""
    tangents, hidden_tangent = direction
    leaves = {name: fwAD.make_dual(p.detach().requires_grad_(), tangents[name]) for name, p in parameters.items()}
    leaf = None
    if hidden is not None:
        assert hidden_tangent is not None
        leaf = fwAD.make_dual(hidden.detach().requires_grad_(), hidden_tangent)
    with torch.enable_grad():
        return Graph(stage(leaves, leaf), leaves, leaf)


@torch.no_grad()
def push(
    stage: Stage, parameters: Parameters, hidden: torch.Tensor | None, direction: Direction
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, its tangent) along a direction: a Jacobian-vector product, no graph."""
    tangents, hidden_tangent = direction
    duals = {name: fwAD.make_dual(p, tangents[name]) for name, p in parameters.items()}
    dual = hidden if hidden is None or hidden_tangent is None else fwAD.make_dual(hidden, hidden_tangent)
    return split(stage(duals, dual))


def split(dual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, tangent) of a dual number, without graphs; zeros where it has no tangent."""
    value, tangent = fwAD.unpack_dual(dual)
    return value.detach(), torch.zeros_like(value) if tangent is None else tangent.detach()


def tangents_of(parts: Parameters) -> Parameters:
    """The tangents of those dual numbers that have one."""
    unpacked = {name: fwAD.unpack_dual(part).tangent for name, part in parts.items()}
    return {name: tangent for name, tangent in unpacked.items() if tangent is not None}
