"""Gradients and Gauss-Newton products: one graph of the primal serves all vectors on the way back.

    G v = Jᵀ (H_ℓ (J v))        (Schraudolph 2002)

J v is pushed forward beside the primal, H_ℓ is the loss's own, and what comes back is one ordinary reverse pass a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwAD

from lmc_dist.curvature.kernels import Tape, dual_kernels, primal_kernels
from lmc_dist.curvature.passes import Chunk, Passes, Place, State
from lmc_dist.curvature.stages import Direction, Graph, Stage, make_graph, push
from lmc_dist.shards.segments import Parameters


class FirstOrder(Passes):
    """The gradient of Σ_i weights_i ℓ_i, or its Gauss-Newton matrix times m vectors."""

    needs_tangents_back = False

    def _graph(
        self, state: State, stage: Stage, parameters: Parameters, hidden: torch.Tensor | None, tape: Tape | None
    ) -> Graph:
        # Attention's dropout must be drawn by the kernel that draws it beside the tangents.
        with primal_kernels(self.module.module, tape, written_out=bool(state.rng)):
            return make_graph(stage, parameters, hidden)

    def _tangent(
        self,
        state: State,
        index: int,
        at: tuple[Stage, Parameters, torch.Tensor | None],
        direction: Direction,
        tape: Tape | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, tangent); the level of the dual numbers ends here, and what they held is freed."""
        self.restore(state, index)
        if tape:
            tape.rewind()
        with fwAD.dual_level(), dual_kernels(self.module.module, tape):
            return push(*at, direction)

    def push(self, state: State, place: Place) -> None:
        at, output = (place.stage, place.parameters, place.hidden), None
        tape = Tape() if self.m > 1 or (self.m and self.keep) else None
        graphs = [self._graph(state, *at, tape)] if self.keep else []
        if graphs:
            output = graphs[0].output.detach()
        elif not self.m:
            with torch.no_grad(), primal_kernels(self.module.module, written_out=bool(state.rng)):
                output = place.stage(place.parameters, place.hidden)
        arriving = state.tangents[place.index - 1] if place.index and self.m else [None] * self.m
        leaving = []
        for direction in zip(place.tangents, arriving, strict=True):
            value, tangent = self._tangent(state, place.index, at, direction, tape)
            output = value if output is None else output
            leaving.append(tangent)
        assert output is not None
        state.graphs.append(graphs)
        state.boundaries.append(output)
        state.tangents.append(leaving)

    def turn(self, state: State, chunks: Sequence[Chunk]) -> None:
        pieces = [self._turn_chunk(state, chunk) for chunk in chunks]
        if self.n:
            state.cotangents = [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _turn_chunk(self, state: State, chunk: Chunk) -> list[torch.Tensor]:
        """Cotangents of the chunk's hidden states, one a vector."""
        index, at, tape = len(state.boundaries), (chunk.stage, self.outer, chunk.hidden), Tape() if self.m else None
        self.restore(state, index)
        graph = self._graph(state, *at, tape)
        output = graph.output.detach()
        if not self.m:
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(self.loss.value(output.requires_grad_(), chunk.micro), output)
            return [self._pull_into(self.outer_total[0], graph, slope, False)]
        curvature, back = self.loss.output_curvature(output, chunk.micro), []
        for k, direction in enumerate(chunk.directions):
            _, tangent = self._tangent(state, index, at, direction, tape)
            back.append(self._pull_into(self.outer_total[k], graph, curvature(tangent), k < self.m - 1))
        return back

    def _pull_into(self, total: torch.Tensor, graph: Graph, cotangent: torch.Tensor, retain: bool) -> torch.Tensor:
        parts, back = graph.pull(cotangent, retain)
        self.segments.outer.accumulate(total, parts)
        return torch.empty(0) if back is None else back

    def pull(self, state: State, place: Place, kept: list[Graph], total: torch.Tensor) -> None:
        if not kept:
            self.restore(state, place.index)
            kept = [self._graph(state, place.stage, place.parameters, place.hidden, None)]
        last = len(state.cotangents) - 1
        for k, cotangent in enumerate(state.cotangents):
            parts, back = kept[0].pull(cotangent, retain=k < last)
            place.segment.accumulate(total[k], parts)
            if back is not None:
                state.cotangents[k] = back
