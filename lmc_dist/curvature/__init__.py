"""Curvature-vector products C·v on sharded parameters: `hvp_apply` picks the mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmc_dist.curvature.ggn import make_ggn_product
from lmc_dist.curvature.loss import Loss, MicroBatch, SquaredError, TokenCrossEntropy
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector

__all__ = ["HVPConfig", "Loss", "MicroBatch", "SquaredError", "TokenCrossEntropy", "hvp_apply"]

MODES = ("GGN", "none")
PLANNED_MODES = ("exact", "fd", "fisher", "diag", "low_rank", "secant")


@dataclass(frozen=True)
class HVPConfig:
    """Which curvature, and its damping.

    Attributes:
        mode: `GGN`, or `none` (C = 0: first-order rollback).
        damping: λ ≥ 0; the product is (C + λI) v.

    Raises:
        LmcError: Unknown or not yet available mode, negative damping.
    """

    mode: str = "GGN"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.mode in PLANNED_MODES:
            raise LmcError(f"hessian_mode '{self.mode}' is not available yet; available: {', '.join(MODES)}")
        if self.mode not in MODES:
            raise LmcError(f"unknown hessian_mode '{self.mode}'; available: {', '.join(MODES)}")
        if not self.damping >= 0:
            raise LmcError(f"damping must be ≥ 0, got {self.damping}")

    @property
    def uses_model(self) -> bool:
        return self.mode != "none"


def hvp_apply(
    v: ShardedVector,
    config: HVPConfig,
    module: ShardedModule,
    loss: Loss,
    theta: ShardedVector,
    micro_batches: Sequence[MicroBatch],
) -> ShardedVector:
    """(C + λI) v with C the curvature of Σ_i weights_i ℓ_i at θ (docs/method.md §4).

    Args:
        v: Direction, sharded like θ, float32 or better.
        config: Mode and damping.
        module: The model on shards.
        loss: Its loss.
        theta: Where the curvature is taken.
        micro_batches: This rank's part of the batch; may be empty.

    Collective: all ranks of θ's group must call with the same config.
    """
    if config.mode == "none":
        return v * config.damping
    product = make_ggn_product(module, loss, theta, micro_batches)(v)
    return product.add_(v, alpha=config.damping) if config.damping else product
