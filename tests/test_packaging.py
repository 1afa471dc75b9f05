"""What is handed out: sdist and wheel, and a newcomer's way from the wheel in an empty environment; how long imports take."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from statistics import median

import pytest
from conftest import REPO

BIN = Path(sys.executable).parent
PACKAGE_DATA = ("lmc_dist/report/page.html", "lmc_dist/slurm/job.sbatch.jinja")
UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|Name or service not known|Temporary failure|No route to host"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist, of a copy of what the repository has."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(REPO / "lmc_dist", source / "lmc_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_and_wheel_hold_the_whole_package(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(REPO)) for path in (REPO / "lmc_dist").rglob("*.py")} | set(PACKAGE_DATA)
    assert not wanted - in_wheel and not wanted - in_sdist
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= in_sdist
    assert not [name for name in in_wheel if name.startswith(("tests/", "bench/", "launch/", "examples/"))]


def install(python: Path, *what: str) -> None:
    """Installs into an environment; skips the test where no package index can be reached."""
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        str(REPO / "constraints.txt"),
        *what,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2400)
    if done.returncode != 0:
        if UNREACHABLE.search(done.stderr):
            pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{' '.join(command)}\n{done.stderr[-3000:]}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_newcomer_in_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The tutorial from the wheel: a Trainer script with the callback, a log, a plan, a deletion, a report."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    pin = re.search(r"(?m)^torch==.*$", (REPO / "constraints.txt").read_text())
    assert pin is not None
    install(programs / "python", pin[0])  # alone, so that nothing replaces it by another build
    install(programs / "python", f"{built[1]}[report]")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("examples", "configs"):
        shutil.copytree(REPO / name, work / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        words = (str(programs / words[0]), *words[1:])
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=work, env=environment, check=False, timeout=900
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    where = ["python", "-c", "import lmc_dist; print(lmc_dist.__file__)"]
    assert str(tmp_path / "venv") in run(*where)
    assert "failed" not in run("lmc", "doctor", "runs/example")
    for command in (
        "python examples/base.py --output runs/example",
        "python examples/trainer.py --model runs/example/base --data runs/example/data.jsonl --log_dir runs/example/log",
        "lmc plan unlearn runs/example/log {request} --plan_unlearn.calibrate 2",
        "lmc unlearn {request} --unlearn.replay_head all --reference replay --output_dir runs/example/unlearned",
        "lmc report runs/example/unlearned --output runs/example/report",
    ):
        run(*command.format(request="--config examples/unlearn.yaml --forget.samples 300-303").split())
    result = json.loads((work / "runs/example/unlearned/result.json").read_text())
    assert result["status"] == "done" and result["rel_error"] == 0
    assert (work / "runs/example/report/report.html").stat().st_size > 10_000
    assert run("lmc", "slurm", "render", "train").startswith("#!/usr/bin/env bash")


# --- seconds -----------------------------------------------------------------------------------------------------------


def processor_seconds(command: list[str]) -> float:
    """What a command takes of a processor, as the median of five: other programs on the machine do not count."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(found)


def test_help_takes_little() -> None:
    assert processor_seconds([str(BIN / "lmc"), "--help"]) <= 0.6


def test_import_takes_little() -> None:
    bare = processor_seconds([sys.executable, "-c", "pass"])
    assert processor_seconds([sys.executable, "-c", "import lmc_dist"]) - bare <= 0.3
