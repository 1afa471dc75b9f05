"""Logging a replay as if it were training: the steps of a log, run again without some samples, into another log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedMicro, EditedStep
from lmc_dist.trajectory.logger import TrainingLogger, _Attached, package_versions, rates
from lmc_dist.trajectory.record import MicroRecord, Segment, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.repeat import run_step
from lmc_dist.trajectory.rewritten import KEY


def blanked(edited: EditedStep, batches: BatchSource) -> EditedStep:
    """The same step with empty rows in place of the samples that leave, as training without them has it. Local."""
    micros = []
    for micro in edited.micro_batches:
        record = micro.record
        if not all(micro.kept):
            width = int(batches.inputs(record.sample_ids)[1].shape[1]) if record.width is None else record.width
            record = without_samples(record, micro.kept, width)
        micros.append(EditedMicro(record, (True,) * len(record.sample_ids), micro.denominator))
    return replace(edited, micro_batches=tuple(micros))


def taken_over(record: StepRecord, request: Counterfactual, batches: BatchSource, normalization: Any) -> StepRecord:
    """The record of a step that is not run again: without what leaves it, which can be where it was not applied. Local."""
    if not request.touches(record):
        return record
    edited = blanked(request.edit(record, normalization, batches.num_targets), batches)
    idle = idle_record(edited, is_changed=True)  # θ is what it was
    return replace(idle, checksum=record.checksum, log_checksum=record.log_checksum, u_norm=record.u_norm)


def without_samples(record: MicroRecord, kept: tuple[bool, ...], width: int | None) -> MicroRecord:
    """A pass in which only some samples stay, in their rows. Pure."""
    rows = [row for row in range(len(kept) + len(record.blanks)) if row not in record.blanks]
    left = [row for row, stays in zip(rows, kept, strict=True) if not stays]
    ids = tuple(i for i, stays in zip(record.sample_ids, kept, strict=True) if stays)
    return replace(record, sample_ids=ids, blanks=tuple(sorted([*record.blanks, *left])), width=width, digest=None)


class RewriteLogger(TrainingLogger):
    """Continues a log by steps of another one. All ranks construct and use it together.

    Args:
        output: A log that ends where the first step is to be taken.
        manifest: Of the new log.
        last: How the other log's last steps were run, which its engine repeats.
        keep_first: As of the `TrainingLogger`.
    """

    def __init__(self, output: Path, manifest: TrajectoryManifest, last: Segment, keep_first: bool) -> None:
        super().__init__(
            output,
            max_steps=manifest.max_steps,
            mode=manifest.storage,
            save_interval=manifest.save_interval,
            resume=True,
            loss_normalization=manifest.loss_normalization,
            keep_first=keep_first,
        )
        self.manifest, self.last, self.batch_id = manifest, last, 0

    def take(self, edited: EditedStep, batches: BatchSource, logged: TrajectoryManifest, is_changed: bool) -> int:
        """Runs a step without what leaves it and logs it; the gradients it took. Collective.

        Args:
            edited: The step.
            batches: Samples by id.
            logged: The other log's manifest.
            is_changed: Whether it begins elsewhere than it did in the other log.
        """
        record, step = edited.record, self.step
        edited, attached = blanked(edited, batches), self._require_attached()
        self.epoch, self.batch_id = record.epoch, record.batch_id
        if not record.applied or edited.skipped:
            self._record_idle(attached, idle_record(edited, is_changed))
            return 0
        run_step(attached.shards, edited, batches, logged, attempt=lambda: self._begin(attached))
        if self.step == step:  # the engine left it out: its gradient overflowed
            self._register(attached, record.batch_id, rates(attached.shards), None, applied=False)
        return 1

    @staticmethod
    def _begin(attached: _Attached) -> None:
        attached.passes.clear()
        attached.gradient = None

    def _manifest(self, shards: EngineShards) -> TrajectoryManifest:
        """The given one, with how the steps from now on are run."""
        return replace(
            self.manifest,
            world_size=shards.layout.world_size,
            engine=shards.name,
            partition=shards.layout.rule,
            versions=package_versions(),
            segments=[],
            run={**self.last.run, KEY: self.manifest.run[KEY]},
        )

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super()._before_forward(module, args, kwargs)
        if self._is_watching(module) and self.loss_normalization == "micro_batch_token_mean":
            assert self._attached is not None
            self._attached.passes[-1].num_items = None  # a replay divides by it what training took the mean of
        return found

    def _before_step(self, attached: _Attached, keeps_gradient: bool) -> None:
        super()._before_step(attached, keeps_gradient)
        attached.loss_scale = getattr(attached.shards, "replay_scale", attached.loss_scale)

    def _after_step(self, attached: _Attached) -> None:
        if attached.shards.applied:
            self._register(attached, self.batch_id, attached.lrs, None, applied=True)

    def _check(
        self, step: int, has_gradient: bool, lrs: tuple[float, ...], stats: dict[str, Any], layout: ShardLayout
    ) -> None:
        # ranks may be left with the same samples where a sampler had repeated one
        super()._check(step, has_gradient, lrs, {**stats, "same_ids": False}, layout)


def idle_record(edited: EditedStep, is_changed: bool) -> StepRecord:
    """The record of a step that changes nothing, because it is left out or because training had not applied it. Pure."""
    record = replace(edited.record, applied=False, u_norm=None, checksum=None, log_checksum=None)
    if edited.skipped:
        left_out = replace(record, micro_batches=(), denominator=0.0, loss_scale=1.0)
        return replace(left_out, loss=None, grad_norm=None, clip_coef=1.0)
    if not is_changed:
        return record
    micros = tuple(replace(micro.record, denominator=micro.denominator) for micro in edited.micro_batches)
    mean = sum(micro.denominator for micro in micros) / len(micros) if micros else 0.0
    return replace(record, micro_batches=micros, denominator=mean, loss=None, grad_norm=None, clip_coef=1.0)
