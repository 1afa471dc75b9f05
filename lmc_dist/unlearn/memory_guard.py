"""How many vectors a sweep may carry: planned before it starts, looked at again while it runs, agreed on by all ranks.

A rank that ran out of memory inside a product would leave the others waiting in a collective. So before each product all
ranks compare what it takes by the planner's model (docs/scaling.md) with what is there, and take fewer vectors at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lmc_dist.curvature import MicroBatch
from lmc_dist.planner.facts import ModelFacts, Pass
from lmc_dist.planner.free_memory import free_memory
from lmc_dist.planner.memory import product_bytes
from lmc_dist.shards.layout import ShardLayout

logger = logging.getLogger(__name__)

# Of what is there: peaks of whole products were predicted to 7 %, and allocators keep some for themselves.
USABLE = 0.85
_GUARDED = ("GGN", "exact", "fd", "secant")


class MemoryGuard:
    """Lowers the number of vectors that share a product when memory would not do.

    Args:
        model: Its sizes.
        layout: Of the vectors.
        device: Where products are computed.
    """

    def __init__(self, model: ModelFacts, layout: ShardLayout, device: torch.device) -> None:
        self.model, self.layout, self.device = model, layout, device

    def allow(self, mode: str, wanted: int, micros: Sequence[MicroBatch]) -> int:
        """Vectors that may share a product, `wanted` at most and one at least. Collective, the same on all ranks.

        One is never refused: if even that fails, the process ends with torch's own message, and finished units stay.
        """
        if mode not in _GUARDED:
            return wanted
        passes = [Pass(*m.targets.shape[:2]) for m in micros if m.targets.dim() >= 2]
        there = USABLE * free_memory(self.device)[0]
        size = wanted
        while size > 1 and product_bytes(self.model, mode, size, passes, self.layout.world_size) > there:
            size //= 2
        found = torch.tensor([size])
        if self.layout.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.layout.group)
        if int(found) < wanted:
            logger.warning("memory is short: %d vectors at once from here on, not %d", int(found), wanted)
        return int(found)
