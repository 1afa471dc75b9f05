"""Extra forward and backward passes of a live engine that its training does not notice.

ZeRO-3 and FSDP2 gather and reduce inside a pass, so every rank must run the same number of passes: ranks with fewer
micro-batches run fillers, whose weights are 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.shards.layout import group_rank
from lmc_dist.shards.module import set_rng_state
from lmc_dist.shards.precision import float32_matmuls

if TYPE_CHECKING:
    from lmc_dist.curvature.loss import MicroBatch

_measuring: ContextVar[bool] = ContextVar("measuring", default=False)


def is_measuring() -> bool:
    """Whether the present pass belongs to a product and not to training: the logger passes over it."""
    return _measuring.get()


@contextmanager
def measuring(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back random numbers and the training mode of every submodule, and keeps the logger and TensorFloat-32 out."""
    modes = [(part, part.training) for part in module.modules()]
    token = _measuring.set(True)
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), float32_matmuls():
            yield
    finally:
        _measuring.reset(token)
        for part, mode in modes:
            part.training = mode


def prepare_pass(module: nn.Module, micro: MicroBatch, device: torch.device) -> None:
    """Dropout as in training where the micro-batch has its random state, else none. Local."""
    module.train(micro.rng_state is not None)
    if micro.rng_state is not None:
        set_rng_state(micro.rng_state, device)


def even_passes(micro_batches: Sequence[MicroBatch], group: dist.ProcessGroup | None) -> list[MicroBatch]:
    """The rank's micro-batches with fillers behind them: the same number on every rank of the group. Collective.

    A filler is one sample of the group's first micro-batch, with weight 0.
    """
    micros = list(micro_batches)
    rank, world_size = group_rank(group)
    counts = torch.zeros(world_size, dtype=torch.long)
    counts[rank] = len(micros)
    if world_size > 1:
        dist.all_reduce(counts, group=group)
    rounds = int(counts.max())
    if int(counts.min()) == rounds:
        return micros
    source = int(counts.gt(0).nonzero()[0])
    box = [_filler(micros[0]) if rank == source else None]
    dist.broadcast_object_list(box, group=group, group_src=source)
    assert box[0] is not None
    return micros + [box[0]] * (rounds - len(micros))


def _filler(micro: MicroBatch) -> MicroBatch:
    samples = len(micro.targets)
    inputs = {
        name: x[:1].cpu() if isinstance(x, torch.Tensor) and x.dim() and len(x) == samples else x
        for name, x in micro.inputs.items()
    }
    weights = torch.zeros_like(micro.weights[:1]).cpu()
    return replace(micro, inputs=inputs, targets=micro.targets[:1].cpu(), weights=weights, rng_state=None)
