"""One writer a log: a lock file that says who holds it and that it is still alive.

A file created with O_EXCL is atomic on local file systems and on NFS since version 3, where advisory locks are not to
be relied on. A holder that was killed leaves its file behind; it is taken over when its process is gone (same host) or
when its heartbeat, the file's modification time, has stopped (any host).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.sealed import DIGEST, content_digest, read_sealed

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0


class LogLock:
    """Holds a log directory for writing. Local; rank 0 alone takes it.

    Args:
        folder: The log directory, which exists.
        heartbeat_seconds: How often the file is touched.
        stale_seconds: Age of the last heartbeat at which a holder counts as dead.

    Raises:
        LmcError: Another job holds it; the message says which.
    """

    def __init__(
        self, folder: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS, stale_seconds: float = STALE_SECONDS
    ) -> None:
        self.path = folder / LOCK_FILE
        self.token = uuid.uuid4().hex
        self.error: LmcError | None = None
        self._take(stale_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True)
        self._thread.start()

    def _take(self, stale_seconds: float) -> None:
        for _ in range(5):  # others may be taking over the same stale lock
            if self._create():
                return
            holder = read_holder(self.path)
            if holder is None:
                continue  # released in between
            refuse_living(self.path.parent, holder, heartbeat_age(self.path), stale_seconds)
            self._evict(holder)
        raise LmcError(f"{self.path} cannot be taken: other jobs are taking it at the same time")

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "token": self.token,
        }
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({**holder, DIGEST: content_digest(holder)}, file)
        except OSError:  # no room: a file that says nothing would keep everybody out for a while
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _evict(self, holder: dict[str, Any]) -> None:
        """Moves a dead holder's file away, and back if it was another's by then: a rename has one winner."""
        aside = self.path.with_name(f"{LOCK_FILE}.{self.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if read_holder(aside) != holder:
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                if (read_holder(self.path) or {}).get("token") != self.token:
                    self.error = LmcError(
                        f"{self.path} was taken by another job, or removed, while this one was writing"
                    )
                    return
                os.utime(self.path)
            except OSError as error:
                self.error = LmcError(f"{self.path} cannot be kept alive: {error}")
                return

    def release(self) -> None:
        """Gives the log free; a lock lost to another job is left to it."""
        self._stop.set()
        self._thread.join()
        if (read_holder(self.path) or {}).get("token") == self.token:
            self.path.unlink()


def require_free(folder: Path) -> None:
    """Checks that no living job writes a log. Local.

    Raises:
        LmcError: One does.
    """
    holder = read_holder(folder / LOCK_FILE)
    if holder is not None:
        refuse_living(folder, holder, heartbeat_age(folder / LOCK_FILE), STALE_SECONDS)


def refuse_living(folder: Path, holder: dict[str, Any], age: float, stale_seconds: float) -> None:
    if not is_dead(holder, age, stale_seconds):
        who = (
            f"process {holder.get('pid')} on {holder.get('host')}"
            if holder
            else f"a job that {LOCK_FILE} does not name"
        )
        raise LmcError(
            f"log_dir {folder} is being written by {who} (last sign of life {age:.0f} s ago): choose another log_dir, or "
            f"stop that job. A job that died on another host is recognised after {stale_seconds:.0f} s without one"
        )


def read_holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock file; None where there is none, {} where its writer has not finished or it is damaged."""
    try:
        return read_sealed(path)
    except LmcError:
        return {} if path.exists() or path.is_symlink() else None


def is_lock_file(name: str) -> bool:
    """Whether a file of a log directory is its lock, or was left behind by somebody who looked at it or took it over."""
    return name == LOCK_FILE or name.startswith(f"{LOCK_FILE}.")


def heartbeat_age(path: Path) -> float:
    """Seconds since the last heartbeat by the clock of the file system, which all hosts share."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def is_dead(holder: dict[str, Any], age: float, stale_seconds: float) -> bool:
    """Whether the process that wrote the lock is gone."""
    if age > stale_seconds:
        return True
    return holder.get("host") == socket.gethostname() and started(holder.get("pid")) != holder.get("started")


def started(pid: Any) -> str | None:
    """When a process of this host began, in clock ticks since boot; None where it is gone (or already a zombie).

    It tells a process from a later one with the same number, and the boot it belongs to from another.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
