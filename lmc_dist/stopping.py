"""Leaving in time: a job that is asked to stop leaves what it has done on disk and ends, all ranks after the same step.

Schedulers send a signal some time before they end a job. It reaches the launcher or the ranks, one of them or all, at
different moments; so after each step the ranks of a group agree on whether any of them was asked. A file that appears
where LMC_STOP_FILE says is the same request for launchers that pass no signals on; the group's first rank looks for it, and
`stopped` is written into it once everything is on disk.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import Stopped

STOP_FILE = "LMC_STOP_FILE"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_BY_FILE = 1 << 10  # beside signal numbers

_asked = [0]


def listen() -> None:
    """From now on SIGUSR1 and SIGTERM ask for a stop and do no more. Local; commands that look at it call this."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    _asked[0] = number


def stop_asked(group: dist.ProcessGroup | None = None) -> str | None:
    """How a stop was asked for, the same on all ranks of the group; None where it was not. Collective."""
    is_many = dist.is_initialized() and dist.get_world_size(group) > 1
    found = _asked[0]
    path = os.environ.get(STOP_FILE)
    if not found and path and (not is_many or dist.get_rank(group) == 0) and os.path.exists(path):
        found = _BY_FILE
    if is_many:
        agreed = torch.tensor([found])
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
        found = int(agreed)
    if not found:
        return None
    return f"{STOP_FILE} {path}" if found == _BY_FILE else signal.Signals(found).name


def stopped(what: str, reason: str) -> Stopped:
    """The error that ends a job as asked: raised on every rank once all is on disk."""
    return Stopped(f"{what}, as {reason} asked")


def confirm() -> None:
    """Writes `stopped` into the file that asked. Local; rank 0, after the last collective."""
    path = os.environ.get(STOP_FILE)
    if path:
        Path(path).write_text("stopped\n")
