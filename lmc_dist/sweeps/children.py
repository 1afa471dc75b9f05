"""A cell in a process of its own: started by its command line, or forked from this one, which has imported everything."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from lmc_dist.errors import LmcError

GRACE_SECONDS = 20.0  # between asking a cell to stop and killing it

# What a cell imports; with torch it takes most of the time of a small one.
PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what `initialize` imports: torch's compiler, most of all
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
    "torch.distributed.checkpoint",
    "scipy.stats",
    "lmc_dist.baselines.run",
    "lmc_dist.training",
    "lmc_dist.unlearn.run",
)


class Child(Protocol):
    """A process that leads a group of its own."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative where a signal ended it.

        Raises:
            subprocess.TimeoutExpired: It has not ended yet.
        """


def start(command: Sequence[str], environment: Mapping[str, str], output: IO[str]) -> Child:
    """A cell by its command line. Local.

    Raises:
        OSError: It cannot be started.
    """
    # The environment's own programs first, as in a shell where it is activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**environment, "PATH": search},
        preexec_fn=os.setpgrp,  # not a session of its own, which Linux would schedule beside this one's others
    )


def preload() -> None:
    """Imports what cells need, so that forks of this process have it. Local.

    Raises:
        LmcError: There is a GPU, which a fork of a process that has looked for it cannot use.
    """
    import torch

    if torch.cuda.is_available():
        raise LmcError("sweep.fork is for machines without a GPU: leave it out, and cells start by their command lines")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_all(PRELOADED)


def import_all(names: Sequence[str]) -> None:
    """Imports modules for all forks of this process to have. Local; before it has threads."""
    for name in names:
        importlib.import_module(name)
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own one would be a named semaphore of each fork, which nobody removes


class Fork:
    """A cell forked from this process; only of one process, and only while this one has no other threads.

    Args:
        arguments: Of `lmc cell`.
        environment: Of the cell.
        output: Where it writes.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: IO[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become(arguments, environment, output)
            except SystemExit as error:  # bad options, already told
                status = error.code if isinstance(error.code, int) else 1
            finally:
                os._exit(status)

    def wait(self, timeout: float | None = None) -> int:
        """As of `Child`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is None or time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise subprocess.TimeoutExpired("lmc cell", timeout or 0.0)


def _become(arguments: Sequence[str], environment: Mapping[str, str], output: IO[str]) -> None:
    """The fork's life: `lmc cell`, which ends the process."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    from lmc_dist.cli import run_command

    run_command("cell", arguments)


def wait(child: Child) -> int:
    """The exit status; where this process is told to stop, the cell is stopped with all it started."""
    try:
        return child.wait()
    except BaseException:
        for signum, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience)
                break
        raise
