"""What a strategy costs, in gradients of one training batch."""

from __future__ import annotations

from lmc_dist.curvature import HVPConfig

# One vector, blocks recomputed, against a plain gradient of the same batch: bench/hvp.py on 2 CPU cores.
_PER_PRODUCT = {"GGN": 2.1, "exact": 4.2, "fd": 2.7, "secant": 1.0, "fisher": 0.0, "low_rank": 0.0, "none": 0.0}
_IN_BLOCKS = {"GGN": 1.5, "exact": 3.3, "fd": 2.7}  # one of eight vectors


def gradients_per_step(config: HVPConfig, num_vectors: int) -> float:
    """Cost of the products of one step for `num_vectors` vectors; without the bases of `low_rank`."""
    if config.mode == "diag":  # one estimate serves all vectors
        return config.probes * _IN_BLOCKS["GGN"] if num_vectors else 0.0
    one = _PER_PRODUCT[config.mode]
    eighth = _IN_BLOCKS.get(config.mode, one)
    further = (8 * eighth - one) / 7  # what a vector adds to others
    return one + further * (num_vectors - 1) if num_vectors else 0.0


def gradients_per_basis(config: HVPConfig, products: int) -> float:
    """Cost of finding a `low_rank` basis."""
    return products * _IN_BLOCKS[config.base]
