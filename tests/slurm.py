"""A real SLURM on this machine: munge, a controller, and daemons that stand for two nodes. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from lmc_dist.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")


def missing() -> str | None:
    """Why it cannot be started here; None where it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "its daemons are started as root"


class Slurm:
    """The daemons; `folder` holds all their files."""

    def __init__(self, folder: Path) -> None:
        self.folder, host = folder, socket.gethostname().split(".")[0]
        folder.mkdir(parents=True)
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=1000"
            for name in NODES
        ]
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdLogFile": f"{folder}/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerType": "sched/backfill",
            "JobRequeue": 1,
        }
        lines = [*(f"{key}={value}" for key, value in settings.items()), *nodes]
        lines.append(f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin",
        }
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={folder / file}" for name, file in (files | {"seed-file": "munge.seed"}).items()]
        self.run("munged", "--force", *options)
        self.run("slurmctld", "-i")
        for node in NODES:
            self.run("slurmd", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%T %D").strip() == f"idle {len(NODES)}", 30)

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment | environment, check=False, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, found: object, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not found():  # type: ignore[operator]
            assert time.monotonic() < deadline, self.run("squeue") + (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)

    def states(self, job: str) -> list[str]:
        """RUNNING, PENDING, COMPLETED, FAILED, … of each task of an array; those that wait count as one."""
        words = self.run("scontrol", "show", "job", job).split()
        return [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]

    def state(self, job: str) -> str:
        """That of a job which is no array."""
        return self.states(job)[0]

    def close(self) -> None:
        """Ends all daemons, and the jobs with them."""
        subprocess.run(["scancel", "--full", "--user", "root"], env=self.environment, check=False, capture_output=True)
        time.sleep(1)
        for path in self.folder.glob("*.pid"):
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (ValueError, ProcessLookupError):
                continue
