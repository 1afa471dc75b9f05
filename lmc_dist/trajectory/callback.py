"""Two ways to log a training run: a callback for the HF Trainer, a context manager for hand-written loops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.logger import TrainingLogger


class TrainingLoggerCallback(TrainerCallback):
    """Logs a Hugging Face `Trainer` run, under DeepSpeed, DistributedDataParallel or alone; every rank constructs one.

    The dataset's items need an integer `index` field, and `TrainingArguments` needs `remove_unused_columns=False`.

    Args:
        logger: The logger, or the log directory for one with default settings.

    Raises:
        LmcError: When training begins: the Trainer's ranks are not the launcher's, or unsupported settings.
    """

    def __init__(self, logger: TrainingLogger | str) -> None:
        self.logger = logger if isinstance(logger, TrainingLogger) else TrainingLogger(logger)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_launch(args)
        if args.remove_unused_columns:
            raise LmcError("TrainingArguments needs remove_unused_columns=False, or the samples' ids are dropped")
        if self.logger.max_grad_norm is None and not args.deepspeed:  # DeepSpeed clips as its own settings say
            self.logger.max_grad_norm = args.max_grad_norm or 0.0
        self.logger.attach(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.logger.epoch = float(state.epoch or 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.logger.close()


def check_launch(args: TrainingArguments) -> None:
    """Checks that a Trainer has found the launcher's other processes. Local.

    Raises:
        LmcError: It has not.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE") or 1)
    if args.world_size != world_size:
        raise LmcError(
            f"the Trainer counts {args.world_size} processes, the launcher started {world_size}: every rank would "
            "train on the same data. On CPU start PartialState(backend='gloo') first and pass "
            "accelerator_config={'use_configured_state': True} to TrainingArguments"
        )


@contextmanager
def training_log(
    engine: Any, log_dir: str, optimizer: Any = None, scaler: Any = None, **settings: Any
) -> Iterator[TrainingLogger]:
    """Logs every step of an engine inside the block; engine, optimizer and scaler as for `attach`. Collective.

    Batches carry an `index` field with the samples' ids; `settings` are those of `TrainingLogger`. After an error
    inside the block the log keeps its whole steps and gets no final snapshot.
    """
    logger = TrainingLogger(log_dir, **settings)
    logger.attach(engine, optimizer, scaler=scaler)
    try:
        yield logger
    except BaseException:
        logger.detach()
        raise
    logger.close()
