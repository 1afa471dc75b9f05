"""Names of files and folders; imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def named(path: str | Path) -> Path:
    """The same place by a path that ends with a name, from which others can be made: `.` and `x/..` do not. Local."""
    path = Path(path)
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))
