"""Memory that a rank may still take."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch

from lmc_dist.runtime import local_ranks


def free_memory(device: torch.device) -> tuple[float, float | None]:
    """Bytes that this rank may still take: of its device, and of the host where the device has its own memory. Local."""
    host = psutil.virtual_memory().available / local_ranks()
    if device.type != "cuda":
        return host, None
    # torch keeps what was freed for the next tensor
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached), host
