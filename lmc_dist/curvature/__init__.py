"""Curvature-vector products C·v on sharded parameters: `hvp_apply` picks the mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmc_dist.curvature.diagonal import estimate_diagonal, exact_diagonal, make_diagonal_product
from lmc_dist.curvature.finite_difference import make_difference_product, make_secant_product
from lmc_dist.curvature.fisher import make_fisher_product
from lmc_dist.curvature.ggn import Product, make_ggn_product
from lmc_dist.curvature.hessian import make_hessian_product
from lmc_dist.curvature.loss import Loss, MicroBatch, SquaredError, TokenCrossEntropy
from lmc_dist.curvature.low_rank import LowRank, low_rank
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector

__all__ = [
    "HVPConfig",
    "Loss",
    "LowRank",
    "MicroBatch",
    "SquaredError",
    "TokenCrossEntropy",
    "hvp_apply",
    "low_rank_basis",
]

MODES = ("GGN", "exact", "fd", "secant", "fisher", "diag", "low_rank", "none")
BASES = ("GGN", "exact", "fd")  # what `low_rank` takes its eigenpairs of


@dataclass(frozen=True)
class HVPConfig:
    """Which curvature, and its damping.

    Attributes:
        mode: `GGN`, `exact` (Hessian), `fd` (Hessian by differences), `secant` (∇L(θ + v) − ∇L(θ), not linear in
            v), `fisher` (ĝĝᵀ of the logged gradient), `diag` (diagonal of the GGN), `low_rank` (largest eigenpairs of
            `base`) or `none` (C = 0: first-order rollback).
        damping: λ ≥ 0; the product is (C + λI) v.
        keep_activations: `GGN`, `exact`, `fd`, `secant`: keep the forward graphs and the gathered parameters instead of
            recomputing blocks.
        probes: `diag`: GGN products behind an estimate (curvature/diagonal.py gives its standard error); 0 is the exact
            diagonal, one product a parameter.
        rank: `low_rank`: eigenpairs kept.
        base: `low_rank`: whose eigenpairs.
        refresh: `low_rank`: logged steps that a basis serves before a sweep takes a new one.

    Raises:
        LmcError: Unknown or not yet available mode, negative damping, an option that its mode does not have.
    """

    mode: str = "GGN"
    damping: float = 0.0
    keep_activations: bool = False
    probes: int = 8
    rank: int = 16
    base: str = "GGN"
    refresh: int = 10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise LmcError(f"unknown hessian_mode '{self.mode}'; available: {', '.join(MODES)}")
        if not self.damping >= 0:
            raise LmcError(f"damping must be ≥ 0, got {self.damping}")
        if self.probes < 0:
            raise LmcError(f"probes must be ≥ 0 (0: the exact diagonal), got {self.probes}")
        if self.rank < 1 or self.refresh < 1:
            raise LmcError(f"rank and refresh must be at least 1, got {self.rank} and {self.refresh}")
        if self.base not in BASES:
            raise LmcError(f"low_rank of '{self.base}' is not available; available: {', '.join(BASES)}")
        if self.keep_activations and self.mode not in ("GGN", "exact", "fd", "secant"):
            raise LmcError(f"keep_activations is an option of GGN, exact, fd and secant, not of {self.mode}")

    @property
    def uses_model(self) -> bool:
        """Whether a product runs the model, on data."""
        return self.mode not in ("none", "fisher")


def hvp_apply(
    v: ShardedVector | Sequence[ShardedVector],
    config: HVPConfig,
    module: ShardedModule | None = None,
    loss: Loss | None = None,
    theta: ShardedVector | None = None,
    micro_batches: Sequence[MicroBatch] = (),
    gradient: ShardedVector | None = None,
    engine: EngineShards | None = None,
    basis: LowRank | None = None,
) -> Any:
    """(C + λI) v with C the curvature of Σ_i weights_i ℓ_i at θ (docs/method.md §4).

    Args:
        v: Direction, or several that share what they can; sharded like θ, float32 or better.
        config: Mode and damping.
        module: The model on shards; with `loss` and `theta` needed by the modes that run the model.
        loss: Its loss.
        theta: Where the curvature is taken.
        micro_batches: This rank's part of the batch; may be empty.
        gradient: ĝ of the batch, for `fisher`; for `secant` ∇L(θ) of the micro-batches, None computes it.
        engine: `fd` only, in place of `module`: a live training engine, which computes the gradients with its own
            kernels; v and θ are laid out like it.
        basis: `low_rank`: eigenpairs found before (`low_rank_basis`); without them every call finds its own.

    Returns:
        A vector, or a list of them where a list was given.

    Collective: all ranks of the group must call with the same config and number of vectors.
    """
    vectors = [v] if isinstance(v, ShardedVector) else list(v)
    if basis is not None and config.mode != "low_rank":
        raise LmcError(f"a basis serves hessian_mode 'low_rank', not '{config.mode}'")
    product = basis or make_product(config, module, loss, theta, micro_batches, gradient, engine)
    products = product(vectors)
    if config.damping:
        products = [c.add_(x, alpha=config.damping) for c, x in zip(products, vectors, strict=True)]
    return products[0] if isinstance(v, ShardedVector) else products


def make_product(
    config: HVPConfig,
    module: ShardedModule | None,
    loss: Loss | None,
    theta: ShardedVector | None,
    micro_batches: Sequence[MicroBatch],
    gradient: ShardedVector | None,
    engine: EngineShards | None = None,
) -> Product:
    """The undamped product of a mode."""
    if config.mode == "none":
        return lambda vectors: [x * 0.0 for x in vectors]
    if config.mode == "fisher":
        if gradient is None:
            raise LmcError("hessian_mode 'fisher' needs the batch gradient: pass gradient=")
        return make_fisher_product(gradient)
    if engine is not None:
        if config.mode != "fd" or loss is None or theta is None:
            raise LmcError(f"a live engine serves hessian_mode 'fd', with loss= and theta=, not '{config.mode}'")
        return make_difference_product(lambda at: engine.gradient(at, micro_batches, loss), theta, engine.dtype)
    if module is None or loss is None or theta is None:
        raise LmcError(f"hessian_mode '{config.mode}' runs the model: pass module, loss and theta")
    if config.mode == "GGN":
        return make_ggn_product(module, loss, theta, micro_batches, config.keep_activations)
    if config.mode == "diag":
        ggn = make_ggn_product(module, loss, theta, micro_batches)
        exact = config.probes == 0
        return make_diagonal_product(
            exact_diagonal(ggn, theta) if exact else estimate_diagonal(ggn, theta, config.probes)
        )
    if config.mode == "low_rank":
        return low_rank_basis(config, module, loss, theta, micro_batches)
    if config.mode == "exact":
        return make_hessian_product(module, loss, theta, micro_batches, config.keep_activations)

    def gradient_at(at: ShardedVector) -> ShardedVector:
        return weighted_gradient(module, loss, at, micro_batches, config.keep_activations)

    if config.mode == "secant":
        return make_secant_product(gradient_at, theta, gradient_at(theta) if gradient is None else gradient)
    return make_difference_product(gradient_at, theta)


def low_rank_basis(
    config: HVPConfig,
    module: ShardedModule,
    loss: Loss,
    theta: ShardedVector,
    micro_batches: Sequence[MicroBatch],
) -> LowRank:
    """The `config.rank` largest eigenpairs of `config.base` at θ, undamped. Collective; 2·rank + 9 products."""
    base = HVPConfig(config.base)
    return low_rank(make_product(base, module, loss, theta, micro_batches, None), theta, config.rank)
