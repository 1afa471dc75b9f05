"""An unlearning run: open the log, check everything, compute each method, judge it, write the results."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lmc_dist.audit.files import MARKS
from lmc_dist.audit.request import anonymous, described_request
from lmc_dist.audit.run_record import append_run, check_audit, run_salt, take_over
from lmc_dist.config import Config
from lmc_dist.console import StepProgress, UnitProgress
from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
from lmc_dist.errors import LmcError, Stopped
from lmc_dist.logged_run import logged_skeleton, on_shards
from lmc_dist.privacy.checks import check_privacy, check_private_run
from lmc_dist.runtime import Runtime, agreement, promoted, remove_folder
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.tracking import Tracker, audit_summary
from lmc_dist.trajectory.kept import KeptCurvature, load_curvature
from lmc_dist.trajectory.logger import package_versions
from lmc_dist.trajectory.replay import check_ranks
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.asked import AskedRun, gone_after_an_error
from lmc_dist.unlearn.correction import Correction, check_update_rule, compute_correction, is_finite
from lmc_dist.unlearn.head import Head, check_head
from lmc_dist.unlearn.problem import Problem
from lmc_dist.unlearn.recombine import UNITS
from lmc_dist.unlearn.reference import reference_of
from lmc_dist.unlearn.results import write_results
from lmc_dist.unlearn.unit_run import check_units, correct, described, units_of
from lmc_dist.unlearn.unit_sweeps import correct_units, work_digest
from lmc_dist.unlearn.units import Unit, joint_unit

logger = logging.getLogger(__name__)

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


class UnlearningRun(AskedRun):
    """Everything that correcting for one request needs, opened and checked; all ranks construct it together.

    Attributes:
        units: What is corrected one by one; None for one joint correction.
        kept: Curvature that lies beside the log and is used in place of the model's; None for the model's.
    """

    units: list[Unit] | None
    kept: KeptCurvature | None = None

    def check_log(self) -> None:
        config = self.config
        self.units = None if config.unlearn.units == "joint" else units_of(config.unlearn, self.request)
        replays = self.methods()[0].name == REPLAY
        self.log.require(self.touched[0].step, updates=not replays)
        if config.reference == "replay" or any(method.name == REPLAY for method in self.methods()):
            check_ranks(self.log)
        if not replays:
            check_update_rule(self.log.manifest, self.log.records(), self.touched[0].step)
        if config.unlearn.curvature is not None:
            name = config.unlearn.curvature
            self.kept = load_curvature(self.log.path, name, self.log.layout, self.log.fingerprint)
            self.kept.require(self.touched[0].step, self.log.num_steps)
        check_private_run(self)

    def check_settings(self) -> None:
        unlearn = self.config.unlearn
        if unlearn.K is not None and unlearn.K < 0:
            raise LmcError(f"unlearn.K must be ≥ 0 or null, got {unlearn.K}")
        if unlearn.replay_head != "all":
            check_head(unlearn.replay_head, unlearn.head_tolerance)
        self._hvp(unlearn.hessian_mode, unlearn.damping)
        check_units(unlearn)
        if unlearn.curvature is not None and unlearn.hessian_mode != "low_rank":
            raise LmcError(f"unlearn.curvature is for hessian_mode low_rank, not {unlearn.hessian_mode}")
        if unlearn.update == "finite" and (unlearn.K is not None or unlearn.units != "joint"):
            raise LmcError("unlearn.update=finite is not linear in what is forgotten: use K=null and units joint")
        self.methods()
        check_privacy(self.config, self.runtime.is_main)
        check_audit(self.config, self.runtime.is_main)

    def _hvp(self, mode: str, damping: float) -> HVPConfig:
        unlearn = self.config.unlearn
        return HVPConfig(
            mode, damping, probes=unlearn.probes, rank=unlearn.rank, base=unlearn.base, refresh=unlearn.refresh
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
                correction, certificate = self.replay(theta, progress)
                return MethodResult(method.name, label, correction, time.perf_counter() - started, certificate)
            hvp, K = self._hvp(method.hessian_mode, method.damping), unlearn.K
            kept = self.kept if hvp.mode == "low_rank" else None
            is_marked = unlearn.mark_every is not None and kept is None
            label += f" '{kept.name}'" if kept else ""
            label += f", K={'all' if K is None else K}" if method.hessian_mode != "none" or K is not None else ""
            label += f", λ={hvp.damping:g}" if hvp.damping else ""
            label += ", steps as they are" if self._is_finite(kept) else ""
            if is_marked:
                problem = self._problem(hvp, None, unlearn.tol)
                whole = [joint_unit(self.request)]
                head = Head(method.replay_head, unlearn.head_tolerance) if method.replay_head else None
                work = self.work_dir / f"{method.name}-{work_digest(problem, whole, head)[:12]}"
                with gone_after_an_error(work):
                    correction = correct_units(
                        problem,
                        whole,
                        work,
                        mark_every=unlearn.mark_every,
                        progress=progress,
                        keep_marks=self.config.audit.keep_marks and method == self.methods()[0],
                        head=head,
                    )
            else:
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
                    update=unlearn.update,
                )
        return MethodResult(method.name, label, correction, time.perf_counter() - started)

    def correct_units(self, method: Method) -> MethodResult:
        """Each unit by itself, and their sum. Collective."""
        assert self.units is not None
        started, unlearn = time.perf_counter(), self.config.unlearn
        problem = self.problem(method)

        def make_module(layout: ShardLayout) -> ShardedModule:
            device = self.runtime.device
            skeleton = logged_skeleton(self.config, self.model_config, self.log, device)
            return on_shards(
                skeleton, self.config, self.model_config, TrajectoryLog(self.log.path, layout.group), device
            )

        correction = correct(
            problem,
            self.units,
            unlearn,
            self.runtime,
            self.work_dir,
            self.dataset,
            make_module,
            UnitProgress(method.name, len(self.units), self.progress, self.tracker.listeners),
        )
        label = f"{method.label}, K={'all' if unlearn.K is None else unlearn.K}, by {len(self.units)} units"
        return MethodResult(method.name, label, correction, time.perf_counter() - started)

    def problem(self, method: Method, tol: float | None = None) -> Problem:
        """What a method's sweep is computed from. Local."""
        hvp = self._hvp(method.hessian_mode, method.damping)
        return self._problem(hvp, self.kept if hvp.mode == "low_rank" else None, tol)

    def _problem(self, hvp: HVPConfig, kept: KeptCurvature | None, tol: float | None = None) -> Problem:
        loss, K = TokenCrossEntropy(), self.config.unlearn.K
        finite = self._is_finite(kept)
        return Problem(self.log, self.module, loss, self.batches, self.request, hvp, K, kept, tol, is_finite=finite)

    def _is_finite(self, kept: KeptCurvature | None) -> bool:
        unlearn = self.config.unlearn
        is_joint = self.units is None
        return is_joint and is_finite(unlearn.update, self.log, self.touched[0].step, unlearn.K, kept)

    def _progress(self, name: str) -> Any:
        span = self.touched[0].step, self.log.num_steps
        return StepProgress(name, *span, self.progress, self.tracker.listeners)


def warn_of_unfinished(log: TrajectoryLog) -> None:
    """Says so where a log is known not to reach the end of its run. Local."""
    if log.num_steps not in log.snapshots:
        logger.warning(
            "%s has no snapshot of its end, step %d: its run was cut off or still runs, and what is corrected is the model "
            "after that step, not the one that the run would end with",
            log.path,
            log.num_steps,
        )


def unlearn(config: Config, runtime: Runtime, tracker: Tracker | None = None, ends: bool = True) -> dict[str, Any]:
    """Runs a request to the end and leaves `output_dir`; returns what result.json holds. Collective.

    Args:
        config: Settings.
        runtime: This rank.
        tracker: Of the job that this is a part of; None starts one where the settings ask for it.
        ends: Whether the table also has doing nothing and retraining.
    """
    run = UnlearningRun(config, runtime)
    with run.tracked_by(tracker):
        return _unlearn(run, ends)


def _unlearn(run: UnlearningRun, ends: bool) -> dict[str, Any]:
    config, runtime, tau = run.config, run.runtime, run.log.num_steps
    theta = run.log.theta(tau)
    warn_of_unfinished(run.log)
    with promoted(run.output_dir) as part:
        first, *others = run.methods()
        main = run.compute(first, theta) if run.units is None else run.correct_units(first)
        results = [main]
        for other in others:
            try:
                results.append(run.compute(other, theta))
            except Stopped:
                raise
            except LmcError as error:  # the same on all ranks; it must not cost the main result
                logger.warning("%s is left out of the comparison: %s", other.label, error)

        def replayed() -> tuple[ShardedVector, float]:
            found = next((r for r in results if r.name == REPLAY), None)
            found = found or run.compute(parse_method(REPLAY, 0.0), theta)
            return found.correction.corrected(theta), found.seconds

        reference, retrain_seconds = reference_of(run, part / "reference", replayed)
        rows = table(run, theta, results, reference, retrain_seconds, ends)
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
            "request": run.asked(),
            "replay": main.replay,
            "rows": rows,
            "privacy": None,
        }
        released = main.correction
        if config.privacy.basis != "off":
            from lmc_dist.privacy.run import release

            released, result["privacy"] = release(run, main, theta, reference)
        take_over(run.output_dir, part)
        salt = run_salt(config, part)
        settings, request = result["config"], described_request(run.asked_for, salt)
        result, released = anonymous(result, released, request, salt, config.unlearn.store_units)
        write_results(part, run.log, run.module, released.corrected(theta), released, result, run.tokenizer)
        if config.unlearn.store_units:
            with agreement():
                if runtime.is_main:
                    shutil.copytree(run.work_dir / "units", part / UNITS, copy_function=os.link)
        if config.audit.keep_marks:
            with agreement():
                if runtime.is_main:
                    (kept,) = run.work_dir.glob(f"{first.name}-*/marks")
                    shutil.copytree(kept, part / MARKS, copy_function=os.link)
        append_run("unlearn", part, config, settings, request, result, released, salt)
    remove_folder(run.work_dir)
    names = ("rel_error", "seconds_unlearn", "seconds_retrain", "gradients_equivalent", "v_norm", "n_units")
    figures = {**{name: result[name] for name in names}, "methods": {row["method"]: row for row in rows}}
    run.tracker.summary({**figures, "audit": audit_summary(main.correction.audit)})
    return result


def table(
    run: UnlearningRun,
    theta: ShardedVector,
    results: list[MethodResult],
    reference: ShardedVector | None,
    retrain_seconds: float | None,
    ends: bool,
) -> list[dict[str, Any]]:
    """One row a method, with `ends` between doing nothing and retraining. Collective."""

    def row(method: str, label: str, weights: ShardedVector, gradients: float, seconds: float | None) -> dict[str, Any]:
        return run.row(method, label, weights, gradients, seconds, theta, reference)

    def _order(result: MethodResult) -> tuple[bool, int, int]:
        head, _, mode = result.name.rpartition("+")
        return result.name == REPLAY, 0 if mode == REPLAY else list(MODES).index(mode), len(head)

    rows = [row("do_nothing", "do nothing", theta, 0.0, 0.0)] if ends else []
    for r in sorted(results, key=_order):
        rows.append(row(r.name, r.label, r.correction.corrected(theta), r.correction.gradients_equivalent, r.seconds))
    if ends and run.config.reference not in ("none", "replay") and reference is not None:
        steps = sum(record.applied for record in run.log.records())
        rows.append(row("retrain", "retrain from scratch", reference, float(steps), retrain_seconds))
    return rows
