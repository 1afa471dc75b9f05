"""How commands that work on files are run: one process, or the ranks of a launcher over gloo; no engine is loaded."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lmc_dist.runtime import Runtime, check_launched, set_threads

TIMEOUT = timedelta(hours=12)  # one rank may read for as long as another waits


def join_ranks() -> Runtime:
    """Joins the launcher's other ranks, if there are any. Collective."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("lmc_dist").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if world_size > 1 and not dist.is_initialized():
        check_launched(os.environ)
        set_threads(use_cuda=False)
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Runtime(rank, world_size, torch.device("cpu"))


def quiet_transformers() -> None:
    """Library chatter at warning level, where models and data are loaded."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
