"""`lmc slurm render`: a batch script for a job, with a site's settings filled in."""

from __future__ import annotations

import re
import shlex
from importlib.resources import files
from pathlib import Path

from lmc_dist.config import Config, SlurmConfig
from lmc_dist.errors import LmcError

JOBS = {
    "train": "Fine-tuning with a trajectory log, on any number of nodes; a stopped job goes on where it stopped.",
    "unlearn": "An unlearning run on any number of nodes; a stopped job goes on from its last mark.",
    "sweep": "A sweep, its cells shared out to the tasks of an array; finished cells are not run again.",
}
EXAMPLES = {
    "train": "--log_dir runs/log",
    "unlearn": "--log_dir runs/log",
    "sweep": "FILE --output runs/sweep",
}
LAUNCHERS = ("torchrun", "deepspeed", "srun")


def render(job: str, slurm: SlurmConfig, config: str | None = None) -> str:
    """The text of a batch script. Pure.

    Args:
        job: `train`, `unlearn` or `sweep`.
        slurm: Settings of the site.
        config: File of settings that the job runs with.

    Raises:
        LmcError: An unknown job, or a setting that SLURM could not read.
    """
    from jinja2 import Environment, StrictUndefined

    check(job, slurm)
    source = (files("lmc_dist.slurm") / "job.sbatch.jinja").read_text()
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    arguments = ["--config", config] if config is not None else []
    command = {
        "train": "train --resume true",
        "unlearn": "unlearn",
        "sweep": 'sweep --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --ranks "$RANKS_PER_NODE"',
    }
    return environment.from_string(source).render(
        job=job,
        what=JOBS[job],
        file=f"{job}.sbatch",
        example=EXAMPLES[job],
        slurm=slurm,
        arguments=" ".join([*map(shlex.quote, arguments), slurm.arguments]).strip(),
        command=command[job],
    )


def check(job: str, slurm: SlurmConfig) -> None:
    """Checks the settings of a batch script. Local.

    Raises:
        LmcError: One does not fit.
    """
    if job not in JOBS:
        raise LmcError(f"lmc slurm render: unknown job '{job}'; available: {', '.join(JOBS)}")
    if slurm.launcher not in LAUNCHERS:
        raise LmcError(f"slurm.launcher is one of {', '.join(LAUNCHERS)}, not {slurm.launcher}")
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "grace", "array"):
        if getattr(slurm, name) < 1:
            raise LmcError(f"slurm.{name} must be at least 1, got {getattr(slurm, name)}")
    if slurm.gpus_per_node < 0:
        raise LmcError(f"slurm.gpus_per_node must be ≥ 0, got {slurm.gpus_per_node}")
    for name in ("name", "partition", "account", "time", "memory", "logs"):
        value = getattr(slurm, name)
        if value is not None and not re.fullmatch(r"[\w.,:/@+-]+", value):
            raise LmcError(f"slurm.{name} must be a plain word, got {value!r}")
    if slurm.launcher != "srun" and slurm.gpus_per_node not in (0, slurm.ranks_per_node):
        raise LmcError(
            f"slurm.ranks_per_node={slurm.ranks_per_node} on {slurm.gpus_per_node} GPUs a node: a rank has one GPU each"
        )


def render_job(config: Config) -> str:
    """Writes the script where asked for; returns it, or where it lies. Local."""
    text = render(config.slurm.job, config.slurm, config.slurm.config)
    if config.slurm.output is None:
        return text.rstrip("\n")
    path = Path(config.slurm.output)
    if path.exists() and not config.overwrite:
        raise LmcError(f"{path} exists: choose another slurm.output, or pass --overwrite true")
    from lmc_dist.trajectory.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return f"{path}: sbatch {path}"
