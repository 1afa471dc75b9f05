"""`lmc log spectrum` and `lmc log curvature`: what a log's curvature looks like, and keeping it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.logged_run import LoggedRun, open_logged_run
from lmc_dist.runtime import Runtime, agreement
from lmc_dist.trajectory.files import write_json
from lmc_dist.trajectory.kept import KeptCurvature, curvature_folder, save_curvature
from lmc_dist.unlearn.log_curvature import average_curvature, step_spectrum


def show_spectrum(config: Config, runtime: Runtime) -> str:
    """Largest eigenvalues and trace at a logged step, as text, and as JSON where asked for. Collective.

    Raises:
        LmcError: On every rank, before any long work: no such step, settings out of bounds, another model or dataset.
    """
    settings = config.spectrum
    with agreement():
        if settings.count < 1 or settings.products < 1 or settings.probes < 1:
            raise LmcError("spectrum.count, products and probes must be at least 1")
        if settings.json is not None and not Path(settings.json).parent.is_dir():
            raise LmcError(f"spectrum.json: there is no folder {Path(settings.json).parent}")
        run = open_logged_run(config, runtime)
        log = run.log
        step = (log.first_step + log.num_steps) // 2 if settings.step is None else settings.step
        if not log.first_step <= step < log.num_steps:
            raise LmcError(f"step {step} is not in the log, which holds steps {log.first_step} to {log.num_steps - 1}")
        log.require(step)
    found = step_spectrum(
        log, run.module, run.batches, step, settings.mode, settings.count, settings.products, settings.probes
    )
    if settings.json is not None and runtime.is_main:
        write_json(Path(settings.json), found)
    return spectrum_table(found)


def spectrum_table(found: dict[str, Any]) -> str:
    """The result of `step_spectrum` as text."""
    lines = [f"{found['mode']} of the batch of step {found['step']}, learning rate {found['lr']:g}"]
    lines.append(f"{'':<4}{'eigenvalue':>14}{'± residual':>14}{'η·λ':>10}")
    for i, (value, residual) in enumerate(zip(found["values"], found["residuals"], strict=True)):
        lines.append(f"{i + 1:<4}{value:>14.6g}{residual:>14.2g}{found['lr'] * value:>10.3f}")
    lines.append(f"trace {found['trace']:.6g} ± {found['trace_standard_error']:.2g}")
    limit = found["eta_lambda_max"]
    verdict = "the recursion diverges on steps like this one" if limit > 2 else "the recursion is stable here"
    lines.append(f"η·λ_max = {limit:.3f}: {verdict} (limit 2)")
    return "\n".join(lines)


def keep_curvature(config: Config, runtime: Runtime) -> str:
    """Averages the curvature over windows of the run and keeps its eigenpairs beside the log. Collective.

    Raises:
        LmcError: On every rank, before any long work: a name that is taken, settings out of bounds, missing tensors.
    """
    settings = config.curvature
    with agreement():
        run = open_logged_run(config, runtime)
        folder = curvature_folder(run.log.path, settings.name)
        if folder.exists() and not config.overwrite:
            raise LmcError(
                f"there is a curvature '{settings.name}' beside the log: choose another name, or --overwrite"
            )
        run.log.require(run.log.first_step)
    kept = _average(run, config, runtime)
    save_curvature(run.log.path, kept, run.log.fingerprint)
    return f"{curvature_table(kept)}\nkept in {folder}; use it with --unlearn.hessian_mode low_rank --unlearn.curvature {settings.name}"


def _average(run: LoggedRun, config: Config, runtime: Runtime) -> KeptCurvature:
    from tqdm import tqdm

    settings = asdict(config.curvature)
    with tqdm(total=settings["windows"], desc="curvature", unit="window", disable=not runtime.is_main) as bar:
        return average_curvature(
            run.log, run.module, run.batches, **settings, progress=lambda window: bar.update(window + 1 - bar.n)
        )


def curvature_table(kept: KeptCurvature) -> str:
    """What was kept, as text."""
    lines = [f"{kept.base} on {kept.samples} samples"]
    lines.append(f"{'steps':<14}{'averaged':>9}{'rank':>6}{'λ_1':>12}{'λ_r':>12}{'worst residual':>16}{'missed':>9}")
    for window in kept.windows:
        c = window.curvature
        lines.append(
            f"{f'{window.start}–{window.stop - 1}':<14}{len(window.steps):>9}{len(c.values):>6}{c.values[0]:>12.4g}"
            f"{c.values[-1]:>12.4g}{max(c.residuals):>16.2g}{c.missed:>9.3f}"
        )
    return "\n".join(lines)
