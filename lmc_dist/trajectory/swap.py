"""Putting a new log in the place of an old one: whenever the machine stops, one of them bears the name, and is whole.

Linux exchanges two names at once (renameat2). Where a file system cannot, two renames do it, and whoever comes after a crash
between them ends it (`recover_name`). The new log is made in LOG.rewriting, the old one goes by way of LOG.replaced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from lmc_dist.errors import LmcError
from lmc_dist.paths import named
from lmc_dist.trajectory.files import MANIFEST_FILE, fsync_path
from lmc_dist.trajectory.lock import is_lock_file, require_free
from lmc_dist.trajectory.table import TABLE_FILE

RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
# What a log directory holds; a file of somebody else must not go with the old log.
KNOWN = (
    MANIFEST_FILE,
    TABLE_FILE,
    f"{TABLE_FILE}-journal",
    "steps",
    "snapshots",
    "curvature",
    "train.json",
    "controls.json",
)


def building(log_dir: Path) -> Path:
    """Where the log that is to take a log's place is made. Local."""
    log_dir = named(log_dir)
    return log_dir.with_name(log_dir.name + ".rewriting")


def outgoing(log_dir: Path) -> Path:
    """Where the log that has been replaced is, until it is deleted. Local."""
    log_dir = named(log_dir)
    return log_dir.with_name(log_dir.name + ".replaced")


def foreign(log_dir: Path) -> list[str]:
    """Names in a log directory that are none of a log's. Local."""
    names = sorted(path.name for path in log_dir.iterdir())
    return [n for n in names if n.removesuffix(".part") not in KNOWN and not is_lock_file(n)]


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one operation; false where the system or the file system cannot. Local."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    places = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if function(*places, ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def put_in_place(log_dir: Path) -> None:
    """Gives the log in `building` the name of the old one, which is deleted. Local; all files are on disk by now."""
    new, old = building(log_dir), outgoing(log_dir)
    if exchange(new, log_dir):
        fsync_path(log_dir.parent)
        new.rename(old)
    else:
        log_dir.rename(old)
        try:
            new.rename(log_dir)
        except BaseException:
            old.rename(log_dir)
            raise
        fsync_path(log_dir.parent)
    shutil.rmtree(old)
    fsync_path(log_dir.parent)


def recover_name(log_dir: Path) -> None:
    """Ends an exchange by two renames that was cut off between them. Local.

    Raises:
        LmcError: The job that is at it lives.
    """
    new, old = building(log_dir), outgoing(log_dir)
    if not log_dir.exists() and (new / MANIFEST_FILE).exists() and old.exists():
        require_free(old)
        new.rename(log_dir)
        fsync_path(log_dir.parent)


def remove_leftovers(log_dir: Path) -> list[str]:
    """Deletes what a rewriting that was cut off left beside a log; its names. Local; the log's lock is held.

    Raises:
        LmcError: A folder of that name holds something else.
    """
    found = [folder for folder in (building(log_dir), outgoing(log_dir)) if folder.exists()]
    for folder in found:
        if others := foreign(folder):
            raise LmcError(f"{folder} is in the way, and no rewriting left it (it holds {others[0]}): move it away")
    for folder in found:
        shutil.rmtree(folder)
    return [folder.name for folder in found]
