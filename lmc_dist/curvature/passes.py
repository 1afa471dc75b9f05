"""Products of a sharded model, one segment gathered at a time (block by block).

Forward: every segment is gathered once for θ and all tangents together, and each of the rank's micro-batches goes
through it; only the segments' inputs ("boundaries") are kept. Backward: segments are gathered again in reverse, their
forward is recomputed, cotangents go back, and the segment's part of the result is reduce-scattered. With `keep` the
graphs of the forward pass are kept instead and nothing is gathered twice.

Every rank gathers and reduces the same segments in the same order, however many micro-batches it has (none is fine).
The next segment's gather is under way while the present one computes.

Frozen parameters are gathered with their segment and stay constants.

Shapes: W ranks, L elements of a segment's slots, m vectors. Gathered segments are 1 + m times (W, L), θ first.
Places: 0 is the prefix, i + 1 is block i, n + 1 is the suffix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.curvature.stages import Direction, Graph, Stage
from lmc_dist.shards.gather import PendingGather, reduce_scatter
from lmc_dist.shards.module import ShardedModule, get_rng_state, set_rng_state
from lmc_dist.shards.segments import Call, Parameters, Segment
from lmc_dist.shards.vector import ShardedVector

T = TypeVar("T")

# Logits are a model's largest tensor: the suffix runs on as many samples at a time as keep them below this size. Small
# enough for a large cache on a CPU, large enough to fill a GPU with one sample of a real vocabulary.
OUTPUT_BYTES = 16 << 20


@dataclass
class State:
    """One micro-batch on its way through the model."""

    micro: MicroBatch
    call: Call | None = None
    boundaries: list[torch.Tensor] = field(default_factory=list)  # outputs of the prefix and of each block
    tangents: list[list[torch.Tensor]] = field(default_factory=list)  # m tangents of each boundary, while needed
    graphs: list[list[Graph]] = field(default_factory=list)  # with `keep`, of each place
    rng: list[torch.Tensor] = field(default_factory=list)  # random state before each place, under dropout
    cotangents: list[torch.Tensor] = field(default_factory=list)  # of the boundary reached on the way back
    cotangent_tangents: list[torch.Tensor] = field(default_factory=list)  # m tangents of it, for second derivatives


@dataclass
class Place:
    """The prefix or a block, for one micro-batch: the function, where it is taken, and where its results go."""

    index: int
    stage: Stage
    parameters: Parameters
    hidden: torch.Tensor | None
    tangents: Sequence[Parameters]
    segment: Segment


@dataclass
class Chunk:
    """Some samples of a micro-batch at the suffix."""

    micro: MicroBatch
    stage: Stage
    hidden: torch.Tensor | None
    directions: list[Direction]


class Stream:
    """Gathers segments in a known order, one ahead of their use."""

    def __init__(self, sources: Sequence[Callable[[], list[torch.Tensor]]], module: ShardedModule) -> None:
        self.sources, self.module = list(sources), module
        self.pending: PendingGather | None = None
        self.position = 0
        self._start()

    def _start(self) -> None:
        if self.position < len(self.sources):
            self.pending = PendingGather(self.sources[self.position](), self.module.group)
            self.position += 1

    def next(self) -> list[torch.Tensor]:
        assert self.pending is not None
        full = self.pending.wait()
        self.pending = None
        self._start()
        return full


class Passes(ABC):
    """One product, or one gradient, over this rank's micro-batches; subclasses say what goes forward and back.

    Args:
        module: The model on shards.
        loss: Its loss.
        theta: Where the product is taken.
        micro_batches: This rank's part of the batch.
        vectors: What is multiplied; none for a gradient.
        keep: Keep the graphs of the forward pass.
    """

    def __init__(
        self,
        module: ShardedModule,
        loss: Loss,
        theta: ShardedVector,
        micro_batches: Sequence[MicroBatch],
        vectors: Sequence[ShardedVector],
        keep: bool,
    ) -> None:
        self.module, self.loss, self.theta, self.vectors, self.keep = module, loss, theta, vectors, keep
        # Products are float32 or better, whatever the model was trained in.
        self.dtype = torch.promote_types(theta.flat.dtype, torch.float32)
        self.segments, self.device = module.segments, module.device
        self.n, self.m = len(self.segments.blocks), len(vectors)
        there = [micro.to(module.device) for micro in micro_batches]
        self.states = [State(x, rng=[] if x.rng_state is None else [x.rng_state]) for x in there]
        outer = PendingGather(self._local(self.segments.outer, vectors), module.group).wait()
        self.outer = self.segments.outer.unpack(outer[0])
        self.outer_tangents = [self.segments.outer.unpack(tangent) for tangent in outer[1:]]
        self.outer_total = self._zeros(self.segments.outer)
        self.outer_constants = next(self._constants([self.segments.frozen_outer]))

    @abstractmethod
    def push(self, state: State, place: Place) -> None:
        """The prefix or a block forward: appends to the state's boundaries, tangents and graphs."""

    @abstractmethod
    def turn(self, state: State, chunks: Sequence[Chunk]) -> None:
        """Suffix and loss: adds the outside's part of the results and sets the cotangents of the last boundary."""

    @abstractmethod
    def pull(self, state: State, place: Place, kept: list[Graph], total: torch.Tensor) -> None:
        """The prefix or a block backward: adds its part of the results to `total` (m, W, L), moves the cotangents."""

    @property
    @abstractmethod
    def needs_tangents_back(self) -> bool:
        """Whether the way back needs the tangents of the parameters again."""

    def _local(self, segment: Segment, vectors: Sequence[ShardedVector]) -> list[torch.Tensor]:
        """1 + number of vectors shards (L,) to gather: θ first."""
        return [segment.take(x.flat).to(self.device, self.dtype) for x in (self.theta, *vectors)]

    def _stream(self, order: Sequence[int], vectors: Sequence[ShardedVector]) -> Stream:
        blocks = self.segments.block_segments
        return Stream([lambda i=i: self._local(blocks[i], vectors) for i in order], self.module)  # type: ignore[misc]

    def _constants(self, segments: Sequence[Segment]) -> Iterator[Parameters]:
        """The frozen parameters of segments, each gathered while its predecessor is in use."""
        frozen = self.module.frozen
        if frozen is None:
            yield from ({} for _ in segments)
            return

        def local(segment: Segment) -> list[torch.Tensor]:
            return [segment.take(frozen.flat).to(self.device, self.dtype)]

        stream = Stream([lambda s=s: local(s) for s in segments], self.module)  # type: ignore[misc]
        for segment in segments:
            yield segment.unpack(stream.next()[0])

    def _zeros(self, segment: Segment) -> torch.Tensor:
        """(max(m, 1), W, L) for a segment's results."""
        shape = (max(self.m, 1), self.module.layout.world_size, segment.numel)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def restore(self, state: State, place: int) -> None:
        """Random numbers of a place of this micro-batch as training drew them."""
        if state.rng:
            set_rng_state(state.rng[place], self.device)

    def note(self, state: State, place: int) -> None:
        """After a place ran for the first time: the next one goes on from here.

        Micro-batches take turns in each segment, so each keeps its own place in its own random numbers.
        """
        if state.rng and len(state.rng) == place + 1:
            state.rng.append(get_rng_state(self.device))

    def _stage(self, state: State, place: int, constants: Parameters) -> Stage:
        """Prefix or block as a function of its trained parameters."""
        if place == 0:
            return lambda parameters, _: self.segments.prefix(constants | parameters, state.micro.inputs)

        def block(parameters: Parameters, hidden: torch.Tensor | None) -> torch.Tensor:
            assert hidden is not None and state.call is not None
            return self.segments.block(place - 1, constants | parameters, hidden, state.call)

        return block

    def products(self) -> list[ShardedVector]:
        """The gradient, or m products. Collective."""
        shape = (max(self.m, 1), self.theta.layout.flat_numel)
        results = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._forward()
        for state in self.states:
            self.turn(state, list(self._chunks(state)))
            if self.n:
                state.boundaries[-1], state.tangents[-1] = torch.empty(0), []
        if self.n:
            self._backward(results)
        self.segments.outer.add_to(results, reduce_scatter(self.outer_total, self.module.group))
        back = results.to(self.theta.flat.device)
        return [ShardedVector(self.theta.layout, row) for row in back]

    def map_outputs(self, function: Callable[[torch.Tensor, MicroBatch], T]) -> list[list[T]]:
        """`function` of the outputs of each chunk of samples of each micro-batch. Collective; the function is local."""
        self._forward()
        values = []
        for state in self.states:
            self.restore(state, len(state.rng) - 1)
            values.append(
                [function(chunk.stage(self.outer, chunk.hidden), chunk.micro) for chunk in self._chunks(state)]
            )
        return values

    def sample_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(summed losses, numbers of targets) of each sample of each micro-batch. Collective."""
        parts = self.map_outputs(self.loss.sample_values)
        return [(torch.cat([v for v, _ in found]), torch.cat([c for _, c in found])) for found in parts]

    def _suffix(self, inputs: dict[str, torch.Tensor]) -> Stage:
        """What comes after the last block, as a function; the whole model where there are no blocks."""
        constants = self.outer_constants
        return lambda parameters, hidden: self.loss.outputs(
            self.segments.suffix(constants | parameters, hidden, inputs)
        )

    def _place(
        self, state: State, index: int, constants: Parameters, parameters: Parameters, tangents: Sequence[Parameters]
    ) -> Place:
        segment = self.segments.outer if index == 0 else self.segments.block_segments[index - 1]
        hidden = state.boundaries[index - 1] if index else None
        return Place(index, self._stage(state, index, constants), parameters, hidden, tangents, segment)

    def _forward(self) -> None:
        """Boundaries of all blocks, with their tangents."""
        if not self.n:
            return
        stream = self._stream(range(self.n), self.vectors)
        frozen = self._constants(self.segments.frozen_blocks)
        for state in self.states:
            state.call = self.segments.arguments(self.outer_constants | self.outer, state.micro.inputs)
            self._push(state, 0, self.outer_constants, self.outer, self.outer_tangents)
        for i, segment in enumerate(self.segments.block_segments):
            parameters, *tangents = [segment.unpack(full) for full in stream.next()]
            constants = next(frozen)
            for state in self.states:
                self._push(state, i + 1, constants, parameters, tangents)
            del parameters, tangents  # before the next block is unpacked beside them

    def _push(
        self, state: State, index: int, constants: Parameters, parameters: Parameters, tangents: Sequence[Parameters]
    ) -> None:
        self.restore(state, index)
        self.push(state, self._place(state, index, constants, parameters, tangents))
        self.note(state, index)
        if index and self.keep:
            state.boundaries[index - 1] = torch.empty(0)  # the graphs have it
        if index and not (self.needs_tangents_back and not self.keep):
            state.tangents[index - 1] = []

    def _backward(self, results: torch.Tensor) -> None:
        """Cotangents back through the blocks; each block's result is reduce-scattered as soon as it is whole."""
        order = range(self.n - 1, -1, -1)
        stream = None if self.keep else self._stream(order, self.vectors if self.needs_tangents_back else [])
        frozen = self._constants([self.segments.frozen_blocks[i] for i in order])
        for i in order:
            segment = self.segments.block_segments[i]
            parameters, *tangents = [{}] if stream is None else [segment.unpack(full) for full in stream.next()]
            constants = {} if stream is None else next(frozen)  # graphs that were kept have theirs
            total = self._zeros(segment)
            for state in self.states:
                self._pull(state, i + 1, constants, parameters, tangents, total)
            del parameters, tangents
            segment.add_to(results, reduce_scatter(total, self.module.group))
        for state in self.states:
            self._pull(state, 0, self.outer_constants, self.outer, self.outer_tangents, self.outer_total)

    def _pull(
        self,
        state: State,
        index: int,
        constants: Parameters,
        parameters: Parameters,
        tangents: Sequence[Parameters],
        total: torch.Tensor,
    ) -> None:
        kept, state.graphs[index] = state.graphs[index], []
        self.pull(state, self._place(state, index, constants, parameters, tangents), kept, total)
        if index:
            state.boundaries[index - 1], state.tangents[index - 1] = torch.empty(0), []

    def _chunks(self, state: State) -> Iterator[Chunk]:
        """The micro-batch at the suffix, in pieces whose logits are small."""
        micro, samples = state.micro, len(state.micro.targets)
        vocabulary = getattr(getattr(self.module.module, "config", None), "vocab_size", None)
        size = samples
        if self.n and vocabulary and not state.rng:  # under dropout a micro-batch is one draw
            element = torch.finfo(self.dtype).bits // 8
            size = max(1, OUTPUT_BYTES // (micro.targets.shape[-1] * vocabulary * element))
        for start in range(0, samples, size):
            rows = slice(start, start + size)
            inputs = {
                name: x[rows] if isinstance(x, torch.Tensor) and x.dim() and len(x) == samples else x
                for name, x in micro.inputs.items()
            }
            hidden = state.boundaries[-1][rows] if self.n else None
            arriving = [t[rows] for t in state.tangents[-1]] if self.n else [None] * self.m
            yield Chunk(
                MicroBatch(inputs, micro.targets[rows], micro.weights[rows]),
                self._suffix(inputs),
                hidden,
                list(zip(self.outer_tangents, arriving, strict=True)),
            )
