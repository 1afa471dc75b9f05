"""The machine and its scheduler."""

from __future__ import annotations

from typing import Any

from lmc_dist.commands.command import Command, Outcome
from lmc_dist.config import Config


def slurm_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.slurm.render import render_job

    return render_job(config)


def environment_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.environment import examine

    return examine(config)


COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "Look at the environment: versions, GPUs, operators, compiler, launchers, a folder; with advice (a log: log doctor).",
        """
examples:
  lmc doctor
  lmc doctor runs/log --json environment.json

FOLDER is where a log is to go: it is checked for writing and for room. Of a log that is there, with its model and data, the
command is `lmc log doctor`.

Exit status: 0, or 1 where something that is needed is missing, 2 for bad input.
""",
        ("environment", "json"),
        environment_work,
        "alone",
        {"FOLDER": "environment.folder"},
    ),
    "slurm render": Command(
        "A batch script for SLURM that starts a job on any number of nodes, stops it in time, and lets it go on.",
        """
examples:
  lmc slurm render unlearn --slurm.nodes 2 --slurm.time 02:00:00 --slurm.output unlearn.sbatch
  lmc slurm render train --config configs/demo.yaml --slurm.launcher srun --slurm.gpus_per_node 0 \\
      --slurm.ranks_per_node 2 --slurm.arguments "--model.path runs/base --log_dir runs/log"
  sbatch unlearn.sbatch --config configs/demo.yaml --log_dir runs/log --forget.batches 5

Settings may also stand in the `slurm:` section of the file of --config, which the job then runs with.
""",
        ("slurm", "overwrite"),
        slurm_work,
        "nobody",
        {"JOB": "slurm.job"},
        {"--output": "slurm.output"},
    ),
}
