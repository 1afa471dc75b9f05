"""How commands that work on files are run: one process, or the ranks of a launcher over gloo; no engine is loaded."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lmc_dist.runtime import Runtime, check_launched

TIMEOUT = timedelta(hours=12)  # one rank may read for as long as another waits


def join_ranks() -> Runtime:
    """Joins the launcher's other ranks, if there are any. Collective."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("lmc_dist").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if world_size > 1 and not dist.is_initialized():
        check_launched(os.environ)
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that share cores slow each other down
            local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Runtime(rank, world_size, torch.device("cpu"))


def quiet_transformers() -> None:
    """Library chatter at warning level, where models and data are loaded."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
