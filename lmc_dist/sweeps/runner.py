"""`lmc sweep`: cells one after the other, each a command line of its own, as wandb's agent would start it.

What is finished is not done again, what was cut off is; a cell that fails is written down, and the others go on.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmc_dist.config import Config, ReportConfig
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import count, size
from lmc_dist.stopping import stop_asked, stopped
from lmc_dist.sweeps.cell import cell_line, empty_row, row_path, stored_row
from lmc_dist.sweeps.children import Child, Fork, preload, start, wait
from lmc_dist.sweeps.plan import PlannedCell, SweepPlan, environment_of, plan_sweep
from lmc_dist.sweeps.summary import failures_text, sweep_table, write_summary
from lmc_dist.trajectory.files import write_json


def sweep(config: Config) -> tuple[str, int]:
    """Runs what sweep files say; returns the table and the exit status, 1 where cells failed. Local.

    Raises:
        LmcError: Before anything runs: files that cannot be carried out, or a report that could not be written.
    """
    settings = config.sweep
    paths = [part.strip() for part in settings.files.split(",") if part.strip()]
    environment = environment_of(settings)
    plan = plan_sweep(paths, environment, settings.seed)
    told = [f"{count(len(plan.cells), 'cell')} in {plan.folder}"]
    for parameters, name in plan.dropped:
        given = " ".join(f"{key}={value}" for key, value in parameters.items())
        told.append(f"dropped: {given}, the same work as {name}")
    if settings.fork and settings.ranks not in (None, 1):
        raise LmcError(f"sweep.fork runs cells of one process, and --ranks is {settings.ranks}: leave one of them out")
    index, of = part_of(settings.part)
    if settings.dry_run:
        return "\n".join([*told, *(shlex.join(cell.command) for cell in plan.cells[index::of])]), 0
    from lmc_dist.report.pictures import require_matplotlib

    require_matplotlib()
    if find_spec("scipy") is None:
        raise LmcError("the intervals of a sweep need scipy: pip install 'lmc_dist[sweep]'")
    if settings.fork:
        preload()
    _say("\n".join(told))
    signal.signal(signal.SIGTERM, _interrupt)
    for i, cell in enumerate(plan.cells, 1):
        if (i - 1) % of != index:
            continue
        row = stored_row(cell.identity)
        if row is not None and (row["failure"] is None or not settings.retry):
            continue
        if (asked := stop_asked()) is not None:
            raise stopped("the sweep stopped before a cell (the same command goes on)", asked)
        found = run_cell(cell, environment, settings.fork)
        _say(f"[{i}/{len(plan.cells)}] {cell_line(found)}")
    if of > 1:
        rows = [stored_row(cell.identity) or empty_row(cell.identity) for cell in plan.cells[index::of]]
        failed = [row for row in rows if row["failure"] is not None]
        done = f"part {index} of {of}: {count(len(rows), 'cell')}, {len(failed)} failed; `lmc sweep` without a part shows all"
        return "\n".join([done, *([failures_text(failed)] if failed else [])]), 1 if failed else 0
    return finish(plan, config)


def part_of(text: str | None) -> tuple[int, int]:
    """(index, number of parts) of `i/n`; None is all. Local.

    Raises:
        LmcError: Not i/n with 0 ≤ i < n.
    """
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise LmcError(f"sweep.part is i/n with i from 0 to n-1, such as 0/4, got '{text}'")
    return int(found[1]), int(found[2])


def run_cell(cell: PlannedCell, environment: Mapping[str, str], fork: bool = False) -> dict[str, Any]:
    """Runs a cell, by its command line or as a fork; returns its row, which says so where it failed. Local."""
    path = row_path(cell.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    log = path.with_name("output.txt")
    started = time.perf_counter()
    with open(log, "w") as output:
        try:
            child: Child = (
                Fork(cell.arguments, environment, output) if fork else start(cell.command, environment, output)
            )
            status = wait(child)
        except OSError as error:
            status = 127
            output.write(f"error: {cell.command[0]} cannot be started: {error.strerror}\n")
    row = stored_row(cell.identity)
    if row is not None and row["failure"] is None and status == 0:
        return row
    if (asked := stop_asked()) is not None:  # the cell was, too: it is cut off, and has not failed
        raise stopped("the sweep stopped in a cell (the same command goes on)", asked)
    row = row or empty_row(cell.identity)
    reason = (row["failure"] or {}).get("reason") or reason_of(log, status)
    row |= {"failure": {"reason": reason, "log": str(log)}, "seconds_cell": time.perf_counter() - started}
    write_json(path, row)
    return row


def reason_of(log: Path, status: int) -> str:
    """Why a command failed, by its output: the first line that names an error, which launchers follow up with their own."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if re.match(r"(error|[\w.]*(Error|Exception|Interrupt))\b:?", line)), None)
    ended = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
    return ended + (f": {said[:500]}" if said else "")


def finish(plan: SweepPlan, config: Config) -> tuple[str, int]:
    """Summary, report, table. Local."""
    from lmc_dist.report.render import report

    folder, settings = Path(plan.folder), config.sweep
    rows = [stored_row(cell.identity) or empty_row(cell.identity) for cell in plan.cells]
    write_summary(folder, plan, rows)
    shown = report(Config(report=ReportConfig(runs=str(folder), output=str(folder / "report")), overwrite=True))
    text = [sweep_table(rows), "", shown]
    failed = [row for row in rows if row["failure"] is not None]
    if failed:
        text += ["", failures_text(failed)]
    if settings.remove_logs and not failed:
        from lmc_dist.sweeps.shared import remove_shared

        text.append(f"removed logs and models that cells share: {size(remove_shared(folder))}")
    return "\n".join(text), 1 if failed else 0


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
