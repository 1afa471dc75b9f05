"""Sweep files → the cells to run, each once, whatever its settings are written like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmc_dist.config import SweepConfig
from lmc_dist.errors import LmcError
from lmc_dist.sweeps.grid import SweepFile, combinations, program_arguments, read_sweep, render
from lmc_dist.sweeps.identity import Identity, identify


@dataclass(frozen=True)
class PlannedCell:
    """A cell to run.

    Attributes:
        identity: What it is.
        command: What starts it.
        arguments: What its program is given there.
        path: Its sweep file.
    """

    identity: Identity
    command: list[str]
    arguments: list[str]
    path: str


@dataclass(frozen=True)
class SweepPlan:
    """All cells of some sweep files.

    Attributes:
        files: The files.
        cells: In their order.
        dropped: (parameters, name of the cell that does the same work).
    """

    files: list[SweepFile]
    cells: list[PlannedCell]
    dropped: list[tuple[dict[str, Any], str]]

    @property
    def folder(self) -> str:
        """Of the sweep, the same for all cells."""
        return self.cells[0].identity.config.cell.folder


def environment_of(sweep: SweepConfig) -> dict[str, str]:
    """Variables for the commands of sweep files: those of the environment, and what the options say instead. Local."""
    ranks = 1 if sweep.fork else sweep.ranks
    given = {"LMC_DATA": sweep.data, "LMC_MODEL": sweep.model, "LMC_OUTPUT": sweep.output, "LMC_RANKS": ranks}
    return {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}


def plan_sweep(paths: Sequence[str], environment: Mapping[str, str], seed: int) -> SweepPlan:
    """Reads and checks everything before anything runs. Local.

    Raises:
        LmcError: No file, one that cannot be carried out, settings that no cell can have, or files of several folders.
        SystemExit: With status 2 after a message: an option that `lmc cell` does not know.
    """
    from lmc_dist.cli import parse

    if not paths:
        raise LmcError("say which sweep: lmc sweep FILE [FILE …], as for `wandb sweep`")
    files = [read_sweep(path) for path in paths]
    cells: dict[str, PlannedCell] = {}
    dropped: list[tuple[dict[str, Any], str]] = []
    folders: set[str] = set()
    for file in files:
        for parameters in combinations(file, seed):
            command = render(file, parameters, environment)
            arguments = program_arguments(file, command)
            identity = identify(parse("cell", arguments))
            folders.add(identity.config.cell.folder)
            if identity.name in cells:
                dropped.append((parameters, identity.name))
            else:
                cells[identity.name] = PlannedCell(identity, command, arguments, str(file.path))
    if len(folders) > 1:
        raise LmcError(f"cells of one sweep need one cell.folder, and these have {' and '.join(sorted(folders))}")
    return SweepPlan(files, list(cells.values()), dropped)
