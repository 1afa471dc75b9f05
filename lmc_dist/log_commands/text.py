"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.files import write_json


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: `0–7, 9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}–{high}" for low, high in parts) or "none"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of columns as wide as their longest cell; the first `left` ones are set left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def check_target(option: str, file: str | None) -> None:
    """Checks that a file named on the command line can be written. Local.

    Raises:
        LmcError: There is no such folder.
    """
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise LmcError(f"{option}: there is no folder {Path(file).parent}")


def write_findings(file: str | None, found: dict[str, Any]) -> None:
    """Writes what a command found as JSON, where a file was asked for. Local."""
    if file is not None:
        write_json(Path(file), found)
