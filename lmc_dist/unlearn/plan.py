"""What a strategy costs, in gradients of one training batch."""

from __future__ import annotations

from lmc_dist.curvature import HVPConfig

# One vector, blocks recomputed, against a plain gradient of the same batch: bench/hvp.py on 2 CPU cores.
_PER_PRODUCT = {"GGN": 2.2, "exact": 4.6, "fd": 2.6, "fisher": 0.0, "none": 0.0}


def gradients_per_step(config: HVPConfig, num_vectors: int) -> float:
    """Cost of the products of one step for `num_vectors` vectors."""
    if config.mode == "diag":  # one estimate serves all vectors
        return config.probes * _PER_PRODUCT["GGN"] if num_vectors else 0.0
    return num_vectors * _PER_PRODUCT[config.mode]
