"""A logged run and what is to be forgotten of it: where unlearning and the baselines it is compared with begin."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.data import PERSON_STRIDE, epoch_order
from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError, Stopped
from lmc_dist.evaluate.distance import mean_loss, relative_error
from lmc_dist.logged_run import open_logged_run, starting_model
from lmc_dist.paths import named
from lmc_dist.runtime import Runtime, agreement, check_replaceable, remove_folder
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.tracking import Tracker, check_tracking, tracked
from lmc_dist.training import read_request
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import with_open_edits
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.unlearn.correction import Correction
from lmc_dist.unlearn.reference import check_reference
from lmc_dist.unlearn.replayed import replayed_correction
from lmc_dist.unlearn.request import check_request

logger = logging.getLogger(__name__)

EVALUATED_SAMPLES = 200  # retained samples whose loss is reported; all forgotten ones are


class AskedRun:
    """The log, data and model of a configuration, and its request, checked; all ranks construct it together.

    Attributes:
        log: The logged run.
        dataset: What it was trained on.
        tokenizer: Of the model.
        model_config: Of the model.
        module: The model on shards, laid out like the log.
        batches: Samples by id.
        request: What to forget.
        asked_for: What was asked for, without earlier corrections of the run that go along.
        touched: Steps that hold any of it.
        tracker: Told what progress is told.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.output_dir, self.tracker = named(config.output_dir), Tracker()
        with agreement():
            check_tracking(config.wandb)
            check_replaceable(self.output_dir, "result.json", config.overwrite)
            self.check_settings()
            opened = open_logged_run(config, runtime)
            self.log, self.dataset, self.tokenizer = opened.log, opened.dataset, opened.tokenizer
            self.model_config, self.module, self.batches = opened.model_config, opened.module, opened.batches
            request = read_request(config, self.dataset)
            if request is None:
                raise LmcError("say what to forget: forget.samples, forget.split or forget.batches")
            self.request: Counterfactual = request
            self.asked_for = request
            self.touched: list[StepRecord] = check_request(
                request, self.log.records(), self.batches, self.log.manifest.loss_normalization
            )
            if not self.touched:
                raise LmcError("no logged step that changed the weights holds any of the forgotten data")
            self._with_open_edits()
            if not self.kept_ids():
                logger.warning(
                    "nothing remains: all samples that were trained on are to be forgotten, so there is no loss on retained ones; "
                    "the model that training started from has seen none of them either"
                )
            check_reference(self)
            self.check_log()

    def _with_open_edits(self) -> None:
        """Takes into the request what earlier corrections of the run took out and that it reaches past. Local."""
        self.request, passed = with_open_edits(self.request, self.log.edits, self.log.records())
        if not passed:
            return
        if self.config.reference not in ("none", "replay"):
            raise LmcError(
                f"the run was corrected at step {max(passed)} already, and a retrain would need all requests: use "
                "--reference replay, which leaves them all out"
            )
        self.touched = [r for r in self.log.records() if r.applied and self.request.touches(r)]
        logger.info("gone over together with the corrections at step %s", ", ".join(map(str, passed)))

    def check_settings(self) -> None:
        """Checks what can be checked before the log is opened. Local."""

    def check_log(self) -> None:
        """Checks what needs the log and the request. Local."""

    @contextmanager
    def tracked_by(self, tracker: Tracker | None) -> Iterator[None]:
        """Tells a tracker of the block, or, where None is given, one of its own if the settings ask for it. Collective."""
        with ExitStack() as stack:
            if tracker is None:
                with agreement():
                    tracker = stack.enter_context(tracked(self.config, self.runtime.is_main))
            self.tracker = tracker
            yield

    @property
    def progress(self) -> str:
        """What of it is shown on this rank."""
        return self.config.progress if self.runtime.is_main else "none"

    @property
    def work_dir(self) -> Path:
        """Where marks and finished parts are until the run is."""
        return self.output_dir.with_name(self.output_dir.name + ".work")

    def replay(self, theta: ShardedVector, progress: Callable[[int], None]) -> tuple[Correction, dict[str, Any]]:
        """The correction by exact replay, and how far it was certified by checksums on the way. Collective.

        Marks are left in `work_dir`, from which the same command goes on.
        """
        model, request = starting_model(self.config, self.model_config, self.log), self.request
        what = [self.log.fingerprint, request.kind, sorted(request.sample_ids), sorted(request.batch_ids)]
        work = self.work_dir / f"replay-{json_digest(what)[:12]}"
        with gone_after_an_error(work):
            return replayed_correction(
                self.log, model, self.batches, request, theta, progress, work, self.config.unlearn.mark_every
            )

    def forgotten_ids(self) -> list[int]:
        """Samples the request is about: its own, or those of its batches."""
        if self.request.sample_ids:
            seen = {i for record in self.touched for i in record.sample_ids}
            return sorted(self.request.sample_ids & seen)
        return sorted({i for record in self.touched for i in record.sample_ids})

    def kept_ids(self) -> list[int]:
        """The samples that were trained on and stay."""
        forgotten = set(self.forgotten_ids())
        return sorted({i for record in self.log.records() for i in record.sample_ids} - forgotten)

    def retained_ids(self) -> list[int]:
        """A fixed random selection of `kept_ids`."""
        return epoch_order(self.kept_ids(), seed=0, epoch=0)[:EVALUATED_SAMPLES]

    def describe(self) -> str:
        """What is forgotten, in words."""
        ids = self.forgotten_ids()
        if self.request.batch_ids:
            return f"{len(self.request.batch_ids)} batches of {len(ids)} samples"
        if self.config.data.source == "generated":
            people = len({i // PERSON_STRIDE for i in ids})
            return f"{len(ids)} samples of {people} {'person' if people == 1 else 'people'}"
        return f"{len(ids)} samples"

    def losses(self, theta: ShardedVector) -> tuple[float | None, ...]:
        """(mean loss on forgotten, on retained samples), None where it is not finite or there are none. Collective."""
        losses = [
            mean_loss(self.module, theta, ids, self.batches) if ids else math.nan
            for ids in (self.forgotten_ids(), self.retained_ids())
        ]
        return tuple(loss if math.isfinite(loss) else None for loss in losses)

    def asked(self) -> dict[str, Any]:
        """The request, for result.json."""
        return {
            "what": self.describe(),
            "samples": len(self.forgotten_ids()),
            "retained": len(self.kept_ids()),
            "steps": len(self.touched),
            "num_steps": self.log.num_steps,
            "counterfactual": self.request.kind,
        }

    def row(
        self,
        method: str,
        label: str,
        weights: ShardedVector,
        gradients: float,
        seconds: float | None,
        theta: ShardedVector,
        reference: ShardedVector | None,
    ) -> dict[str, Any]:
        """A method's row of the result table. Collective.

        Args:
            method: Its name.
            label: In tables.
            weights: Where it ends.
            gradients: Its cost in gradients of a whole training batch.
            seconds: Its time.
            theta: Where doing nothing ends.
            reference: Where retraining ends, if that is known.
        """
        forget, retain = self.losses(weights)
        return {
            "method": method,
            "label": label,
            "rel_error": None if reference is None else relative_error(weights, theta, reference),
            "loss_forget": forget,
            "loss_retain": retain,
            "gradients": gradients,
            "seconds": seconds,
        }


@contextmanager
def gone_after_an_error(work: Path) -> Iterator[None]:
    """Removes unfinished work where the block fails on all ranks; a block that was stopped goes on from it. Collective."""
    try:
        yield
    except Stopped:
        raise
    except LmcError:  # it would come again from the mark
        remove_folder(work)
        remove_folder(work.parent, only_empty=True)
        raise
