"""Hessian products, forward over reverse (Pearlmutter 1994): each stage's vector-Jacobian product is differentiated along
(v, tangent of its input, tangent of its cotangent).

No graph of a graph is built, and memory stays that of one block unless graphs are kept. The loss needs no second
derivative: its gradient at the outputs moves by H_ℓ J v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as fwAD

from lmc_dist.curvature.kernels import Tape, dual_kernels
from lmc_dist.curvature.passes import Chunk, Passes, Place, State
from lmc_dist.curvature.stages import Graph, make_dual_graph, push, split, tangents_of
from lmc_dist.shards.segments import Parameters
from lmc_dist.shards.vector import ShardedVector


class SecondOrder(Passes):
    """The Hessian of Σ_i weights_i ℓ_i times m vectors."""

    needs_tangents_back = True

    def products(self) -> list[ShardedVector]:
        # Tangents live as long as their level. Only graphs of dual numbers that are kept need one for the whole run.
        with fwAD.dual_level() if self.keep else nullcontext():
            return super().products()

    @contextmanager
    def _duals(self, state: State, index: int, parameters: Parameters, tape: Tape | None) -> Iterator[None]:
        """One pass of dual numbers through a place."""
        self.restore(state, index)
        if tape:
            tape.rewind()
        with (
            nullcontext() if self.keep else fwAD.dual_level(),
            dual_kernels(self.module.module, tape, parameters.values()),
        ):
            yield

    def push(self, state: State, place: Place) -> None:
        at, tape = (place.stage, place.parameters, place.hidden), Tape() if self.m > 1 else None
        arriving = state.tangents[place.index - 1] if place.index else [None] * self.m
        graphs, leaving, output = [], [], None
        for direction in zip(place.tangents, arriving, strict=True):
            with self._duals(state, place.index, place.parameters, tape):
                if self.keep:
                    graphs.append(make_dual_graph(*at, direction))
                    value, tangent = split(graphs[-1].output)
                else:
                    value, tangent = push(*at, direction)
            output = value if output is None else output
            leaving.append(tangent)
        assert output is not None
        state.graphs.append(graphs)
        state.boundaries.append(output)
        state.tangents.append(leaving)

    def turn(self, state: State, chunks: Sequence[Chunk]) -> None:
        pieces = [self._turn_chunk(state, chunk) for chunk in chunks]
        if self.n:
            state.cotangents = [torch.cat([values[0] for values, _ in pieces])]
            state.cotangent_tangents = [torch.cat(parts) for parts in zip(*(t for _, t in pieces), strict=True)]

    def _turn_chunk(self, state: State, chunk: Chunk) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Cotangents of the chunk's hidden states, the same for every vector, and their tangents."""
        index, tape = len(state.boundaries), Tape() if self.m > 1 else None
        values: list[torch.Tensor] = []
        tangents: list[torch.Tensor] = []
        for k, direction in enumerate(chunk.directions):
            with self._duals(state, index, self.outer, tape):
                graph = make_dual_graph(chunk.stage, self.outer, chunk.hidden, direction)
                output, moved = split(graph.output)
                if k == 0:
                    curvature = self.loss.output_curvature(output, chunk.micro)
                    with torch.enable_grad():
                        (slope,) = torch.autograd.grad(self.loss.value(output.requires_grad_(), chunk.micro), output)
                parts, back = graph.pull(fwAD.make_dual(slope, curvature(moved)))
                self.segments.outer.accumulate(self.outer_total[k], tangents_of(parts))
                value, tangent = (torch.empty(0), torch.empty(0)) if back is None else split(back)
            values.append(value)
            tangents.append(tangent)
        return values, tangents

    def pull(self, state: State, place: Place, kept: list[Graph], total: torch.Tensor) -> None:
        arriving = state.tangents[place.index - 1] if place.index and not kept else [None] * self.m
        tape, primal = Tape() if self.m > 1 else None, state.cotangents[0]
        for k in range(self.m):
            with self._duals(state, place.index, place.parameters, tape):
                if kept:
                    graph = kept.pop(0)
                else:
                    direction = (place.tangents[k], arriving[k])
                    graph = make_dual_graph(place.stage, place.parameters, place.hidden, direction)
                parts, back = graph.pull(fwAD.make_dual(primal, state.cotangent_tangents[k]))
                place.segment.accumulate(total[k], tangents_of(parts))
                if back is not None:
                    state.cotangents[0], state.cotangent_tangents[k] = split(back)
