"""What cells of a sweep share, made once whoever comes first: the logged training run, its retrain, and what that scores.

FOLDER/shared/train-DIGEST/     log/, model/, done.json
FOLDER/shared/retrain-DIGEST/   log/, model/, done.json, measured-DIGEST.json
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmc_dist.config import Config, ForgetConfig, LogConfig
from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError
from lmc_dist.runtime import Runtime, agreement, broadcast_object
from lmc_dist.sweeps.identity import retrain_settings, training_settings
from lmc_dist.training_apart import train_apart
from lmc_dist.trajectory.files import read_json, write_json
from lmc_dist.trajectory.lock import LogLock

DONE = "done.json"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Trained:
    """A finished training run.

    Attributes:
        folder: Of all of it.
        summary: What `train` says of it.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def model(self) -> Path:
        return self.folder / "model"


@contextmanager
def turn(folder: Path, is_done: Callable[[], bool], runtime: Runtime) -> Iterator[bool]:
    """Whether a piece of work is left to this job, which then has the folder to itself until the block ends. Collective.

    While another job is at it, this one waits: for that to be done, or to be given up.

    Args:
        folder: Of the work.
        is_done: Whether it is; asked on the first rank.
        runtime: This rank.
    """
    lock: LogLock | None = None
    state = "wait"
    while state == "wait":
        with agreement():
            if runtime.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                state, lock = _try(folder, is_done)
        state = broadcast_object(state)  # one short collective a round: none may wait as long as training takes
        if state == "wait":
            time.sleep(POLL_SECONDS)
    try:
        yield state == "mine"
    finally:
        if lock is not None:
            lock.release()


def _try(folder: Path, is_done: Callable[[], bool]) -> tuple[str, LogLock | None]:
    if is_done():
        return "done", None
    try:
        lock = LogLock(folder)
    except LmcError:
        return "wait", None
    if is_done():  # it was finished in between
        lock.release()
        return "done", None
    return "mine", lock


def trained(config: Config, runtime: Runtime) -> Trained:
    """The logged training run of a cell. Collective.

    Raises:
        LmcError: As `train_apart`.
    """
    key = json_digest([training_settings(config), runtime.world_size])
    plain = replace(config, forget=ForgetConfig())
    return _train(plain, Path(config.cell.folder) / "shared" / f"train-{key[:12]}", runtime)


def retrained(config: Config, runtime: Runtime) -> Trained:
    """The run that never had what the cell forgets. Collective.

    Raises:
        LmcError: As `train_apart`.
    """
    key = json_digest([retrain_settings(config), runtime.world_size])
    small = replace(config, log=LogConfig(storage="replay", save_interval=None))
    return _train(small, Path(config.cell.folder) / "shared" / f"retrain-{key[:12]}", runtime)


def _train(config: Config, folder: Path, runtime: Runtime) -> Trained:
    done = folder / DONE
    with turn(folder, done.exists, runtime) as is_mine:
        if is_mine:
            with agreement():
                if runtime.is_main:  # what a run that was cut off left behind
                    for part in ("log", "model"):
                        shutil.rmtree(folder / part, ignore_errors=True)
            settings = {name: asdict(getattr(config, name)) for name in ("data", "model", "train", "log", "forget")}
            places = {"log_dir": str(folder / "log"), "model_dir": str(folder / "model")}
            train_apart({**settings, **places}, folder, runtime, f"training in {folder}")
            with agreement():
                if runtime.is_main:
                    write_json(done, read_json(folder / "log" / "train.json"))
    with agreement():
        return Trained(folder, read_json(done))


def remove_shared(folder: Path) -> int:
    """Removes the trained models and logs of a finished sweep; returns the bytes. Local.

    Raises:
        LmcError: A job is at one of them.
    """
    from lmc_dist.trajectory.contents import folder_bytes
    from lmc_dist.trajectory.lock import require_free

    found = [path for path in (folder / "shared").glob("*train-*") if path.is_dir()]
    for path in found:
        require_free(path)
    freed = sum(folder_bytes(path) for path in found)
    for path in found:
        (path / DONE).unlink(missing_ok=True)  # first, so that half a folder is never taken for a whole one
        shutil.rmtree(path)
    return freed
