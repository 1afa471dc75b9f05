"""Products of a sharded model, one segment gathered at a time (block by block).

Forward: every segment is gathered once for θ and all tangents together, and each of the rank's micro-batches goes
through it; only the segments' inputs ("boundaries") are kept. Backward: segments are gathered again in reverse, their
forward is recomputed, cotangents go back, and the segment's part of the result is reduce-scattered. With `keep` the
graphs of the forward pass are kept instead and nothing is gathered twice.

Every rank gathers and reduces the same segments in the same order, however many micro-batches it has (none is fine).
The next segment's gather is under way while the present one computes.

Shapes: W ranks, L elements of a segment's slots, m vectors. Gathered segments are 1 + m times (W, L), θ first.
Places: 0 is the prefix, i + 1 is block i, n + 1 is the suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as fwAD

from lmc_dist.curvature.kernels import Tape, dual_kernels, primal_kernels
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.curvature.stages import (
    Direction,
    Graph,
    Stage,
    make_dual_graph,
    make_graph,
    push,
    row_chunks,
    split,
    tangents_of,
)
from lmc_dist.shards.gather import PendingGather, reduce_scatter
from lmc_dist.shards.module import ShardedModule, get_rng_state, set_rng_state
from lmc_dist.shards.segments import Call, Parameters, Segment
from lmc_dist.shards.vector import ShardedVector

# Logits are a model's largest tensor: the suffix runs on as many samples at a time as keep them below this size. Small
# enough for a large cache on a CPU, large enough to fill a GPU with one sample of a real vocabulary.
OUTPUT_BYTES = 16 << 20


@dataclass
class _State:
    """One micro-batch on its way through the model."""

    micro: MicroBatch
    call: Call | None = None
    boundaries: list[torch.Tensor] = field(default_factory=list)  # outputs of the prefix and of each block
    tangents: list[list[torch.Tensor]] = field(default_factory=list)  # m tangents of each boundary, while needed
    graphs: list[list[Graph]] = field(default_factory=list)  # with `keep`, of each place
    rng: list[torch.Tensor] = field(default_factory=list)  # random state before each place, under dropout
    cotangents: list[torch.Tensor] = field(default_factory=list)  # of the boundary reached on the way back
    cotangent_tangents: list[torch.Tensor] = field(default_factory=list)  # for second derivatives


@dataclass
class _Cotangent:
    """What goes back from a place, and with second derivatives its tangent."""

    value: torch.Tensor
    tangent: torch.Tensor | None = None


class _Stream:
    """Gathers segments in a known order, one ahead of their use."""

    def __init__(self, sources: Sequence[Callable[[], list[torch.Tensor]]], module: ShardedModule) -> None:
        self.sources, self.module = list(sources), module
        self.pending: PendingGather | None = None
        self.position = 0
        self._start()

    def _start(self) -> None:
        if self.position < len(self.sources):
            self.pending = PendingGather(self.sources[self.position](), self.module.layout.group)
            self.position += 1

    def next(self) -> list[torch.Tensor]:
        assert self.pending is not None
        full = self.pending.wait()
        self.pending = None
        self._start()
        return full


class ProductEngine:
    """Gradient, Gauss-Newton and Hessian products at one θ over this rank's micro-batches.

    Args:
        module: The model on shards.
        loss: Its loss.
        theta: Where products are taken.
        micro_batches: This rank's part of the batch.
        keep: Keep the forward graphs (and with them the gathered parameters) instead of recomputing block by block.
    """

    def __init__(
        self,
        module: ShardedModule,
        loss: Loss,
        theta: ShardedVector,
        micro_batches: Sequence[MicroBatch],
        keep: bool = False,
    ) -> None:
        self.module, self.loss, self.theta = module, loss, theta
        self.micro_batches, self.keep = micro_batches, keep
        # Products are float32 or better, whatever the model was trained in.
        self.dtype = torch.promote_types(theta.flat.dtype, torch.float32)

    def run(self, vectors: Sequence[ShardedVector], second_order: bool) -> list[ShardedVector]:
        """Without vectors the gradient; else the GGN products, or with `second_order` the Hessian products. Collective."""
        # Tangents live as long as their level. Only graphs of dual numbers that are kept need one for the whole run.
        with self._prepared(), fwAD.dual_level() if self.keep and second_order else nullcontext():
            return _Run(self, vectors, second_order).products()

    @torch.no_grad()
    def sample_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(summed losses, numbers of targets) of each sample of each of this rank's micro-batches. Collective."""
        with self._prepared():
            return _Run(self, [], second_order=False).sample_values()

    @property
    def random(self) -> bool:
        """Whether dropout draws random numbers, those of training."""
        return any(micro.rng_state is not None for micro in self.micro_batches)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The module as a product needs it; the program's mode and random numbers are put back afterwards."""
        module, device = self.module.module, self.module.device
        was_training = module.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=self.random):
            module.train(self.random)
            try:
                with primal_kernels(module):
                    yield
            finally:
                module.train(was_training)


class _Run:
    """One product, or one gradient, of one engine."""

    def __init__(self, engine: ProductEngine, vectors: Sequence[ShardedVector], second_order: bool) -> None:
        self.engine, self.vectors, self.second_order, self.keep = engine, vectors, second_order, engine.keep
        self.module, self.loss, self.theta = engine.module, engine.loss, engine.theta
        self.segments, self.device = self.module.segments, self.module.device
        self.n, self.m = len(self.segments.blocks), len(vectors)
        self.states = [
            _State(micro, rng=[] if micro.rng_state is None else [micro.rng_state]) for micro in engine.micro_batches
        ]
        outer = PendingGather(self._local(self.segments.outer, vectors), self.module.layout.group).wait()
        self.outer = self.segments.outer.unpack(outer[0])
        self.outer_tangents = [self.segments.outer.unpack(tangent) for tangent in outer[1:]]
        self.outer_total = self._zeros(self.segments.outer)

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _local(self, segment: Segment, vectors: Sequence[ShardedVector]) -> list[torch.Tensor]:
        """1 + number of vectors shards (L,) to gather: θ first."""
        return [segment.take(x.flat).to(self.device, self.engine.dtype) for x in (self.theta, *vectors)]

    def _stream(self, order: Sequence[int], vectors: Sequence[ShardedVector]) -> _Stream:
        blocks = self.segments.block_segments
        return _Stream([lambda i=i: self._local(blocks[i], vectors) for i in order], self.module)  # type: ignore[misc]

    def _zeros(self, segment: Segment) -> torch.Tensor:
        """(max(m, 1), W, L) for a segment's results."""
        shape = (max(self.m, 1), self.module.layout.world_size, segment.numel)
        return torch.zeros(shape, dtype=self.engine.dtype, device=self.device)

    @contextmanager
    def _duals(self, tape: Tape | None) -> Iterator[None]:
        """For one pass of dual numbers, whose tangents are freed at its end unless the run keeps their graphs."""
        level = nullcontext() if self.keep and self.second_order else fwAD.dual_level()
        with level, dual_kernels(self.module.module, tape, self.second_order):
            yield

    def _restore(self, state: _State, place: int) -> None:
        """Random numbers of a place of this micro-batch as training drew them."""
        if state.rng:
            set_rng_state(state.rng[place], self.device)

    def _note(self, state: _State, place: int) -> None:
        """After a place ran for the first time: the next one goes on from here.

        Micro-batches take turns in each segment, so each keeps its own place in its own random numbers.
        """
        if state.rng and len(state.rng) == place + 1:
            state.rng.append(get_rng_state(self.device))

    def _stage(self, state: _State, place: int) -> Stage:
        """Prefix or block as a function."""
        if place == 0:
            return lambda parameters, _: self.segments.prefix(parameters, state.micro.inputs)

        def block(parameters: Parameters, hidden: torch.Tensor | None) -> torch.Tensor:
            assert hidden is not None and state.call is not None
            return self.segments.block(place - 1, parameters, hidden, state.call)

        return block

    # --- the passes ------------------------------------------------------------------------------------------------

    def products(self) -> list[ShardedVector]:
        shape = (max(self.m, 1), self.theta.layout.flat_numel)
        results = torch.zeros(shape, dtype=self.engine.dtype, device=self.device)
        self._forward()
        for state in self.states:
            self._turn(state)
        if self.n:
            self._backward(results)
        self.segments.outer.add_to(results, reduce_scatter(self.outer_total, self.module.layout.group))
        back = results.to(self.theta.flat.device)
        return [ShardedVector(self.theta.layout, row) for row in back]

    def sample_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.keep = False
        self._forward()
        values = []
        for state in self.states:
            self._restore(state, len(state.rng) - 1)
            parts = []
            for micro, hidden, _ in self._chunks(state):
                outputs = self.loss.outputs(self.segments.suffix(self.outer, hidden, micro.inputs))
                parts.append(self.loss.sample_values(outputs, micro))
            values.append((torch.cat([v for v, _ in parts]), torch.cat([c for _, c in parts])))
        return values

    def _forward(self) -> None:
        """Boundaries of all blocks, with their tangents."""
        if not self.n:
            return
        stream = self._stream(range(self.n), self.vectors)
        for state in self.states:
            state.call = self.segments.arguments(self.outer, state.micro.inputs)
            self._push(state, 0, self.outer, self.outer_tangents)
        for i, segment in enumerate(self.segments.block_segments):
            gathered = stream.next()
            parameters, *tangents = [segment.unpack(full) for full in gathered]
            for state in self.states:
                self._push(state, i + 1, parameters, tangents)

    def _push(self, state: _State, place: int, parameters: Parameters, tangents: Sequence[Parameters]) -> None:
        """One micro-batch through the prefix or a block, with all tangents."""
        stage = self._stage(state, place)
        hidden = state.boundaries[place - 1] if place else None
        arriving = state.tangents[place - 1] if place and self.m else [None] * self.m
        directions: list[Direction] = list(zip(tangents, arriving, strict=True))
        tape = Tape() if self.m > 1 or (self.m and self.keep and not self.second_order) else None
        module, graphs, leaving = self.module.module, [], []
        self._restore(state, place)
        if self.keep and not self.second_order:
            with primal_kernels(module, tape, written_out=bool(state.rng)):
                graphs.append(make_graph(stage, parameters, hidden))
            output = graphs[0].output.detach()
        elif not self.m:
            with torch.no_grad(), primal_kernels(module, written_out=bool(state.rng)):
                output = stage(parameters, hidden)
        for k, direction in enumerate(directions):
            self._restore(state, place)
            if tape:
                tape.rewind()
            with self._duals(tape):
                if self.keep and self.second_order:
                    graphs.append(make_dual_graph(stage, parameters, hidden, direction))
                    value, tangent = split(graphs[-1].output)
                else:
                    value, tangent = push(stage, parameters, hidden, direction)
            leaving.append(tangent)
            if k == 0 and not (self.keep and not self.second_order):
                output = value
        self._note(state, place)
        state.graphs.append(graphs)
        state.boundaries.append(output)
        state.tangents.append(leaving)
        if place and self.m and (self.keep or not self.second_order):
            state.tangents[place - 1] = []  # only the Hessian looks at it again, to recompute the block
        if place and self.keep:
            state.boundaries[place - 1] = torch.empty(0)  # the graphs have it

    def _chunks(self, state: _State) -> Iterator[tuple[MicroBatch, torch.Tensor | None, list[torch.Tensor]]]:
        """The micro-batch in pieces whose logits are small: (piece, its last boundary, the tangents of that)."""
        micro, samples = state.micro, len(state.micro.targets)
        vocabulary = getattr(getattr(self.module.module, "config", None), "vocab_size", None)
        size = samples
        if self.n and vocabulary and not state.rng:  # under dropout a micro-batch is one draw
            element = torch.finfo(self.engine.dtype).bits // 8
            size = max(1, OUTPUT_BYTES // (micro.targets.shape[-1] * vocabulary * element))
        for rows in row_chunks(samples, size):
            inputs = {
                name: x[rows] if isinstance(x, torch.Tensor) and x.dim() and len(x) == samples else x
                for name, x in micro.inputs.items()
            }
            part = MicroBatch(inputs, micro.targets[rows], micro.weights[rows])
            if self.n:
                yield part, state.boundaries[-1][rows], [t[rows] for t in state.tangents[-1]]
            else:
                yield part, None, []

    def _turn(self, state: _State) -> None:
        """Suffix and loss: from the last boundary's tangents to its cotangents; adds to the outside's result."""
        pieces: list[list[_Cotangent]] = []
        for micro, hidden, arriving in self._chunks(state):

            def stage(parameters: Parameters, h: torch.Tensor | None, micro: MicroBatch = micro) -> torch.Tensor:
                return self.loss.outputs(self.segments.suffix(parameters, h, micro.inputs))

            last: Sequence[torch.Tensor | None] = arriving or [None] * self.m
            directions = list(zip(self.outer_tangents, last, strict=True))
            turn = self._turn_second_order if self.second_order else self._turn_first_order
            pieces.append(turn(state, stage, micro, hidden, directions))
        if not self.n:
            return
        joined = [torch.cat([piece[k].value for piece in pieces]) for k in range(len(pieces[0]))]
        state.cotangents = joined[:1] if self.second_order else joined
        if self.second_order:
            state.cotangent_tangents = [
                torch.cat([piece[k].tangent for piece in pieces])  # type: ignore[misc]
                for k in range(self.m)
            ]
        state.boundaries[-1], state.tangents[-1] = torch.empty(0), []

    def _turn_first_order(
        self,
        state: _State,
        stage: Stage,
        micro: MicroBatch,
        hidden: torch.Tensor | None,
        directions: Sequence[Direction],
    ) -> list[_Cotangent]:
        """Gradient, or Jᵀ H_ℓ J of each direction, of the suffix; one graph serves them all."""
        module, place, tape = self.module.module, len(state.boundaries), Tape() if self.m else None
        self._restore(state, place)
        with primal_kernels(module, tape, written_out=bool(state.rng)):
            graph = make_graph(stage, self.outer, hidden)
        if not self.m:
            with torch.enable_grad():
                output = graph.output.detach().requires_grad_()
                (cotangent,) = torch.autograd.grad(self.loss.value(output, micro), output)
            return [self._collect(graph.pull(cotangent), 0)]
        curvature = self.loss.output_curvature(graph.output.detach(), micro)
        back = []
        for k, direction in enumerate(directions):
            self._restore(state, place)
            assert tape is not None
            tape.rewind()
            with self._duals(tape):
                _, tangent = push(stage, self.outer, hidden, direction)
            back.append(self._collect(graph.pull(curvature(tangent), retain=k < self.m - 1), k))
        return back

    def _turn_second_order(
        self,
        state: _State,
        stage: Stage,
        micro: MicroBatch,
        hidden: torch.Tensor | None,
        directions: Sequence[Direction],
    ) -> list[_Cotangent]:
        """The suffix's gradient, differentiated along each direction; the loss's own part is known in closed form."""
        place, tape = len(state.boundaries), Tape() if self.m > 1 else None
        back: list[_Cotangent] = []
        for k, direction in enumerate(directions):
            self._restore(state, place)
            if tape:
                tape.rewind()
            with self._duals(tape):
                graph = make_dual_graph(stage, self.outer, hidden, direction)
                output, tangent = split(graph.output)
                if k == 0:
                    leaf = output.requires_grad_()
                    with torch.enable_grad():
                        (cotangent,) = torch.autograd.grad(self.loss.value(leaf, micro), leaf)
                    curvature = self.loss.output_curvature(leaf.detach(), micro)
                back.append(self._collect(graph.pull(fwAD.make_dual(cotangent, curvature(tangent))), k))
        return back

    def _collect(self, pulled: Direction, k: int) -> _Cotangent:
        """Adds the outside's part of a result, and returns the cotangent that goes on."""
        parts, back = pulled
        self.segments.outer.accumulate(self.outer_total[k], tangents_of(parts) if self.second_order else parts)
        if back is None:
            return _Cotangent(torch.empty(0))
        return _Cotangent(*split(back)) if self.second_order else _Cotangent(back)

    def _backward(self, results: torch.Tensor) -> None:
        """Cotangents back through the blocks; each block's result is reduce-scattered as soon as it is whole."""
        order = range(self.n - 1, -1, -1)
        stream = None if self.keep else self._stream(order, self.vectors if self.second_order else [])
        for i in order:
            segment = self.segments.block_segments[i]
            parameters, *tangents = [{}] if stream is None else [segment.unpack(full) for full in stream.next()]
            total = self._zeros(segment)
            for state in self.states:
                self._pull(state, i + 1, parameters, tangents, segment, total)
            segment.add_to(results, reduce_scatter(total, self.module.layout.group))
        for state in self.states:
            self._pull(state, 0, self.outer, self.outer_tangents, self.segments.outer, self.outer_total)

    def _pull(
        self,
        state: _State,
        place: int,
        parameters: Parameters,
        tangents: Sequence[Parameters],
        segment: Segment,
        total: torch.Tensor,
    ) -> None:
        """One micro-batch's cotangents back through a block or the prefix."""
        stage, hidden = self._stage(state, place), state.boundaries[place - 1] if place else None
        kept, state.graphs[place] = state.graphs[place], []
        if self.second_order:
            self._pull_second_order(state, place, stage, parameters, hidden, tangents, segment, total, kept)
            return
        if not kept:
            self._restore(state, place)
            # Attention's dropout must be drawn by the kernel that drew it going forward.
            with primal_kernels(self.module.module, written_out=bool(state.rng)):
                kept = [make_graph(stage, parameters, hidden)]
        count = len(state.cotangents)
        for k, cotangent in enumerate(state.cotangents):
            parts, back = kept[0].pull(cotangent, retain=k < count - 1)
            segment.accumulate(total[k], parts)
            if back is not None:
                state.cotangents[k] = back

    def _pull_second_order(
        self,
        state: _State,
        place: int,
        stage: Stage,
        parameters: Parameters,
        hidden: torch.Tensor | None,
        tangents: Sequence[Parameters],
        segment: Segment,
        total: torch.Tensor,
        kept: list[Graph],
    ) -> None:
        """Forward over reverse: the vector-Jacobian product differentiated along each vector."""
        arriving = state.tangents[place - 1] if place and not kept else [None] * self.m
        tape, primal = Tape() if self.m > 1 else None, state.cotangents[0]
        for k in range(self.m):
            self._restore(state, place)
            if tape:
                tape.rewind()
            with self._duals(tape):
                graph = kept[k] if kept else make_dual_graph(stage, parameters, hidden, (tangents[k], arriving[k]))
                parts, back = graph.pull(fwAD.make_dual(primal, state.cotangent_tangents[k]))
                segment.accumulate(total[k], tangents_of(parts))
                if back is not None:
                    state.cotangents[0], state.cotangent_tangents[k] = split(back)
        if place and not kept:
            state.tangents[place - 1] = []
