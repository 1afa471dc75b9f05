"""Two ways to log a training run: a callback for the HF Trainer, a context manager for hand-written loops."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.wrappers import alive
from lmc_dist.trajectory.logger import TrainingLogger

logger = logging.getLogger("lmc_dist")


class TrainingLoggerCallback(TrainerCallback):
    """Logs a Hugging Face `Trainer` run, under DeepSpeed, DistributedDataParallel or alone; every rank constructs one.

    The dataset's items need an integer `index` field, and `TrainingArguments` needs `remove_unused_columns=False`.

    Args:
        logger: The logger, or the log directory for one with default settings.

    Raises:
        LmcError: When training begins: the Trainer's ranks are not the launcher's, unsupported settings, or a log that
            does not go on where the Trainer does.
    """

    def __init__(self, logger: TrainingLogger | str) -> None:
        self.logger = logger if isinstance(logger, TrainingLogger) else TrainingLogger(logger)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_launch(args)
        check_arguments(args, find_trainer(self))
        if args.load_best_model_at_end and args.should_log:
            logger.warning(
                "load_best_model_at_end: what is deployed is the best checkpoint, not the end of training, which is where "
                "the log ends and what `lmc unlearn` makes forget: deploy the last checkpoint, or what `lmc unlearn` saves"
            )
        if self.logger.max_grad_norm is None and not args.deepspeed:  # DeepSpeed clips as its own settings say
            self.logger.max_grad_norm = args.max_grad_norm or 0.0
        check_beginning(self.logger, state.global_step)
        self.logger.attach(kwargs["model"], kwargs["optimizer"], resume_at=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.logger.epoch = float(state.epoch or 0.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.logger.save_to_disk()  # where the Trainer goes on from its checkpoint, the log can

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer's last word before it loads the best checkpoint, under DeepSpeed the optimizer's state included.
        if args.load_best_model_at_end and "train_runtime" in kwargs["logs"]:
            self.logger.save_to_disk()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and self.logger.has_moved() and args.should_log:
            logger.warning(
                "the model is now the best checkpoint%s, not the end of training: the log in %s ends at step %d, and "
                "`lmc unlearn` starts there, not from this model",
                f" {state.best_model_checkpoint}" if state.best_model_checkpoint else "",
                self.logger.log_dir,
                self.logger.step,
            )
        self.logger.close()


def find_trainer(callback: TrainerCallback) -> Any:
    """The Trainer that a callback was given to, None where it is gone. Local.

    Trainers do not name themselves to callbacks; the garbage collector knows them.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    return next(
        (t for t in alive(module.Trainer) if callback in getattr(vars(t).get("callback_handler"), "callbacks", ())),
        None,
    )


def check_arguments(args: TrainingArguments, trainer: Any = None) -> None:
    """Checks that a Trainer's loss is the model's own and that the log will hold what it is computed from. Local.

    Raises:
        LmcError: Which setting is not supported, and why.
    """
    if args.remove_unused_columns:
        raise LmcError("TrainingArguments needs remove_unused_columns=False, or the samples' ids are dropped")
    refused = {
        f"label_smoothing_factor={args.label_smoothing_factor}": args.label_smoothing_factor > 0,
        "compute_loss_func": getattr(trainer, "compute_loss_func", None) is not None,
    }
    for name, is_given in refused.items():
        if is_given:
            raise LmcError(
                f"the Trainer computes the loss itself ({name}): only the model's own token cross entropy can be logged, "
                f"leave {name.partition('=')[0]} out"
            )
    if args.neftune_noise_alpha:
        raise LmcError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the embeddings that the log does not hold: a replay "
            "would compute another model, leave it out"
        )


def check_beginning(logger: TrainingLogger, step: int) -> None:
    """Checks that the log of a Trainer that goes on at a step holds those before it. Local.

    Raises:
        LmcError: It begins anew.
    """
    if step > 0 and not logger.resume:
        raise LmcError(
            f"the Trainer goes on at step {step} (resume_from_checkpoint), the log would begin at step 0 and lack the samples "
            "of the steps before: pass resume=True to TrainingLogger, with the log_dir of those steps"
        )


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
