"""Process groups, agreement on errors, and the way out.

An error that one rank alone meets would leave the others waiting in a collective. `agree` turns it into the same
error on every rank; `main` prints it once and exits non-zero everywhere.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist import watchdog
from lmc_dist.errors import LmcError, Stopped
from lmc_dist.paths import named
from lmc_dist.ports import free_port
from lmc_dist.stopping import confirm

logger = logging.getLogger("lmc_dist")


class AgreedError(LmcError):
    """An error that every rank of the group raises together."""


@dataclass(frozen=True)
class Runtime:
    """This process among the ranks of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_minutes: float = 30) -> Runtime:
    """Joins the job's process group through DeepSpeed; a process started alone becomes a group of one. Collective.

    On CPU the group is gloo. DeepSpeed would compile a shared-memory op there first (half a minute, and a C++
    compiler); gloo does not need it, so it is marked incompatible.
    """
    if not dist.is_initialized():
        check_launched(os.environ)
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    quiet(rank)
    use_cuda = torch.cuda.is_available()
    if not use_cuda:
        keep_freed_memory()
    set_threads(use_cuda)
    if use_cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        import deepspeed

        if not use_cuda:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
    world_size = dist.get_world_size()
    expected = int(os.environ["WORLD_SIZE"])
    if world_size != expected:
        raise LmcError(f"the process group has {world_size} ranks, the launcher started {expected}")
    return Runtime(dist.get_rank(), world_size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"))


def check_launched(environment: Mapping[str, str]) -> None:
    """Checks that a rank among several has been told which one it is and where the others are. Pure.

    Raises:
        LmcError: It has not; each process would take itself for the first one, and wait for the others.
    """
    world_size = environment.get("WORLD_SIZE", "1")
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(key)]
    if world_size != "1" and missing:
        raise LmcError(
            f"WORLD_SIZE={world_size} in the environment, without {', '.join(missing)}: start the ranks with torchrun, "
            "deepspeed or `lmc slurm render`, or unset WORLD_SIZE for a single process"
        )


def local_ranks() -> int:
    """Ranks of the job on this host, as far as its launcher says; else all of them. Local."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((value for name in names if (value := os.environ.get(name))), 1))


def set_threads(use_cuda: bool) -> None:
    """Gives this rank its share of the host's cores, unless OMP_NUM_THREADS says otherwise. Local.

    Ranks that share cores slow each other down 5 to 10 times. On GPUs vectors and update rules are still the host's work,
    and torchrun, unless told otherwise, sets one thread a rank.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given is not None and not (use_cuda and given == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next tensor; where it is not glibc, nothing happens.

    glibc returns blocks of some tens of MB to the system whenever they are freed, and every page of the next tensor is
    then faulted in anew: measured, up to a third of the time of a curvature product on CPU.
    """
    import ctypes

    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 64 << 20)


def quiet(rank: int) -> None:
    """Library chatter at warning level; nothing but errors on ranks other than 0."""
    level = logging.WARNING if rank == 0 else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # The libraries set their own levels when they are imported, so they must be imported before being told.
    from deepspeed.utils import logger as deepspeed_logger
    from transformers.utils import logging as transformers_logging

    # DeepSpeed 0.19 calls two collectives by the names torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    deepspeed_logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(level)
    transformers_logging.disable_progress_bar()


def agree(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises the lowest rank's error on every rank, or returns on every rank. Collective.

    Raises:
        AgreedError: Some rank passed an error.
    """
    group = _talking(group)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error if isinstance(error, LmcError) else AgreedError(describe(error)) from error
        return
    failed = torch.tensor([int(error is not None)])
    dist.all_reduce(failed, group=group)
    if not int(failed):
        return
    told: list[tuple[str, bool] | None] = [None] * dist.get_world_size(group)
    mine = None if error is None else (describe(error), isinstance(error, Stopped))
    dist.all_gather_object(told, mine, group=group)
    rank, message = next((r, m[0]) for r, m in enumerate(told) if m is not None)
    everywhere = len({m[0] for m in told if m is not None}) == 1 and None not in told
    if all(m is None or m[1] for m in told):
        raise Stopped(message) from error
    raise AgreedError(message if everywhere else f"rank {rank}: {message}") from error


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, LmcError) else f"{type(error).__name__}: {error}"


@contextmanager
def agreement(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Runs a local block on every rank and raises its error, if any rank has one, on all of them. Collective.

    The block must contain no collective.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, it becomes the error of all ranks
        error = caught
    agree(error, group)


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value on every rank. Collective."""
    group = _talking(group)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def check_replaceable(folder: Path, marker: str, overwrite: bool, is_kept: bool = False) -> None:
    """Checks that results may go to `folder`: absent, empty, or an earlier run's and `overwrite` given. Local.

    Args:
        folder: Where results will go.
        marker: A file by which an earlier run's folder is recognised.
        overwrite: Whether an earlier run may be replaced.
        is_kept: The folder stays and gets the results' files; else it is replaced as a whole.

    Raises:
        LmcError: Neither, or it is the folder that the process is in.
    """
    if not is_kept and Path(os.path.abspath(folder)) == Path.cwd():
        raise LmcError(
            f"{folder} is the present folder, and results replace theirs as a whole: choose another folder, or call from "
            "outside it"
        )
    if not folder.exists() and set_aside(folder).exists() and not overwrite:
        raise LmcError(
            f"{set_aside(folder)} is what a replacement of {folder} that was cut off left: move it back, or pass --overwrite true"
        )
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise LmcError(f"{folder} is not empty: choose another folder, or pass --overwrite true")
    if not (folder / marker).exists():
        raise LmcError(f"{folder} is not overwritten: it holds no {marker}, so no earlier run left it")


def remove_folder(folder: Path, group: dist.ProcessGroup | None = None, only_empty: bool = False) -> None:
    """Removes a folder that `check_replaceable` has passed; one that is absent is fine. Collective."""
    with agreement(group):
        if (not dist.is_initialized() or dist.get_rank() == 0) and folder.exists():
            if not only_empty:
                shutil.rmtree(folder)
            elif not any(folder.iterdir()):
                folder.rmdir()


def set_aside(folder: Path) -> Path:
    """Where the results that are replaced are for a moment. Local."""
    folder = named(folder)
    return folder.with_name(folder.name + ".old")


@contextmanager
def promoted(folder: Path) -> Iterator[Path]:
    """A temporary sibling that replaces `folder` when the block ends well, and is removed when it fails. Collective.

    Whenever it is cut off, the old results are whole, in `folder` or set aside, until the new ones are in `folder`.
    """
    folder = named(folder)
    part = folder.with_name(folder.name + ".part")
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with agreement():
        if is_main:
            if set_aside(folder).exists() and not folder.exists():
                set_aside(folder).rename(folder)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise
    with agreement():  # also waits for all ranks' files
        pass
    with agreement():
        if is_main:
            shutil.rmtree(set_aside(folder), ignore_errors=True)
            if folder.exists():
                folder.rename(set_aside(folder))
            part.rename(folder)
            shutil.rmtree(set_aside(folder), ignore_errors=True)


_cpu_groups: dict[dist.ProcessGroup, dist.ProcessGroup | None] = {}


def cpu_group() -> dist.ProcessGroup | None:
    """A group of all ranks that moves CPU tensors: the default one where it can, else one of gloo. Collective.

    Launchers other than ours often start NCCL alone.
    """
    if not dist.is_initialized():
        return None
    default = dist.group.WORLD
    assert default is not None
    if default not in _cpu_groups:
        backends = str(dist.get_backend_config(default))
        _cpu_groups[default] = None if "cpu:" in backends else dist.new_group(backend="gloo")
    return _cpu_groups[default]


def _talking(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group itself, or, where none is given, all ranks by what moves tensors of the host."""
    return cpu_group() if group is None else group


STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


def run(main: Callable[[], int | None]) -> None:
    """Runs a command on this rank and leaves the process with the status it returns (None is 0).

    After an LmcError the status is 2, after a stop that was asked for 75, after anything else 1; where ranks died, which
    ones is said (lmc_dist/watchdog.py).

    Leaves by `os._exit`: with gloo a process that has finished all its work sometimes aborts in static destructors,
    and the launcher would report a failure. An error is never hidden by it.
    """
    status = 0
    try:
        status = main() or 0
        if dist.is_initialized():
            dist.barrier(cpu_group())
    except LmcError as error:
        status = STOPPED if isinstance(error, Stopped) else 2
        rank = int(os.environ.get("RANK", "0"))
        if isinstance(error, Stopped):
            if rank == 0:
                confirm()
                sys.stderr.write(f"{error}\n")
        elif rank == 0 or not isinstance(error, AgreedError):
            prefix = "" if rank == 0 else f"rank {rank}: "
            sys.stderr.write(f"error: {prefix}{error}\n")
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
        watchdog.explain()
    watchdog.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
