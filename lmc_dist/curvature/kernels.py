"""Matrix products and attention as curvature products need them, in place of torch's own, inside the product only.

Three things are gained. Forward mode through attention, which fused kernels do not have (pytorch#116350,
pytorch#128971). The two terms of a product's tangent, ȧb + aḃ, accumulate in the matrix multiplication itself and leave
no graph behind. And what several tangents have in common is computed once: a `Tape` keeps the primal results of one
pass through a stage, and later passes read them back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.autograd import Function
from torch.nn.functional import dropout as drop

logger = logging.getLogger(__name__)

DIFFERENTIABLE_ATTENTION = ("eager", "sdpa")
_told: set[str] = set()
_native_linear = torch._C._nn.linear
_native_addmm = torch.addmm


class _Stream:
    """Results in the order in which they were computed."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.Tensor, int]] = []
        self.position = 0
        self.recording = True

    def recall(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The next result: computed and kept, or read back. A result that was changed in place is computed again."""
        if self.recording:
            result = compute().detach()
            self.entries.append((result, result._version))
            return result.detach()
        result, version = self.entries[self.position]
        self.position += 1
        return result.detach() if result._version == version else compute()


class Tape:
    """Primal results of one pass through a stage. The passes that share it must run the same operations.

    Linear layers and other products are kept apart: a pass with fused attention knows the former only.
    """

    def __init__(self) -> None:
        self.linear, self.product = _Stream(), _Stream()

    def rewind(self) -> None:
        """Before another pass: what was recorded is read back from now on."""
        for stream in (self.linear, self.product):
            assert stream.recording or stream.position == len(stream.entries), "passes through a stage differ"
            stream.recording, stream.position = not stream.entries, 0


_tape: Tape | None = None
_parameters: frozenset[int] = frozenset()  # storages of the parameters whose gradients only matter by their tangents


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _recall(kind: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    return compute() if _tape is None else getattr(_tape, kind).recall(compute)


def _primal(tensor: torch.Tensor) -> torch.Tensor:
    return fwAD.unpack_dual(tensor).primal


def _two_terms(
    a: torch.Tensor, b: torch.Tensor, a_tangent: torch.Tensor | None, b_tangent: torch.Tensor | None
) -> torch.Tensor | None:
    """ȧb + aḃ, the second term accumulated by the multiplication."""
    with torch.no_grad():
        if a_tangent is None:
            return None if b_tangent is None else a @ b_tangent
        tangent = a_tangent @ b
        if b_tangent is None:
            return tangent
        return tangent.addmm_(a, b_tangent) if tangent.dim() == 2 else tangent.baddbmm_(a, b_tangent)


class _Product(Function):
    """a @ b for two matrices, or two batches of them, differentiable in any order."""

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _recall("product", lambda: a @ b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if grad is None:
            return None, None
        a, b = ctx.saved_tensors
        left = product(grad, b.mT) if ctx.needs_input_grad[0] else None
        return left, product(a.mT, grad) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, a_tangent: torch.Tensor | None, b_tangent: torch.Tensor | None) -> torch.Tensor | None:
        a, b = map(_primal, ctx.saved_tensors)
        return _two_terms(a, b, a_tangent, b_tangent)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(..., n, k) @ (..., k, m) with at most one batch dimension, the same in both."""
    return _Product.apply(a, b)


class _TangentProduct(Function):
    """a @ b of which only the tangent is ever looked at: the value is left uninitialised."""

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty(a.shape[0], b.shape[1])

    setup_context = _Product.setup_context
    jvp = _Product.jvp


class _Linear(Function):
    """x wᵀ with x (..., k) and w (n, k): gradients come out in the layout of x and w.

    Forward over reverse wants the tangent of a parameter's gradient and never the gradient, which saves one product of
    nine. That holds for views of parameters; a weight that was computed from parameters needs its gradient.
    """

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return _recall("linear", lambda: rows @ w.t()).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.right = _TangentProduct.apply if _storage(inputs[1]) in _parameters else product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if grad is None:
            return None, None
        x, w = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        left = product(rows, w).view(x.shape) if ctx.needs_input_grad[0] else None
        return left, ctx.right(rows.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, x_tangent: torch.Tensor | None, w_tangent: torch.Tensor | None) -> torch.Tensor | None:
        x, w = map(_primal, ctx.saved_tensors)
        x_rows = None if x_tangent is None else x_tangent.reshape(-1, x.shape[-1])
        tangent = _two_terms(x.reshape(-1, x.shape[-1]), w.t(), x_rows, None if w_tangent is None else w_tangent.t())
        return None if tangent is None else tangent.view(*x.shape[:-1], w.shape[0])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear, differentiable in any order."""
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias


def _recorded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch's own linear; its product is kept for the dual passes that follow."""
    y = _native_linear(x, weight)
    assert _tape is not None
    _tape.linear.recall(lambda: y.detach().view(-1, y.shape[-1]))
    return y if bias is None else y + bias


def _addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """torch.addmm as models call it for a linear layer with a transposed weight (GPT-2)."""
    if beta != 1 or alpha != 1:
        return _native_addmm(c, a, b, beta=beta, alpha=alpha)
    return linear(a, b.t()) + c


def _recorded_addmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if beta != 1 or alpha != 1:
        return _native_addmm(c, a, b, beta=beta, alpha=alpha)
    return _recorded_linear(a, b.t()) + c


class _Softmax(Function):
    """softmax of scores under a mask, which only the primal needs: masked weights are 0, and so are their tangents."""

    @staticmethod
    def forward(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        def compute() -> torch.Tensor:
            lowest = torch.finfo(scores.dtype).min
            if mask is None:
                return scores.softmax(-1)
            if mask.dtype == torch.bool:
                return scores.masked_fill(~mask, lowest).softmax(-1)
            return (scores + mask).clamp_(min=lowest).softmax(-1)

        return _recall("product", compute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (p,) = ctx.saved_tensors
        pg = p * grad
        return pg - p * pg.sum(-1, keepdim=True), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        with torch.no_grad():
            p = _primal(ctx.saved_tensors[0])
            moved = p * tangent
            return moved.addcmul_(p, moved.sum(-1, keepdim=True), value=-1)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention (B, H, T, d), written out: differentiable in any order, memory quadratic in T.

    Rows that may attend to nothing get uniform weights in place of zeros. They are padding, which no loss sees.
    """
    heads, length, source = query.shape[1], query.shape[-2], key.shape[-2]
    if enable_gqa:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query * scale, key, value))
    if is_causal:
        attn_mask = torch.ones(length, source, dtype=torch.bool, device=query.device).tril()
    scores = product(q, k.mT).view(*query.shape[:-1], source)
    weights: torch.Tensor = _Softmax.apply(scores, attn_mask)
    if dropout_p:
        weights = drop(weights, dropout_p)
    return product(weights.view(-1, length, source), v).view(*query.shape[:-1], value.shape[-1])


def _silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x · sigmoid(x): `aten::silu_backward` has no forward-mode rule, the product of the two has."""
    return input * torch.sigmoid(input)


@contextmanager
def _patched(**replacements: Any) -> Iterator[None]:
    """torch.nn.functional's functions, and torch.addmm, replaced for a while."""
    places = {name: torch if name == "addmm" else nn.functional for name in replacements}
    present = {name: getattr(place, name) for name, place in places.items()}
    for name, function in replacements.items():
        setattr(places[name], name, function)
    try:
        yield
    finally:
        for name, function in present.items():
            setattr(places[name], name, function)


@contextmanager
def _known(tape: Tape | None, parameters: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """What the kernels look up while they run."""
    global _tape, _parameters
    outer = _tape, _parameters
    _tape, _parameters = tape, frozenset(map(_storage, parameters))
    try:
        yield
    finally:
        _tape, _parameters = outer


@contextmanager
def primal_kernels(module: nn.Module, tape: Tape | None = None, written_out: bool = False) -> Iterator[None]:
    """Kernels of a pass without tangents: torch's own; with a tape, its linear layers are recorded.

    `written_out` takes attention as the dual passes do, whose dropout draws other random numbers than a fused kernel's.
    """
    functions: dict[str, Any] = {"linear": _native_linear if tape is None else _recorded_linear}
    if tape is not None:
        functions["addmm"] = _recorded_addmm
    if written_out:
        functions["scaled_dot_product_attention"] = attention
    with _known(tape), _patched(**functions), _configured(module, written_out):
        yield


@contextmanager
def dual_kernels(
    module: nn.Module, tape: Tape | None = None, second_order_in: Iterable[torch.Tensor] | None = None
) -> Iterator[None]:
    """Kernels with a forward mode; with `second_order_in`, parameters, their derivatives have one as well.

    The gradients of those parameters then have their right tangents, and any values.
    """
    functions = {"linear": linear, "addmm": _addmm, "scaled_dot_product_attention": attention}
    if second_order_in is not None:
        functions["silu"] = _silu
    with _known(tape, second_order_in or ()), _patched(**functions), _configured(module, True):
        yield


@contextmanager
def _configured(module: nn.Module, written_out: bool) -> Iterator[None]:
    """A model configured for another attention than these two calls one of them inside the block.

    In every pass, not in those with tangents alone: other kernels want other masks, which are made before the first block,
    and some refuse float32.
    """
    config = getattr(module, "config", None)
    configured = getattr(config, "_attn_implementation", None)
    swap = configured is not None and configured not in DIFFERENTIABLE_ATTENTION
    if written_out or swap:
        tell(configured)
    if swap:
        # scaled-dot-product attention would leave the cap out
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        config._attn_implementation = "eager" if capped else "sdpa"  # type: ignore[union-attr]
    try:
        yield
    finally:
        if swap:
            config._attn_implementation = configured  # type: ignore[union-attr]


def tell(configured: str | None) -> None:
    """Says once for each configured kernel what stands in for it."""
    if configured in (None, "eager") or configured in _told:
        return
    _told.add(str(configured))
    logger.info("inside curvature products attention is written out instead of %s", configured)
