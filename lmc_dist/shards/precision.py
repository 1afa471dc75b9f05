"""How float32 matrix products are rounded on a GPU: not at all, or to the ten bits of TensorFloat-32 that training often takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

IEEE = "ieee"  # as torch calls float32 that is float32


def matmul_precision() -> str:
    """What this process has its float32 matrix products in: `ieee`, `tf32`, or another name of torch's. Local."""
    found = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if found is None:  # before torch 2.9
        return IEEE if torch.get_float32_matmul_precision() == "highest" else "tf32"
    for name in (found, getattr(torch.backends, "fp32_precision", "none")):  # `none` leaves it to the next
        if name != "none":
            return str(name)
    return IEEE


@contextmanager
def float32_matmuls(precision: str = IEEE) -> Iterator[None]:
    """Float32 matrix products of the block in a precision of `matmul_precision`. Local.

    Differences of gradients need float32 itself: what TensorFloat-32 rounds off is as large as they are.
    """
    before = matmul_precision()
    if before == precision:
        yield
        return
    _set(precision)
    try:
        yield
    finally:
        _set(before)


def _set(precision: str) -> None:
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer switch was used, after which the older one refuses to answer
        torch.backends.cuda.matmul.fp32_precision = precision
    else:
        torch.set_float32_matmul_precision("highest" if precision == IEEE else "high")
