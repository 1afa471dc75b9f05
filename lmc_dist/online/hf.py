"""Deletion while a Hugging Face Trainer trains: one call on a Trainer that exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from lmc_dist.config import OnlineSettings
from lmc_dist.errors import LmcError
from lmc_dist.online.service import OnlineUnlearning
from lmc_dist.online.settings import check_settings
from lmc_dist.trainers.samples import ID, CollatedBatches, sample_positions
from lmc_dist.trajectory.batches import blank_rows
from lmc_dist.trajectory.callback import TrainingLoggerCallback
from lmc_dist.trajectory.logger import TrainingLogger


class OnlineUnlearningCallback(TrainingLoggerCallback):
    """Logs a `Trainer` run and answers the deletion requests of its ledger; made by `unlearn_online`.

    Attributes:
        online: Once training has begun.
    """

    online: OnlineUnlearning | None = None

    def __init__(self, trainer: Trainer, logger: TrainingLogger | str, settings: OnlineSettings | None = None) -> None:
        super().__init__(logger)
        self.settings = settings or OnlineSettings()
        if self.settings.relearn_per_step:
            raise LmcError(
                "a Trainer's batches are its sampler's: companions of removed batches cannot be added to them, give "
                "OnlineSettings(relearn_per_step=0)"
            )
        check_settings(self.settings)
        self._dataset, self._collator = trainer.train_dataset, trainer.data_collator
        self._positions = sample_positions(self._dataset)
        original = trainer.get_batch_samples

        def get_batch_samples(epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
            # Before the Trainer counts the tokens that the step's loss is divided by.
            return original((self._without_forgotten(batch) for batch in epoch_iterator), num_batches, device)

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    def _without_forgotten(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.online is None else blank_rows(batch, self.online.empties(batch[ID].tolist()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        try:
            batches = CollatedBatches(self._dataset, self._positions, self._collator, args.device)
            self.online = OnlineUnlearning(self.logger, batches, self.settings, self._positions)
        except BaseException:
            self.logger.detach()
            raise


def unlearn_online(
    trainer: Trainer, logger: TrainingLogger | str, settings: OnlineSettings | None = None
) -> OnlineUnlearningCallback:
    """Has a Trainer log its run and answer deletion requests (`lmc forget`) while it trains. Every rank calls.

    Args:
        trainer: Whose dataset has the field `index` and whose arguments have `remove_unused_columns=False`.
        logger: Or the log directory.
        settings: How requests are answered; `relearn_per_step` must be 0.

    Raises:
        LmcError: A dataset without ids, or settings that do not fit.
    """
    callback = OnlineUnlearningCallback(trainer, logger, settings or OnlineSettings(relearn_per_step=0))
    trainer.add_callback(callback)
    return callback
