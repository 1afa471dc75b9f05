"""Products of a sharded model, one segment gathered at a time (block by block).

Forward: every segment is gathered once for θ and all tangents together, and each of the rank's micro-batches goes
through it; only the segments' inputs ("boundaries") are kept. Backward: segments are gathered again in reverse, their
forward is recomputed, cotangents go back, and the segment's part of the result is reduce-scattered. With `keep` the
graphs of the forward pass are kept instead and nothing is gathered twice.

Every rank gathers and reduces the same segments in the same order, however many micro-batches it has (none is fine).
The next segment's gather is under way while the present one computes.

Shapes: W ranks, L elements of a segment's slots, m vectors. `full` is (W, L), tangents are (m, W, L).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch.func import jvp, vmap

from lmc_dist.curvature.kernels import differentiable_kernels
from lmc_dist.curvature.loss import Loss, MicroBatch
from lmc_dist.shards.gather import PendingGather, reduce_scatter
from lmc_dist.shards.module import ShardedModule, get_rng_state, plain_linear, set_rng_state
from lmc_dist.shards.segments import Call, Segment
from lmc_dist.shards.vector import ShardedVector


@dataclass
class _State:
    """One micro-batch on its way through the model."""

    micro: MicroBatch
    call: Call | None = None
    boundaries: list[torch.Tensor] = field(default_factory=list)  # input of each block, then of the suffix
    tangents: list[torch.Tensor] = field(default_factory=list)  # (m, ...) beside each boundary, where needed
    graphs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # with `keep`: (output, input, full)
    rng: list[torch.Tensor] = field(default_factory=list)  # random state before each segment, under dropout
    cotangents: torch.Tensor | None = None  # (m, ...) of the boundary reached on the way back
    cotangent_tangents: torch.Tensor | None = None  # the same along each vector, for second derivatives


class _Stream:
    """Gathers segments in a known order, one ahead of their use."""

    def __init__(self, sources: Sequence[Callable[[], torch.Tensor]], module: ShardedModule) -> None:
        self.sources, self.module = list(sources), module
        self.pending: PendingGather | None = None
        self.position = 0
        self._start()

    def _start(self) -> None:
        if self.position < len(self.sources):
            self.pending = PendingGather(self.sources[self.position](), self.module.layout.group)
            self.position += 1

    def next(self) -> torch.Tensor:
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
        self.segments = module.segments
        self.device = module.device
        # Products are float32 or better, whatever the model was trained in.
        self.dtype = torch.promote_types(theta.flat.dtype, torch.float32)

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _local(self, segment: Segment, vectors: Sequence[ShardedVector]) -> torch.Tensor:
        """(1 + number of vectors, L) to gather: θ first."""
        parts = [segment.take(x.flat).to(self.device, self.dtype) for x in (self.theta, *vectors)]
        return torch.stack(parts)

    def _stream(self, order: Sequence[int], vectors: Sequence[ShardedVector]) -> _Stream:
        blocks = self.segments.block_segments
        return _Stream([lambda i=i: self._local(blocks[i], vectors) for i in order], self.module)  # type: ignore[misc]

    def _restore(self, state: _State, place: int) -> None:
        """Random numbers of segment `place` of this micro-batch as training drew them."""
        if state.rng:
            set_rng_state(state.rng[place], self.device)

    def _note(self, state: _State, place: int) -> None:
        """After segment `place` ran for the first time: the next segment goes on from here.

        Micro-batches take turns in each segment, so each keeps its own place in its own random numbers.
        """
        if state.rng and len(state.rng) == place + 1:
            state.rng.append(get_rng_state(self.device))

    def _jvp(
        self,
        function: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        full: torch.Tensor,
        hidden: torch.Tensor | None,
        full_tangents: torch.Tensor,
        hidden_tangents: torch.Tensor | None,
        restore: Callable[[], Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, (m, ...) tangents) of `function(full, hidden)`; keeps the primal's graph where leaves require grad."""
        m = full_tangents.shape[0]
        if m > 1 and not self._random:
            # All tangents in one vectorised pass; where the primal needs a graph, it is run once more for it.
            primals = (full.detach(),) if hidden is None else (full.detach(), hidden.detach())
            tangents = (full_tangents,) if hidden is None else (full_tangents, hidden_tangents)

            def call(*args: torch.Tensor) -> torch.Tensor:
                return function(args[0], args[1] if len(args) > 1 else None)

            def with_primal(*directions: torch.Tensor) -> Any:
                return jvp(call, primals, directions)

            with torch.no_grad():
                out_dims: Any = (None, 0)  # the primal is not batched
                output, moved = vmap(with_primal, out_dims=out_dims)(*tangents)
            return function(full, hidden) if full.requires_grad else output, moved
        outputs = []
        for k in range(m):
            restore()
            with fwAD.dual_level():
                dual = fwAD.make_dual(full, full_tangents[k])
                dual_hidden = hidden
                if hidden is not None and hidden_tangents is not None:
                    dual_hidden = fwAD.make_dual(hidden, hidden_tangents[k])
                output, tangent = fwAD.unpack_dual(function(dual, dual_hidden))
                outputs.append((output, torch.zeros_like(output) if tangent is None else tangent.detach()))
        return outputs[0][0], torch.stack([tangent for _, tangent in outputs])

    @property
    def _random(self) -> bool:
        return any(micro.rng_state is not None for micro in self.micro_batches)

    # --- the passes ------------------------------------------------------------------------------------------------

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The module as a product needs it; the program's mode and random numbers are put back afterwards."""
        module, devices = self.module.module, [self.device] if self.device.type == "cuda" else []
        was_training = module.training
        with torch.random.fork_rng(devices=devices, enabled=self._random), plain_linear():
            module.train(self._random)
            try:
                yield
            finally:
                module.train(was_training)

    def run(self, vectors: Sequence[ShardedVector], second_order: bool) -> list[ShardedVector]:
        """Without vectors the gradient; else the GGN products, or with `second_order` the Hessian products. Collective."""
        with self._prepared():
            return self._run(vectors, second_order)

    @torch.no_grad()
    def sample_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(summed losses, numbers of targets) of each sample of each of this rank's micro-batches. Collective."""
        with self._prepared():
            outer = PendingGather(self._local(self.segments.outer, []), self.module.layout.group).wait()
            states = self._states()
            self._forward(states, outer[0], outer[1:], [], second_order=False)
            values = []
            for state in states:
                self._restore(state, len(state.rng) - 1)
                hidden = state.boundaries[-1] if state.boundaries else None
                out = self.loss.outputs(self.segments.suffix(outer[0], hidden, state.micro.inputs))
                values.append(self.loss.sample_values(out, state.micro))
            return values

    def _states(self) -> list[_State]:
        return [_State(micro, rng=[] if micro.rng_state is None else [micro.rng_state]) for micro in self.micro_batches]

    def _run(self, vectors: Sequence[ShardedVector], second_order: bool) -> list[ShardedVector]:
        n, m = len(self.segments.blocks), len(vectors)
        results = torch.zeros(max(m, 1), self.theta.layout.flat_numel, dtype=self.dtype, device=self.device)
        outer = PendingGather(self._local(self.segments.outer, vectors), self.module.layout.group).wait()
        outer_full, outer_tangents = outer[0].detach(), outer[1:]
        outer_total = torch.zeros(max(m, 1), *outer_full.shape, dtype=self.dtype, device=self.device)
        states = self._states()
        self._forward(states, outer_full, outer_tangents, vectors, second_order)
        for state in states:
            self._turn(state, outer_full, outer_tangents, outer_total, second_order)
        if n:
            self._backward(states, vectors, results, second_order)
            for state in states:
                self._finish(state, outer_full, outer_tangents, outer_total, second_order)
        self.segments.outer.add_to(results, reduce_scatter(outer_total, self.module.layout.group))
        back = results.to(self.theta.flat.device)
        return [ShardedVector(self.theta.layout, row) for row in back]

    def _forward(
        self,
        states: list[_State],
        outer: torch.Tensor,
        outer_tangents: torch.Tensor,
        vectors: Sequence[ShardedVector],
        second_order: bool,
    ) -> None:
        """Boundaries of all blocks, with tangents."""
        n, m = len(self.segments.blocks), len(vectors)
        if not n:
            return
        stream = self._stream(range(n), vectors)
        kernels = differentiable_kernels(self.module.module) if m else nullcontext()
        with kernels, torch.no_grad():
            for state in states:
                state.call = self.segments.arguments(outer, state.micro.inputs)
                self._restore(state, 0)

                def prefix(full: torch.Tensor, _: Any, state: _State = state) -> torch.Tensor:
                    return self.segments.prefix(full, state.micro.inputs)

                if m:
                    restore = lambda state=state: self._restore(state, 0)  # noqa: E731
                    hidden, tangent = self._jvp(prefix, outer, None, outer_tangents, None, restore)
                    state.tangents.append(tangent)
                else:
                    hidden = prefix(outer, None)
                self._note(state, 0)
                state.boundaries.append(hidden.detach())
        for i in range(n):
            gathered = stream.next()
            full, full_tangents = gathered[0], gathered[1:]
            for state in states:
                self._forward_block(i, state, full, full_tangents, m, second_order)

    def _forward_block(
        self, i: int, state: _State, full: torch.Tensor, full_tangents: torch.Tensor, m: int, second_order: bool
    ) -> None:
        assert state.call is not None
        hidden = state.boundaries[i]
        keep = self.keep and not second_order
        if keep:
            full, hidden = full.detach().requires_grad_(), hidden.detach().requires_grad_()

        def block(f: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
            assert state.call is not None and h is not None
            return self.segments.block(i, f, h, state.call)

        self._restore(state, i + 1)
        kernels = differentiable_kernels(self.module.module) if m else nullcontext()
        with kernels, torch.enable_grad() if keep else torch.no_grad():
            if m:
                restore = lambda: self._restore(state, i + 1)  # noqa: E731
                output, tangent = self._jvp(block, full, hidden, full_tangents, state.tangents[i], restore)
                state.tangents.append(tangent)
                if not second_order:
                    state.tangents[i] = torch.empty(0)  # a Gauss-Newton product looks at the last tangent only
            else:
                output = block(full, hidden)
        self._note(state, i + 1)
        if keep:
            state.graphs.append((output, hidden, full))
        state.boundaries.append(output.detach())

    def _turn(
        self,
        state: _State,
        outer: torch.Tensor,
        outer_tangents: torch.Tensor,
        total: torch.Tensor,
        second_order: bool,
    ) -> None:
        """Suffix and loss: from the last boundary's tangents to its cotangents; adds to the outside's result."""
        n, m = len(self.segments.blocks), outer_tangents.shape[0]
        leaf = outer.detach().requires_grad_()
        hidden = state.boundaries[n].detach().requires_grad_() if n else None
        inputs = state.micro.inputs
        leaves = [leaf] if hidden is None else [leaf, hidden]

        def outputs(f: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
            return self.loss.outputs(self.segments.suffix(f, h, inputs))

        def gradients(f: torch.Tensor, h: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            value = self.loss.value(outputs(f, h), state.micro)
            return torch.autograd.grad(value, [f] if h is None else [f, h], create_graph=second_order)

        place = n + 1 if n else 0
        self._restore(state, place)
        if not m:
            grads = gradients(leaf, hidden)
            total[0] += grads[0]
            state.cotangents = grads[1][None] if n else None
            return
        tangents = state.tangents[n] if n else None
        if second_order:
            rows, cotangents = [], []
            with differentiable_kernels(self.module.module, second_order=True):
                for k in range(m):
                    self._restore(state, place)
                    with fwAD.dual_level():
                        f = fwAD.make_dual(leaf, outer_tangents[k])
                        h = None if hidden is None else fwAD.make_dual(hidden, tangents[k])  # type: ignore[index]
                        unpacked = [fwAD.unpack_dual(g) for g in gradients(f, h)]
                    rows.append(unpacked)
            for k, unpacked in enumerate(rows):
                total[k] += tangent_or_zero(unpacked[0])
                if n:
                    cotangents.append(tangent_or_zero(unpacked[1]))
            if n:
                state.cotangents = rows[0][1].primal.detach()[None]
                state.cotangent_tangents = torch.stack(cotangents)
            return
        restore = lambda: self._restore(state, place)  # noqa: E731
        with differentiable_kernels(self.module.module):
            out, out_tangents = self._jvp(outputs, leaf, hidden, outer_tangents, tangents, restore)
        back = []
        for k in range(m):
            cotangent = self.loss.hessian_product(out.detach(), out_tangents[k].detach(), state.micro)
            grads = torch.autograd.grad(out, leaves, cotangent, retain_graph=k < m - 1)
            total[k] += grads[0]
            if n:
                back.append(grads[1])
        state.cotangents = torch.stack(back) if n else None
        if n:
            state.tangents[n] = torch.empty(0)

    def _backward(
        self, states: list[_State], vectors: Sequence[ShardedVector], results: torch.Tensor, second_order: bool
    ) -> None:
        """Cotangents back through the blocks; each block's result is reduce-scattered as soon as it is whole."""
        n, m = len(self.segments.blocks), len(vectors)
        order = range(n - 1, -1, -1)
        keep = self.keep and not second_order
        stream = None if keep else self._stream(order, vectors if second_order else [])
        for i in order:
            gathered = None if stream is None else stream.next()
            shape = (self.module.layout.world_size, self.segments.block_segments[i].numel)
            total = torch.zeros(max(m, 1), *shape, dtype=self.dtype, device=self.device)
            for state in states:
                if second_order:
                    assert gathered is not None
                    self._second_order_block(i, state, gathered[0], gathered[1:], total)
                else:
                    self._backward_block(i, state, None if gathered is None else gathered[0], total)
                state.boundaries[i + 1] = torch.empty(0)
            self.segments.block_segments[i].add_to(results, reduce_scatter(total, self.module.layout.group))

    def _backward_block(self, i: int, state: _State, full: torch.Tensor | None, total: torch.Tensor) -> None:
        assert state.call is not None and state.cotangents is not None
        if full is None:
            output, hidden, leaf = state.graphs[i]
            state.graphs[i] = ()
        else:
            self._restore(state, i + 1)
            leaf = full.detach().requires_grad_()
            hidden = state.boundaries[i].detach().requires_grad_()
            # Attention's dropout must be drawn by the kernel that drew it going forward.
            kernels = differentiable_kernels(self.module.module) if state.rng else nullcontext()
            with kernels:
                output = self.segments.block(i, leaf, hidden, state.call)
        back = []
        count = len(state.cotangents)
        for k in range(count):
            grads = torch.autograd.grad(output, [leaf, hidden], state.cotangents[k], retain_graph=k < count - 1)
            total[k] += grads[0]
            back.append(grads[1])
        state.cotangents = torch.stack(back)

    def _second_order_block(
        self, i: int, state: _State, full: torch.Tensor, full_tangents: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Forward over reverse: the block's vector-Jacobian product, differentiated along each vector."""
        assert state.call is not None and state.cotangents is not None and state.cotangent_tangents is not None
        primal, back = None, []
        with differentiable_kernels(self.module.module, second_order=True):
            for k in range(len(full_tangents)):
                self._restore(state, i + 1)
                with fwAD.dual_level():
                    f = fwAD.make_dual(full.detach().requires_grad_(), full_tangents[k])
                    h = fwAD.make_dual(state.boundaries[i].detach().requires_grad_(), state.tangents[i][k])
                    c = fwAD.make_dual(state.cotangents[0], state.cotangent_tangents[k])
                    grads = torch.autograd.grad(self.segments.block(i, f, h, state.call), [f, h], c)
                    total[k] += tangent_or_zero(fwAD.unpack_dual(grads[0]))
                    unpacked = fwAD.unpack_dual(grads[1])
                    back.append(tangent_or_zero(unpacked))
                    primal = unpacked.primal.detach()
        assert primal is not None
        state.cotangents, state.cotangent_tangents = primal[None], torch.stack(back)
        state.tangents[i] = torch.empty(0)

    def _finish(
        self,
        state: _State,
        outer: torch.Tensor,
        outer_tangents: torch.Tensor,
        total: torch.Tensor,
        second_order: bool,
    ) -> None:
        """Back through the prefix: the outside's remaining part."""
        assert state.cotangents is not None
        if not second_order:
            self._restore(state, 0)
            leaf = outer.detach().requires_grad_()
            hidden = self.segments.prefix(leaf, state.micro.inputs)
            count = len(state.cotangents)
            for k in range(count):
                total[k] += torch.autograd.grad(hidden, leaf, state.cotangents[k], retain_graph=k < count - 1)[0]
            return
        assert state.cotangent_tangents is not None
        with differentiable_kernels(self.module.module, second_order=True):
            for k in range(len(outer_tangents)):
                self._restore(state, 0)
                with fwAD.dual_level():
                    f = fwAD.make_dual(outer.detach().requires_grad_(), outer_tangents[k])
                    c = fwAD.make_dual(state.cotangents[0], state.cotangent_tangents[k])
                    (grad,) = torch.autograd.grad(self.segments.prefix(f, state.micro.inputs), [f], c)
                    total[k] += tangent_or_zero(fwAD.unpack_dual(grad))


def tangent_or_zero(unpacked: Any) -> torch.Tensor:
    """The tangent of an unpacked dual number, zeros where it has none."""
    return torch.zeros_like(unpacked.primal) if unpacked.tangent is None else unpacked.tangent.detach()
