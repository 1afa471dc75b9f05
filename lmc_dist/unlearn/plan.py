"""What a strategy costs, in gradients of one training batch."""

from __future__ import annotations

# Measured against a plain gradient of the same batch on CPU (bench/hvp.py; docs/method.md §5).
GRADIENTS_PER_PRODUCT = {"GGN": 1.75, "none": 0.0}
