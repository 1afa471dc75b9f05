"""Hugging Face Trainers that begin with a correction: forget from a trajectory log, then fine-tune on what stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from lmc_dist.config import Counterfactual as Kind
from lmc_dist.curvature import HVPConfig
from lmc_dist.errors import LmcError
from lmc_dist.shards.engines import engine_shards
from lmc_dist.trainers.correcting import Head, ModelCorrection, Settings
from lmc_dist.trainers.samples import ID
from lmc_dist.trajectory.callback import check_launch
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.unlearn.correction import Correction, Update
from lmc_dist.unlearn.request import make_request


class LMCleaner(Trainer):
    """A Trainer whose model is corrected first. Every rank constructs one; use a subclass.

    `train_dataset` is the dataset of the logged training, whose items hold their sample ids in `index`; fine-tuning sees
    only the samples that stay. The model holds the weights that the logged training ended with.

    Args:
        args: Those of `Trainer`, by position.
        request: What to forget; the subclasses make it.
        training_log_dir: The trajectory log.
        K: Steps each source is propagated; None is all.
        hessian_mode: Any of `lmc_dist.curvature.MODES`.
        damping: λ ≥ 0.
        curvature: All settings of a mode, in place of these two.
        replay_head: Steps replayed first, `auto`, or `all`: exact replay.
        head_tolerance: `auto`: relative difference at which recursion and replay count as one.
        tol: The sweep stops once what v would still move is below this share of it.
        update: How the optimizer's steps are carried: `tangent`, `finite` or `auto` (`compute_correction`).
        apply_immediately: Correct at once; else when `train()` begins, in the engine and with its optimizer's state.
        audit_dir: Where audit_records.json goes; None is `audit` in the output_dir.
        kwargs: Those of `Trainer`, by name.

    Attributes:
        unlearning: The correction's checks, its computation and its results.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """

    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        request: Counterfactual,
        training_log_dir: str,
        K: int | None = None,
        hessian_mode: str = "GGN",
        damping: float = 0.0,
        curvature: HVPConfig | None = None,
        replay_head: Head = 0,
        head_tolerance: float = 0.05,
        tol: float | None = None,
        update: Update = "auto",
        apply_immediately: bool = False,
        audit_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("model_init") is not None:
            raise LmcError(
                "model_init makes a new model when training begins, which nothing would correct: pass model="
            )
        chosen = _curvature(hessian_mode, damping, curvature)
        kwargs["callbacks"] = [_Correct(self), *(kwargs.get("callbacks") or [])]  # before a logger looks at the weights
        super().__init__(*args, **kwargs)
        check_launch(self.args)
        settings = Settings(
            log_dir=training_log_dir,
            request=request,
            K=K,
            curvature=chosen,
            replay_head=replay_head,
            head_tolerance=head_tolerance,
            tol=tol,
            update=update,
            output_dir=str(self.args.output_dir),
            audit_dir=audit_dir,
        )
        self.unlearning = ModelCorrection(
            settings, self.model, self.train_dataset, self.data_collator, self.args.device
        )
        if self.fine_tunes:
            if not len(self.retained):
                raise LmcError("all samples are forgotten, nothing is left to fine-tune on: set num_train_epochs=0")
            self.train_dataset = self.retained
        self.model.register_forward_pre_hook(_drop_ids, with_kwargs=True)
        if apply_immediately:
            self.unlearning.apply_to_model()

    @property
    def correction(self) -> Correction | None:
        """v and its audit, once it is computed."""
        return self.unlearning.correction

    @property
    def retained(self) -> Any:
        """The dataset without what is forgotten."""
        return self.unlearning.retained

    @property
    def fine_tunes(self) -> bool:
        """Whether the arguments ask for any training step."""
        return self.args.max_steps > 0 or self.args.num_train_epochs > 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Corrects the model, unless that is done, then fine-tunes it on the samples that stay. Collective.

        With `num_train_epochs=0` it ends after the correction, the engine built and `save_model` ready.

        Args:
            resume_from_checkpoint: A Trainer checkpoint of the end of the logged training, whose weights and optimizer
                state are then corrected.
            args: As of `Trainer.train`.
            kwargs: As there.

        Raises:
            LmcError: On every rank: weights or optimizer are not where the log ended.
        """
        unlearning = self.unlearning
        if unlearning.is_applied and resume_from_checkpoint:
            raise LmcError("the model is corrected already: a checkpoint would replace its weights")
        correction = unlearning.compute()  # before the engine is built, which leaves more memory
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        metrics = {
            **output.metrics,
            "correction_v_norm": correction.v.norm(),
            "correction_gradients": correction.gradients_equivalent,
            "correction_seconds": unlearning.seconds,
        }
        if not self.fine_tunes:
            metrics.pop("train_loss", None)  # of no step
        return TrainOutput(output.global_step, output.training_loss, metrics)


class LMCleanerBatchLevel(LMCleaner):
    """Forgets whole batches: the logged run without those steps. Every rank constructs one.

    Args:
        args: Those of `Trainer`, by position.
        forget_batch_ids: Batch ids of the log.
        kwargs: Those of `LMCleaner`, `training_log_dir` among them, and of `Trainer`.
    """

    def __init__(self, *args: Any, forget_batch_ids: Iterable[int], **kwargs: Any) -> None:
        super().__init__(*args, request=make_request(batch_ids=forget_batch_ids), **kwargs)


class LMCleanerSampleLevel(LMCleaner):
    """Forgets samples wherever they occur. Every rank constructs one.

    Args:
        args: Those of `Trainer`, by position.
        forget_sample_ids: The dataset's own ids.
        counterfactual: `renormalize` or `zero`.
        kwargs: Those of `LMCleaner`, `training_log_dir` among them, and of `Trainer`.
    """

    def __init__(
        self, *args: Any, forget_sample_ids: Iterable[int], counterfactual: Kind = "renormalize", **kwargs: Any
    ) -> None:
        super().__init__(*args, request=make_request(sample_ids=forget_sample_ids, kind=counterfactual), **kwargs)


def _curvature(hessian_mode: str, damping: float, given: HVPConfig | None) -> HVPConfig:
    if given is not None and (hessian_mode, damping) != ("GGN", 0.0):
        raise LmcError("curvature= holds mode and damping: leave hessian_mode and damping out")
    return given or HVPConfig(hessian_mode, damping)


class _Correct(TrainerCallback):
    """Corrects the engine once it is built and its checkpoint, if any, is loaded."""

    def __init__(self, trainer: LMCleaner) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unlearning = self.trainer.unlearning
        if not unlearning.is_applied:
            unlearning.apply_to_engine(engine_shards(self.trainer.model_wrapped, self.trainer.optimizer))


def _drop_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sample ids are none of the model's inputs; a logger, whose hook comes first, has taken them by now."""
    kwargs.pop(ID, None)
    return args, kwargs
