"""The scale tables of the documentation are what the planner says."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPO


def test_the_documented_scale_tables_are_the_planners() -> None:
    command = [sys.executable, str(REPO / "bench" / "scale.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = [text for text in done.stdout.split("\n\n") if text.startswith("|")]
    page = (REPO / "docs" / "scaling.md").read_text()
    assert [len(table.splitlines()) for table in tables] == [11, 11]
    assert all(f"\n\n{table}\n\n" in page for table in tables)
