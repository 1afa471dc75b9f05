"""`lmc doctor`: what it says of this environment, and of ones that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmc_dist import environment
from lmc_dist.cli import parse
from lmc_dist.environment import examine, guarded, packages, text, writable

BIN = Path(sys.executable).parent


def test_this_environment(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = subprocess.run(
        [str(BIN / "lmc"), "doctor", str(tmp_path / "runs" / "log"), "--json", str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )
    found = {entry["name"]: entry for entry in json.loads(target.read_text())}
    assert done.returncode == int(any(entry["status"] == "failed" for entry in found.values())), done.stdout
    for name in ("python", "packages", "torch", "backends", "deepspeed", "folder"):
        assert found[name]["status"] == "ok", done.stdout
        assert name in done.stdout
    assert "gloo" in found["backends"]["found"] and "cpu_adam" in found["deepspeed"]["found"]
    assert not list(tmp_path.glob(".lmc-doctor-*"))


def test_what_is_missing_fails_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from packaging.requirements import Requirement

    wanted = [(Requirement("no-such-package"), None), (Requirement("numpy<0.1"), None)]
    monkeypatch.setattr(environment, "requirements", lambda: wanted)
    (finding,) = packages()
    assert finding.status == "failed" and finding.advice
    assert "no-such-package is missing" in finding.found and "needed is <0.1" in finding.found
    told, status = examine(parse("doctor", ["--json", str(tmp_path / "found.json")]))
    assert status == 1 and "what to do\n  packages: pip install" in told

    def broken() -> list[environment.Finding]:
        raise ImportError("libcuda.so.1: cannot open shared object file\nmore")

    (finding,) = guarded("torch", broken)
    assert finding.status == "failed" and finding.found.endswith("cannot open shared object file")
    assert "more" not in text([finding])


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable(tmp_path / "a" / "b").status == "ok"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert writable(tmp_path / "file").status == "failed"
    assert writable(Path("/proc/nowhere")).status == "failed"  # no rights help there
    monkeypatch.setattr(environment, "SMALL_FOLDER", 1 << 60)
    assert writable(tmp_path).status == "warning"


def test_it_works_where_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken on purpose')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lmc_dist.cli", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    assert "broken on purpose" in done.stdout and "Traceback" not in done.stderr


def test_help_tells_it_from_the_doctor_of_logs() -> None:
    done = subprocess.run([str(BIN / "lmc"), "doctor", "--help"], capture_output=True, text=True, check=True)
    assert "lmc log doctor" in done.stdout


def test_a_bad_target_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "lmc"), "doctor", "--json", str(tmp_path / "no" / "x.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: json: there is no folder")


def test_a_build_that_was_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert environment.deepspeed()[0].status == "ok"
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (found,) = environment.deepspeed()
    assert found.status == "warning" and "a build was begun and not ended" in found.found
    assert f"remove {lock}" in found.advice
