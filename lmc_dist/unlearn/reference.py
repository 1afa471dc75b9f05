"""The reference: a separate training run of the counterfactual, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc_dist.errors import LmcError
from lmc_dist.ports import free_port
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import write_json
from lmc_dist.trajectory.store import TrajectoryLog

if TYPE_CHECKING:
    from lmc_dist.unlearn.run import UnlearningRun


def retrain(run: UnlearningRun, folder: Path) -> tuple[ShardedVector, float]:
    """(θ_retrain at this rank's layout, seconds) from the training command with the forgotten data masked. Collective.

    Every rank starts the training process of the same rank, so the launcher of this run serves both, on any number of
    nodes. Nothing of replay's code is involved: the two can check each other.

    Raises:
        LmcError: Training failed, or did not start from the weights the log started from.
    """
    config = reference_config(run, folder / "log")
    with agreement():
        if run.runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config)
    started = time.perf_counter()
    port = broadcast_object(free_port() if run.runtime.is_main else None)
    output = folder / f"rank-{run.runtime.rank}.txt"
    with agreement(), open(output, "w") as file:
        command = [sys.executable, "-m", "lmc_dist.cli", "train", "--config", str(folder / "config.json")]
        status = subprocess.run(
            command, env=child_environment(port), stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
        if status != 0:
            tail = "\n".join(output.read_text().strip().splitlines()[-15:])
            raise LmcError(f"the reference training failed with status {status}:\n{tail}")
    seconds = time.perf_counter() - started
    with agreement():
        log = TrajectoryLog(folder / "log")
    if run.log.first_step == 0 and (run.log.theta(0) - log.theta(0)).norm() != 0:
        raise LmcError("the reference did not start from the logged initial weights: is model.path still the same?")
    return log.theta(log.num_steps), seconds


def reference_config(run: UnlearningRun, log_dir: Path) -> dict[str, Any]:
    """The logged run's own training settings, with the request added and nothing but the end kept."""
    logged = run.log.manifest.run["config"]
    present = asdict(run.config)
    return {
        "data": present["data"],
        "model": present["model"],
        "train": logged["train"],
        "log": {"storage": "replay", "save_interval": None, "max_steps": None},
        "forget": present["forget"] | {"counterfactual": run.request.kind},
        "log_dir": str(log_dir),
    }


def child_environment(port: int) -> dict[str, str]:
    """This rank's environment for a second process group beside the present one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    return environment | {"MASTER_PORT": str(port)}
