"""An unlearning run: open the log, check everything, compute each method, judge it, write the results."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lmc_dist.config import Config
from lmc_dist.console import StepProgress
from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
from lmc_dist.data import PERSON_STRIDE, epoch_order
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import mean_loss, relative_error
from lmc_dist.logged_run import logged_skeleton, on_shards, open_logged_run, starting_model
from lmc_dist.runtime import Runtime, agreement, check_replaceable, promoted, remove_folder
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
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
from lmc_dist.unlearn.head import check_head
from lmc_dist.unlearn.problem import Problem
from lmc_dist.unlearn.recombine import UNITS
from lmc_dist.unlearn.reference import retrain
from lmc_dist.unlearn.request import check_request
from lmc_dist.unlearn.results import write_results
from lmc_dist.unlearn.unit_run import check_units, correct, described, units_of

logger = logging.getLogger(__name__)

EVALUATED_SAMPLES = 200  # retained samples whose loss is reported; all forgotten ones are

REPLAY = "replay"

# What a hessian_mode is called in tables, and its name on the command line.
MODES: dict[str, tuple[str, str]] = {
    "tim": ("none", "first-order rollback (TIM)"),
    "fisher": ("fisher", "LMCleaner, fisher"),
    "diag": ("diag", "LMCleaner, diag"),
    "ggn": ("GGN", "LMCleaner, GGN"),
    "low_rank": ("low_rank", "LMCleaner, low_rank"),
    "fd": ("fd", "LMCleaner, fd"),
    "exact": ("exact", "LMCleaner, exact"),
    "secant": ("secant", "LMCleaner, secant"),
}


@dataclass(frozen=True)
class Method:
    """A way to find the correction.

    Attributes:
        name: As `compare` spells it: `ggn`, `10+ggn`, `auto+ggn`, `replay`.
        label: In tables.
        hessian_mode: Curvature.
        replay_head: Steps replayed first; `all` is exact replay.
        damping: λ.
    """

    name: str
    label: str
    hessian_mode: str
    replay_head: int | Literal["auto", "all"] = 0
    damping: float = 0.0


def parse_method(name: str, damping: float) -> Method:
    """A method by its name. Local.

    Raises:
        LmcError: No such method.
    """
    if name == REPLAY:
        return Method(name, "exact replay", "none", "all")
    head, _, mode = name.rpartition("+")
    if mode not in MODES or not (head in ("", "auto") or head.isdecimal()):
        names = ", ".join([*MODES, REPLAY])
        raise LmcError(
            f"compare: unknown method '{name}'; available: {names}; 10+ggn or auto+ggn replays a head before the recursion"
        )
    hessian_mode, label = MODES[mode]
    steps: Any = int(head) if head.isdecimal() else head or 0
    label = f"replay {head} + {label}" if head else label
    return Method(name, label, hessian_mode, steps, 0.0 if mode == "tim" else damping)


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
            self.units = None if config.unlearn.units == "joint" else units_of(config.unlearn, request)
            replays = self.methods()[0].name == REPLAY
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
        if unlearn.replay_head != "all":
            check_head(unlearn.replay_head, unlearn.head_tolerance)
        self._hvp(unlearn.hessian_mode, unlearn.damping)
        check_units(unlearn)
        if unlearn.curvature is not None and unlearn.hessian_mode != "low_rank":
            raise LmcError(f"unlearn.curvature is for hessian_mode low_rank, not {unlearn.hessian_mode}")
        self.methods()
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

    def methods(self) -> list[Method]:
        """The configured method first, then those to compare with."""
        unlearn = self.config.unlearn
        names = {mode: name for name, (mode, _) in MODES.items()}
        own = f"{unlearn.replay_head}+" if unlearn.replay_head else ""
        own = REPLAY if unlearn.replay_head == "all" else own + names[unlearn.hessian_mode]
        first = replace(parse_method(own, unlearn.damping), damping=unlearn.damping)
        compared = [parse_method(name, unlearn.damping) for name in self._compared()]
        return [first, *(method for method in compared if method.name != own)]

    def compute(self, method: Method, theta: ShardedVector) -> MethodResult:
        """One method's correction. Collective."""
        started = time.perf_counter()
        label, unlearn = method.label, self.config.unlearn
        with self._progress(method.name) as progress:
            if method.replay_head == "all":
                correction, certificate = self._replay(theta, progress)
                return MethodResult(method.name, label, correction, time.perf_counter() - started, certificate)
            hvp, K = self._hvp(method.hessian_mode, method.damping), unlearn.K
            kept = self.kept if hvp.mode == "low_rank" else None
            label += f" '{kept.name}'" if kept else ""
            label += f", K={'all' if K is None else K}" if method.hessian_mode != "none" or K is not None else ""
            label += f", λ={hvp.damping:g}" if hvp.damping else ""
            correction = compute_correction(
                self.log,
                self.module,
                self.batches,
                self.request,
                hvp,
                K,
                progress=progress,
                kept=kept,
                replay_head=method.replay_head,
                head_tolerance=unlearn.head_tolerance,
                tol=unlearn.tol,
            )
        return MethodResult(method.name, label, correction, time.perf_counter() - started)

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

    @property
    def progress(self) -> str:
        """What of it is shown on this rank."""
        return self.config.progress if self.runtime.is_main else "none"

    def correct_units(self, method: Method) -> MethodResult:
        """Each unit by itself, and their sum. Collective."""
        assert self.units is not None
        started, unlearn = time.perf_counter(), self.config.unlearn
        hvp = self._hvp(method.hessian_mode, method.damping)
        kept = self.kept if hvp.mode == "low_rank" else None
        loss = TokenCrossEntropy()
        problem = Problem(self.log, self.module, loss, self.batches, self.request, hvp, unlearn.K, kept)

        def make_module(layout: ShardLayout) -> ShardedModule:
            device = self.runtime.device
            skeleton = logged_skeleton(self.config, self.model_config, device)
            return on_shards(
                skeleton, self.config, self.model_config, TrajectoryLog(self.log.path, layout.group), device
            )

        correction = correct(
            problem, self.units, unlearn, self.runtime, self.work_dir, self.dataset, make_module, self.progress
        )
        label = f"{method.label}, K={'all' if unlearn.K is None else unlearn.K}, by {len(self.units)} units"
        return MethodResult(method.name, label, correction, time.perf_counter() - started)

    @property
    def work_dir(self) -> Path:
        """Where finished units and marks are until the run is."""
        return self.output_dir.with_name(self.output_dir.name + ".work")

    def _progress(self, name: str) -> Any:
        return StepProgress(name, self.touched[0].step, self.log.num_steps, self.progress)

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
        first, *others = run.methods()
        main = run.compute(first, theta) if run.units is None else run.correct_units(first)
        results = [main]
        for other in others:
            try:
                results.append(run.compute(other, theta))
            except LmcError as error:  # the same on all ranks; it must not cost the main result
                logger.warning("%s is left out of the comparison: %s", other.label, error)
        reference, retrain_seconds = None, None
        if config.reference == "retrain":
            reference, retrain_seconds = retrain(run, part / "reference")
        elif config.reference == "replay":
            found = next((r for r in results if r.name == REPLAY), None)
            replayed = found or run.compute(parse_method(REPLAY, 0.0), theta)
            reference, retrain_seconds = replayed.correction.corrected(theta), replayed.seconds
        rows = table(run, theta, results, reference, retrain_seconds)
        result = {
            "status": "done",
            "rel_error": next(row for row in rows if row["method"] == main.name)["rel_error"],
            "seconds_unlearn": main.seconds,
            "seconds_retrain": retrain_seconds,
            "gradients_equivalent": main.correction.gradients_equivalent,
            "v_norm": main.correction.v.norm(),
            "n_units": len(run.units or main.correction.audit),
            "units": None if run.units is None else described(run.units, run.touched),
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
        if config.unlearn.store_units:
            with agreement():
                if runtime.is_main:
                    shutil.copytree(run.work_dir / "units", part / UNITS, copy_function=os.link)
    if run.units is not None:
        remove_folder(run.work_dir)
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

    def _order(result: MethodResult) -> tuple[bool, int, int]:
        head, _, mode = result.name.rpartition("+")
        return result.name == REPLAY, 0 if mode == REPLAY else list(MODES).index(mode), len(head)

    rows = [row("do_nothing", "do nothing", theta, 0.0, 0.0)]
    for r in sorted(results, key=_order):
        rows.append(row(r.name, r.label, r.correction.corrected(theta), r.correction.gradients_equivalent, r.seconds))
    if run.config.reference == "retrain" and reference is not None:
        steps = sum(record.applied for record in run.log.records())
        rows.append(row("retrain", "retrain from scratch", reference, float(steps), retrain_seconds))
    return rows
