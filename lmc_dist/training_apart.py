"""A training run in processes of its own, started from inside a job: one by each rank, so that any launcher serves both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError, Stopped
from lmc_dist.ports import free_port
from lmc_dist.runtime import STOPPED, Runtime, agreement, broadcast_object
from lmc_dist.trajectory.files import write_json


def train_apart(settings: dict[str, Any], folder: Path, runtime: Runtime, what: str) -> None:
    """Runs `lmc train` with settings on as many ranks as this job has, and waits for it. Collective.

    An engine leaves things behind in its process that another one may meet (docs/engines.md); so none do.

    Args:
        settings: As a configuration file has them.
        folder: For config.json and each rank's output.
        runtime: This rank.
        what: What is trained, for the error.

    Raises:
        LmcError: Training failed; the end of its output is in the message.
    """
    with agreement():
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", settings)
    port = broadcast_object(free_port() if runtime.is_main else None)
    output = folder / f"rank-{runtime.rank}.txt"
    with agreement(), open(output, "w") as file:
        command = [sys.executable, "-m", "lmc_dist.cli", "train", "--config", str(folder / "config.json")]
        status = subprocess.run(
            command, env=child_environment(port), stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
        if status == STOPPED:
            raise Stopped(f"{what} was asked to stop")
        if status != 0:
            tail = "\n".join(output.read_text().strip().splitlines()[-15:])
            raise LmcError(f"{what} failed with status {status}:\n{tail}")


def child_environment(port: int) -> dict[str, str]:
    """This rank's environment for a second process group beside the present one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    return environment | {"MASTER_PORT": str(port)}
