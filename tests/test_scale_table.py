"""The scale table of the documentation is what the planner says."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPO


def test_the_documented_scale_table_is_the_planners() -> None:
    command = [sys.executable, str(REPO / "bench" / "scale.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 11
    assert "\n".join(table) in (REPO / "docs" / "scaling.md").read_text()
