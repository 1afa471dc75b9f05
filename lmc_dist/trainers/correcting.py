"""The correction of a Trainer's model: checked when the Trainer is made, computed once, set in the model or its engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lmc_dist.curvature import HVPConfig
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.fingerprint import model_fingerprint
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.relayout import relayout
from lmc_dist.trainers.samples import CollatedBatches, sample_positions, without
from lmc_dist.trainers.weights import another, holds, write_weights
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import write_json
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import write_audit
from lmc_dist.unlearn.correction import (
    Correction,
    Update,
    check_tolerance,
    check_update,
    check_update_rule,
    compute_correction,
)
from lmc_dist.unlearn.head import check_head
from lmc_dist.unlearn.optimizer_state import correct_state
from lmc_dist.unlearn.replayed import replayed_correction
from lmc_dist.unlearn.request import check_request
from lmc_dist.unlearn.results import library_result

Head = int | Literal["auto", "all"]


@dataclass(frozen=True)
class Settings:
    """What to forget of which log, and how.

    Attributes:
        log_dir: The trajectory log.
        request: What to forget.
        K: Steps each source is propagated; None is all.
        curvature: Mode and damping.
        replay_head: Steps replayed before the recursion takes over, `auto`, or `all`: exact replay.
        head_tolerance: `auto`: relative difference at which the two count as one.
        tol: The sweep stops once what v would still move is below this share of it; None carries on to the end.
        update: How the optimizer's steps are carried: `tangent`, `finite` or `auto` (`compute_correction`).
        output_dir: Gets correction/ and result.json.
        audit_dir: Gets audit_records.json; None is `audit` in output_dir.
    """

    log_dir: str
    request: Counterfactual
    K: int | None
    curvature: HVPConfig
    replay_head: Head
    head_tolerance: float
    tol: float | None
    update: Update
    output_dir: str
    audit_dir: str | None

    @property
    def result_file(self) -> Path:
        return Path(self.output_dir) / "result.json"

    @property
    def audit_folder(self) -> Path:
        return Path(self.output_dir) / "audit" if self.audit_dir is None else Path(self.audit_dir)


class ModelCorrection:
    """A model's correction. Every rank constructs one; methods are collective.

    Args:
        settings: What to forget, and how.
        model: At the weights that the log ended with, whole or partitioned; no engine has taken it.
        dataset: Of the logged training, map-style, with ids.
        collator: The Trainer's.
        device: Where passes run.

    Attributes:
        correction: v, once it is computed.
        seconds: What that took.
        retained: The dataset without what is forgotten.
        is_applied: Whether the model is corrected.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """

    def __init__(self, settings: Settings, model: nn.Module, dataset: Any, collator: Any, device: Any) -> None:
        self.settings, self.model, self.device = settings, model, device
        self.correction: Correction | None = None
        self.seconds = 0.0
        self.is_applied = False
        self.group = cpu_group()
        with agreement(self.group):
            self._check_settings()
            self.log = TrajectoryLog(settings.log_dir, self.group)
            fingerprint = self.log.manifest.dataset_fingerprint
            if isinstance(dataset, SampleDataset) and fingerprint not in (None, dataset.fingerprint):
                raise LmcError(f"the dataset is not the one logged in {self.log.path}: other fingerprint")
            positions = sample_positions(dataset)
            self.batches = CollatedBatches(dataset, positions, collator, device)
            self._check_log()
            self.skeleton = skeleton_of(model)
            if model_fingerprint(self.skeleton) != self.log.manifest.model_fingerprint:
                raise LmcError(f"the model is not the one logged in {self.log.path}: other config or parameters")
            self.retained = without(dataset, positions, self.forgotten_ids())

    def _check_settings(self) -> None:
        settings = self.settings
        if settings.K is not None and settings.K < 0:
            raise LmcError(f"K must be ≥ 0 or None, got {settings.K}")
        if settings.replay_head != "all":
            check_head(settings.replay_head, settings.head_tolerance)
        check_update(settings.update, settings.K)
        check_tolerance(settings.tol)
        for file in (settings.result_file, settings.audit_folder / "audit_records.json"):
            if file.exists():
                raise LmcError(f"{file} is of an earlier correction: choose another output_dir")

    def _check_log(self) -> None:
        log, request = self.log, self.settings.request
        touched = check_request(request, log.records(), self.batches, log.manifest.loss_normalization)
        if not touched:
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        replays = self.settings.replay_head == "all"
        log.require(touched[0].step, updates=not replays)
        if not replays:
            check_update_rule(log.manifest, log.records(), touched[0].step)

    def forgotten_ids(self) -> set[int]:
        """Samples that fine-tuning must not see: those of the request, or of its batches. Local."""
        request = self.settings.request
        batches = (record.sample_ids for record in self.log.records() if record.batch_id in request.batch_ids)
        return set(request.sample_ids) | {i for ids in batches for i in ids}

    def compute(self) -> Correction:
        """v, computed at the first call and then written to `output_dir`."""
        if self.correction is not None:
            return self.correction
        started, log, settings = time.perf_counter(), self.log, self.settings
        if settings.replay_head == "all":
            theta = log.theta(log.num_steps)
            self.correction, _ = replayed_correction(log, another(self.model), self.batches, settings.request, theta)
        else:
            frozen = read_frozen(self.model, log.layout)
            self.correction = compute_correction(
                log,
                ShardedModule(self.skeleton, log.layout, self.device, frozen=frozen),
                self.batches,
                settings.request,
                settings.curvature,
                settings.K,
                replay_head=settings.replay_head,
                head_tolerance=settings.head_tolerance,
                tol=settings.tol,
                update=settings.update,
            )
        self.seconds = time.perf_counter() - started
        self._write(self.correction)
        return self.correction

    def _write(self, correction: Correction) -> None:
        """correction/, the audit, and result.json, which comes last."""
        settings, log = self.settings, self.log
        asked = settings.request, settings.curvature, settings.K, settings.replay_head, settings.update
        result = library_result(log, correction, *asked, self.seconds)
        with agreement(self.group):
            correction.save(Path(settings.output_dir) / "correction")
        with agreement(self.group):
            if log.layout.rank == 0:
                write_audit(settings.audit_folder, correction.audit)
                write_json(settings.result_file, result)

    def apply_to_model(self) -> None:
        """Sets the weights of the model, before an engine takes it.

        Raises:
            LmcError: The model holds other weights than the log ended with.
        """
        theta = self.log.theta(self.log.num_steps)
        if not holds(self.model, theta):
            raise LmcError(f"the model does not hold the weights that the training in {self.log.path} ended with")
        write_weights(self.model, self.compute().corrected(theta))
        self.is_applied = True

    def apply_to_engine(self, shards: EngineShards) -> None:
        """Sets weights and optimizer state of the live engine.

        Raises:
            LmcError: The engine holds other weights than the log ended with, or its optimizer is at another step.
        """
        correction, theta = self.compute(), self.log.theta(self.log.num_steps)
        present = checksum(relayout(shards.read(), theta.layout).to(theta.flat.dtype))
        # an engine that was just made of a model in 16 bits has its weights rounded
        if present not in (checksum(theta), checksum(theta.to(shards.dtype).to(theta.flat.dtype))):
            raise LmcError(
                f"the engine does not hold the weights that the training in {self.log.path} ended with; a fine-tuning that "
                "was cut off after the correction goes on with a plain Trainer on `retained`"
            )
        if correction.state:
            correct_state(shards, correction.state, correction.behind, correction.step)
        shards.write(relayout(correction.corrected(theta).to(shards.master_dtype), shards.layout))
        self.is_applied = True
