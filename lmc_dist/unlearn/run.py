"""An unlearning run: open the log, check everything, compute each method, judge it, write the results."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.console import StepProgress
from lmc_dist.curvature import HVPConfig
from lmc_dist.data import PERSON_STRIDE, epoch_order
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import mean_loss, relative_error
from lmc_dist.logged_run import open_logged_run, starting_model
from lmc_dist.runtime import Runtime, agreement, check_replaceable, promoted
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.training import read_request
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.kept import KeptCurvature, load_curvature
from lmc_dist.trajectory.logger import package_versions
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.correction import Correction, check_update_rule, compute_correction
from lmc_dist.unlearn.reference import retrain
from lmc_dist.unlearn.request import check_request
from lmc_dist.unlearn.results import write_results

logger = logging.getLogger(__name__)

EVALUATED_SAMPLES = 200  # retained samples whose loss is reported; all forgotten ones are

# What a method is called in tables, and its settings: hessian_mode and replay_head.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tim": ("first-order rollback (TIM)", {"hessian_mode": "none", "replay_head": 0, "damping": 0.0}),
    "fisher": ("LMCleaner, fisher", {"hessian_mode": "fisher", "replay_head": 0}),
    "diag": ("LMCleaner, diag", {"hessian_mode": "diag", "replay_head": 0}),
    "ggn": ("LMCleaner, GGN", {"hessian_mode": "GGN", "replay_head": 0}),
    "low_rank": ("LMCleaner, low_rank", {"hessian_mode": "low_rank", "replay_head": 0}),
    "fd": ("LMCleaner, fd", {"hessian_mode": "fd", "replay_head": 0}),
    "exact": ("LMCleaner, exact", {"hessian_mode": "exact", "replay_head": 0}),
    "replay": ("exact replay", {"replay_head": "all"}),
}


@dataclass(frozen=True)
class MethodResult:
    """One method's correction and what it cost."""

    name: str
    label: str
    correction: Correction
    seconds: float
    replay: dict[str, Any] | None = None


class UnlearningRun:
    """Everything one request needs, opened and checked; all ranks construct it together.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.output_dir = Path(config.output_dir)
        with agreement():
            self._check_settings()
            opened = open_logged_run(config, runtime)
            self.log, self.dataset, self.tokenizer = opened.log, opened.dataset, opened.tokenizer
            self.model_config, self.module, self.batches = opened.model_config, opened.module, opened.batches
            request = read_request(config, self.dataset)
            if request is None:
                raise LmcError("say what to forget: forget.samples, forget.split or forget.batches")
            self.request: Counterfactual = request
            self.touched: list[StepRecord] = check_request(
                request, self.log.records(), self.batches, self.log.manifest.loss_normalization
            )
            if not self.touched:
                raise LmcError("no logged step that changed the weights holds any of the forgotten data")
            replays = self.methods()[0][1]["replay_head"] == "all"
            self.log.require(self.touched[0].step, updates=not replays)
            if not replays:
                check_update_rule(self.log.manifest, self.log.records(), self.touched[0].step)
            self.kept: KeptCurvature | None = None
            if config.unlearn.curvature is not None:
                name = config.unlearn.curvature
                self.kept = load_curvature(self.log.path, name, self.log.layout, self.log.fingerprint)
                self.kept.require(self.touched[0].step, self.log.num_steps)

    def _check_settings(self) -> None:
        unlearn = self.config.unlearn
        check_replaceable(self.output_dir, "result.json", self.config.overwrite)
        if unlearn.K is not None and unlearn.K < 0:
            raise LmcError(f"unlearn.K must be ≥ 0 or null, got {unlearn.K}")
        if unlearn.replay_head not in (0, "all"):
            raise LmcError(f"replay_head={unlearn.replay_head} is not available yet; available: 0, all")
        self._hvp(unlearn.hessian_mode, unlearn.damping)
        if unlearn.curvature is not None and unlearn.hessian_mode != "low_rank":
            raise LmcError(f"unlearn.curvature is for hessian_mode low_rank, not {unlearn.hessian_mode}")
        if unknown := [name for name in self._compared() if name not in METHODS]:
            raise LmcError(f"compare: unknown method '{unknown[0]}'; available: {', '.join(METHODS)}")
        if self.config.reference == "retrain":
            self._check_reference()

    def _hvp(self, mode: str, damping: float) -> HVPConfig:
        unlearn = self.config.unlearn
        return HVPConfig(
            mode, damping, probes=unlearn.probes, rank=unlearn.rank, base=unlearn.base, refresh=unlearn.refresh
        )

    def _check_reference(self) -> None:
        log, world_size = TrajectoryLog(self.config.log_dir), self.runtime.world_size
        if "config" not in log.manifest.run:
            raise LmcError(
                "reference 'retrain' repeats a run of launch/train.py, and this log is not of one: use 'replay'"
            )
        draws = any(m.random_state is not None for record in log.records() for m in record.micro_batches)
        sizes = [segment.world_size for segment in log.manifest.all_segments]
        if draws and sizes != [world_size] * len(sizes):
            ranks = ", then ".join(map(str, sizes))
            raise LmcError(
                f"the log was trained with dropout on {ranks} ranks: a retrain on {world_size} ranks would draw other "
                "random numbers; start as many ranks, or use --reference replay"
            )

    def _compared(self) -> list[str]:
        return [name.strip() for name in self.config.compare.split(",") if name.strip()]

    def methods(self) -> list[tuple[str, dict[str, Any]]]:
        """The configured method first, then those to compare with."""
        unlearn = self.config.unlearn
        own = {
            "hessian_mode": unlearn.hessian_mode,
            "replay_head": unlearn.replay_head,
            "damping": unlearn.damping,
        }
        names = {settings.get("hessian_mode"): name for name, (_, settings) in METHODS.items()}
        name = "replay" if unlearn.replay_head == "all" else names[unlearn.hessian_mode]
        compared = [(other, {"damping": unlearn.damping, **METHODS[other][1]}) for other in self._compared()]
        return [(name, own), *((other, settings) for other, settings in compared if other != name)]

    def compute(self, name: str, settings: dict[str, Any], theta: ShardedVector) -> MethodResult:
        """One method's correction. Collective."""
        started = time.perf_counter()
        label, K = METHODS[name][0], self.config.unlearn.K
        with self._progress(name) as progress:
            if settings.get("replay_head") == "all":
                correction, certificate = self._replay(theta, progress)
                return MethodResult(name, label, correction, time.perf_counter() - started, certificate)
            else:
                hvp = self._hvp(settings["hessian_mode"], settings["damping"])
                kept = self.kept if hvp.mode == "low_rank" else None
                label += f" '{kept.name}'" if kept else ""
                label += f", K={'all' if K is None else K}" if name != "tim" or K is not None else ""
                label += f", λ={hvp.damping:g}" if hvp.damping else ""
                correction = compute_correction(
                    self.log, self.module, self.batches, self.request, hvp, K, progress=progress, kept=kept
                )
        return MethodResult(name, label, correction, time.perf_counter() - started)

    def _replay(self, theta: ShardedVector, progress: Callable[[int], None]) -> tuple[Correction, dict[str, Any]]:
        """The correction by replay, and how far it was certified by checksums on the way."""
        started = time.perf_counter()
        engine = replay_engine(starting_model(self.config, self.model_config, self.log), self.log)
        result = replay(engine, self.log, self.batches, self.request, progress)
        engine.destroy()
        v = result.theta.to(device=theta.flat.device) - theta
        audit = AuditRecord(
            unit="joint",
            tz=self.touched[0].step,
            tau=self.log.num_steps,
            K_used=self.log.num_steps - 1 - self.touched[0].step,
            v_norm=v.norm(),
            v0_norm=0.0,
            hvp_calls=0,
            mode="replay",
            damping=0.0,
            counterfactual=self.request.kind,
            replay_head="all",
            stopped_by="end",
            seconds=time.perf_counter() - started,
            growth_max=None,
        )
        theta_hat = result.theta.to(device=theta.flat.device)
        certificate = {"verified_steps": result.verified, "bit_exact_world_size": result.exact}
        return Correction(v, (audit,), float(result.steps), theta_hat), certificate

    def _progress(self, name: str) -> Any:
        return StepProgress(name, self.touched[0].step, self.log.num_steps, enabled=self.runtime.is_main)

    def forgotten_ids(self) -> list[int]:
        """Samples the request is about: its own, or those of its batches."""
        if self.request.sample_ids:
            seen = {i for record in self.touched for i in record.sample_ids}
            return sorted(self.request.sample_ids & seen)
        return sorted({i for record in self.touched for i in record.sample_ids})

    def describe(self) -> str:
        """What is forgotten, in words."""
        ids = self.forgotten_ids()
        if self.request.batch_ids:
            return f"{len(self.request.batch_ids)} batches of {len(ids)} samples"
        if self.config.data.source == "generated":
            people = len({i // PERSON_STRIDE for i in ids})
            return f"{len(ids)} samples of {people} {'person' if people == 1 else 'people'}"
        return f"{len(ids)} samples"

    def retained_ids(self) -> list[int]:
        """A fixed random selection of the samples that were trained on and stay."""
        forgotten = set(self.forgotten_ids())
        seen = {i for record in self.log.records() for i in record.sample_ids}
        return epoch_order(sorted(seen - forgotten), seed=0, epoch=0)[:EVALUATED_SAMPLES]

    def losses(self, theta: ShardedVector) -> tuple[float, float]:
        """(mean loss on forgotten, on retained samples). Collective."""
        forget, retain = self.forgotten_ids(), self.retained_ids()
        return tuple(mean_loss(self.module, theta, ids, self.batches) for ids in (forget, retain))  # type: ignore[return-value]


def unlearn(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Runs a request to the end and leaves `output_dir`; returns what result.json holds. Collective."""
    run = UnlearningRun(config, runtime)
    tau = run.log.num_steps
    theta = run.log.theta(tau)
    with promoted(run.output_dir) as part:
        (name, settings), *others = run.methods()
        main = run.compute(name, settings, theta)
        results = [main]
        for other, other_settings in others:
            try:
                results.append(run.compute(other, other_settings, theta))
            except LmcError as error:  # the same on all ranks; it must not cost the main result
                logger.warning("%s is left out of the comparison: %s", METHODS[other][0], error)
        reference, retrain_seconds = None, None
        if config.reference == "retrain":
            reference, retrain_seconds = retrain(run, part / "reference")
        elif config.reference == "replay":
            found = next((r for r in results if r.name == "replay"), None)
            replayed = found or run.compute("replay", METHODS["replay"][1], theta)
            reference, retrain_seconds = replayed.correction.corrected(theta), replayed.seconds
        rows = table(run, theta, results, reference, retrain_seconds)
        result = {
            "status": "done",
            "rel_error": next(row for row in rows if row["method"] == main.name)["rel_error"],
            "seconds_unlearn": main.seconds,
            "seconds_retrain": retrain_seconds,
            "gradients_equivalent": main.correction.gradients_equivalent,
            "v_norm": main.correction.v.norm(),
            "n_units": len(main.correction.audit),
            "world_size": runtime.world_size,
            "engine": run.log.manifest.engine,
            "config": asdict(config),
            "versions": package_versions(),
            "log_fingerprint": run.log.fingerprint,
            "request": {
                "what": run.describe(),
                "samples": len(run.forgotten_ids()),
                "steps": len(run.touched),
                "num_steps": tau,
                "counterfactual": run.request.kind,
            },
            "replay": main.replay,
            "rows": rows,
        }
        corrected = main.correction.corrected(theta)
        write_results(part, run.log, run.module, corrected, main.correction, result, run.tokenizer)
    return result


def table(
    run: UnlearningRun,
    theta: ShardedVector,
    results: list[MethodResult],
    reference: ShardedVector | None,
    retrain_seconds: float | None,
) -> list[dict[str, Any]]:
    """One row a method, between doing nothing and retraining. Collective."""

    def row(method: str, label: str, weights: ShardedVector, gradients: float, seconds: float | None) -> dict[str, Any]:
        forget, retain = (loss if math.isfinite(loss) else None for loss in run.losses(weights))
        error = None if reference is None else relative_error(weights, theta, reference)
        return {
            "method": method,
            "label": label,
            "rel_error": error,
            "loss_forget": forget,
            "loss_retain": retain,
            "gradients": gradients,
            "seconds": seconds,
        }

    rows = [row("do_nothing", "do nothing", theta, 0.0, 0.0)]
    for r in sorted(results, key=lambda r: list(METHODS).index(r.name)):
        rows.append(row(r.name, r.label, r.correction.corrected(theta), r.correction.gradients_equivalent, r.seconds))
    if run.config.reference == "retrain" and reference is not None:
        steps = sum(record.applied for record in run.log.records())
        rows.append(row("retrain", "retrain from scratch", reference, float(steps), retrain_seconds))
    return rows
