"""A correction of the engine that is training: computed over the log as far as it is written, set in place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmc_dist.config import OnlineSettings
from lmc_dist.errors import LmcError
from lmc_dist.online.settings import curvature, method_name
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.module import ShardedModule, get_rng_state, set_rng_state
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import with_open_edits
from lmc_dist.trajectory.logger import TrainingLogger, package_versions
from lmc_dist.trajectory.replay import replay
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import apply_correction, compute_correction

REPLAY = "replay"
# What DeepSpeed counts beside the optimizer: a replay's steps are none of training's.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Corrected:
    """A correction that the engine now has.

    Attributes:
        method: How it was found.
        figures: What is known of it; equal on all ranks.
    """

    method: str
    figures: dict[str, Any] = field(default_factory=dict)


class LiveRun:
    """The run that a logger records, to be corrected between two steps. Every rank constructs one.

    Args:
        logger: Attached.
        batches: The training data by id.
        settings: How to correct.
    """

    def __init__(self, logger: TrainingLogger, batches: BatchSource, settings: OnlineSettings) -> None:
        self.logger, self.batches, self.settings = logger, batches, settings
        self.shards: EngineShards = logger.shards

    def log(self) -> TrajectoryLog:
        """The log up to the present step. Collective."""
        self.logger.flush()
        group = self.shards.layout.group
        with agreement(group):
            return TrajectoryLog(self.logger.log_dir, group, stop=self.logger.step)

    def correct(self, log: TrajectoryLog, request: Counterfactual) -> Corrected:
        """Sets weights and optimizer state to where the run without the data would be. Collective.

        Args:
            log: `log()`.
            request: What to forget; some applied step holds it.

        Raises:
            LmcError: On every rank: it cannot be done. The engine is then what it was.
        """
        found = self._correct(log, request)
        about = {"log_fingerprint": log.fingerprint, "versions": package_versions(), "engine": self.shards.name}
        return Corrected(found.method, {**found.figures, **about, "world_size": log.layout.world_size})

    def _correct(self, log: TrajectoryLog, request: Counterfactual) -> Corrected:
        if self.settings.replay_head == "all":
            return self._replayed(log, request)
        try:
            return self._propagated(log, request)
        except LmcError as error:
            if self.settings.fallback == "refuse":
                raise
            reason = str(error)
        try:
            found = self._replayed(log, request)
        except LmcError as error:
            raise LmcError(f"{reason}; nor could it be replayed: {error}") from None
        return Corrected(found.method, {**found.figures, "instead_of": method_name(self.settings), "because": reason})

    def _propagated(self, log: TrajectoryLog, request: Counterfactual) -> Corrected:
        started, settings = time.perf_counter(), self.settings
        skeleton = skeleton_of(self.shards.module)
        frozen = read_frozen(self.shards.module, self.shards.layout)
        module = ShardedModule(skeleton, log.layout, self.shards.device, frozen=frozen)
        correction = compute_correction(
            log,
            module,
            self.batches,
            request,
            curvature(settings),
            replay_head=settings.replay_head,  # type: ignore[arg-type]
            head_tolerance=settings.head_tolerance,
            update="finite",
        )
        (audit,) = correction.audit
        if settings.max_growth is not None and (audit.growth_max or 0.0) > settings.max_growth:
            raise LmcError(
                f"the correction grew {audit.growth_max:.3g}-fold in one step, more than online.max_growth={settings.max_growth:g}: "
                "it is not trusted"
            )
        reached = apply_correction(self.shards, correction)
        figures = {
            "v_norm": correction.v.norm(),
            "gradients": correction.gradients_equivalent,
            "growth_max": audit.growth_max,
            "head": audit.replay_head,
            "seconds": time.perf_counter() - started,
            "checksum": reached,
            "exact": False,
        }
        return Corrected(method_name(settings), figures)

    def _replayed(self, log: TrajectoryLog, request: Counterfactual) -> Corrected:
        """Exact replay on the live engine itself: no second one, no second copy of the model."""
        started, shards = time.perf_counter(), self.shards
        theta = shards.read()
        with self._undisturbed():
            found = replay(shards, log, self.batches, request)
        v = shards.read().add_(theta, alpha=-1.0)
        _, passed = with_open_edits(request, log.edits, log.records())
        earlier = [edit for step, edit in log.edits.items() if step not in passed]
        figures = {
            "v_norm": v.norm(),
            "gradients": float(found.steps),
            "verified_steps": found.verified,
            "seconds": time.perf_counter() - started,
            "checksum": checksum(shards.read()),
            # a correction that this one does not go over, and that was none, stays in the weights
            "exact": found.exact and all(edit.figures.get("exact", False) for edit in earlier),
        }
        return Corrected(REPLAY, figures)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Lets the engine run other steps than training's; after an error it is what it was before. Collective."""
        shards, logger = self.shards, self.logger
        before, (vectors, scalars) = shards.read(), shards.read_state()
        rates = [group["lr"] for group in shards.param_groups]
        random, mode = get_rng_state(shards.device), shards.module.training
        engine: Any = getattr(shards, "engine", None)
        counters = {name: getattr(engine, name) for name in _COUNTERS if hasattr(engine, name)}
        scheduler: Any = getattr(engine, "lr_scheduler", None)
        schedule = scheduler.state_dict() if hasattr(scheduler, "state_dict") else None
        shards.clear_gradients()  # the optimizer has just stepped, its loop has not come to clearing them
        try:
            with logger.paused():
                yield
        except BaseException:
            shards.write(before)
            shards.write_state(vectors, scalars)
            raise
        finally:
            for group, rate in zip(shards.param_groups, rates, strict=True):
                group["lr"] = rate
            for name, value in counters.items():
                setattr(engine, name, value)
            if schedule is not None:
                scheduler.load_state_dict(schedule)
            set_rng_state(random, shards.device)
            shards.module.train(mode)
