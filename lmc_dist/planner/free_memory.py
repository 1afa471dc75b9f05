"""Memory that a rank may still take."""

from __future__ import annotations

import os

import psutil  # type: ignore[import-untyped]
import torch


def free_memory(device: torch.device) -> tuple[float, float | None]:
    """Bytes that this rank may still take: of its device, and of the host where the device has its own memory. Local."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    host = psutil.virtual_memory().available / local
    if device.type != "cuda":
        return host, None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # torch keeps it for the next tensor
    return float(torch.cuda.mem_get_info(device)[0] + cached), host
