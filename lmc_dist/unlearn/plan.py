"""What a strategy costs, in gradients of one training batch."""

from __future__ import annotations

# Measured against a plain gradient of the same batch on CPU (bench/hvp.py; docs/method.md §5).
GRADIENTS_PER_PRODUCT = {"GGN": 1.75, "exact": 3.1, "fd": 2.0, "fisher": 0.0, "none": 0.0}
