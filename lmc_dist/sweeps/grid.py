"""A sweep file as W&B has it → the command lines that its agent would start.

The rules are wandb's own (`wandb/wandb_agent.py`, `wandb/sdk/launch/sweeps/utils.py`, 0.31): parameters are combined in the
order of their names, the last one fastest, and `${…}` in `command` is filled in. What needs W&B's server (search by results,
early stopping) and what `lmc cell` could not read is refused; a command line is never made up from less.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError, first_line

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_ARGUMENTS = ("args", "args_no_equals")
_KNOWN = {"program", "command", "method", "parameters", "run_cap", "name", "project", "entity", "description", "metric"}


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file describes it.

    Attributes:
        path: The file.
        program: Script that a cell runs.
        command: With its macros.
        method: `grid` or `random`.
        parameters: Name → values.
        run_cap: Cells at most; `random` has no other end.
        content: All that the file says.
    """

    path: Path
    program: str
    command: tuple[str, ...]
    method: str
    parameters: dict[str, list[Any]]
    run_cap: int | None
    content: dict[str, Any]


def read_sweep(path: str | Path) -> SweepFile:
    """A sweep file, as far as it can be carried out without a server. Local.

    Raises:
        LmcError: No such file, no sweep, or one that only W&B's server can carry out; the file is named.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LmcError(f"sweep file {path} cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise LmcError(f"sweep file {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict) or not content["parameters"]:
        raise LmcError(f"sweep file {path} needs 'method', 'program' and 'parameters'")
    if unknown := sorted(map(str, set(content) - _KNOWN)):
        raise LmcError(f"sweep file {path}: '{unknown[0]}' needs W&B's server (wandb sweep {path}), or is misspelt")
    method, cap = content.get("method"), content.get("run_cap")
    if method not in ("grid", "random"):
        raise LmcError(f"sweep file {path}: method {method!r} needs W&B's server; here it is grid or random")
    if cap is not None and not (type(cap) is int and cap > 0):
        raise LmcError(f"sweep file {path}: run_cap must be a number of runs, got {cap!r}")
    if method == "random" and cap is None:
        raise LmcError(f"sweep file {path}: method random needs run_cap, or it would never end")
    command = content.get("command", list(DEFAULT_COMMAND))
    if not isinstance(command, list) or not command or not isinstance(content.get("program"), str):
        raise LmcError(f"sweep file {path} needs 'program', a script, and 'command', a list")
    parameters = {str(name): _values(path, name, given) for name, given in content["parameters"].items()}
    return SweepFile(Path(path), content["program"], tuple(map(str, command)), method, parameters, cap, content)


def _values(path: str | Path, name: Any, given: Any) -> list[Any]:
    """The values of a parameter."""
    if isinstance(given, dict) and set(given) <= {"value", "distribution"} and "value" in given:
        return [given["value"]]
    if isinstance(given, dict) and set(given) <= {"values", "distribution"}:
        values = given.get("values")
        if isinstance(values, list) and values:
            return values
    raise LmcError(
        f"sweep file {path}: parameter {name} needs 'value' or 'values' (a list that is not empty); ranges, probabilities "
        "and nested parameters are not carried out here"
    )


def combinations(sweep: SweepFile, seed: int = 0) -> list[dict[str, Any]]:
    """The parameters of each cell: all combinations, or `run_cap` draws. Local."""
    names = sorted(sweep.parameters)
    values = [sweep.parameters[name] for name in names]
    if sweep.method == "grid":
        every = itertools.product(*values)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.islice(every, sweep.run_cap)]
    chance = random.Random(seed)
    assert sweep.run_cap is not None
    return [{name: chance.choice(v) for name, v in zip(names, values, strict=True)} for _ in range(sweep.run_cap)]


def render(sweep: SweepFile, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The command line of a cell. Local.

    Args:
        sweep: Its file.
        parameters: Its parameters.
        environment: Where `${envvar:NAME}` is looked up.

    Raises:
        LmcError: A macro that is not known here, or a variable that is not set: wandb's agent would leave its name there.
    """
    macros = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [sweep.program],
        "args": [f"--{name}={value}" for name, value in parameters.items()],
        "args_no_equals": [part for name, value in parameters.items() for part in (f"--{name}", str(value))],
    }
    found: list[str] = []
    for part in sweep.command:
        part = _VARIABLE.sub(lambda match: _variable(sweep, match.group(1), environment), part)
        if not (part.startswith("${") and part.endswith("}")):
            found.append(part)
        elif part[2:-1] in macros:
            found += macros[part[2:-1]]
        else:
            raise LmcError(f"sweep file {sweep.path}: {part} in 'command' is not known; known: {', '.join(macros)}")
    return found


def _variable(sweep: SweepFile, name: str, environment: Mapping[str, str]) -> str:
    if name not in environment:
        option = {
            "LMC_DATA": " (--data)",
            "LMC_MODEL": " (--model)",
            "LMC_OUTPUT": " (--output)",
            "LMC_RANKS": " (--ranks)",
        }
        raise LmcError(f"sweep file {sweep.path} uses the variable {name}, which is not set{option.get(name, '')}")
    return environment[name]


def program_arguments(sweep: SweepFile, command: Sequence[str]) -> list[str]:
    """What the program of a command line is given. Local.

    Raises:
        LmcError: The command does not start the file's program.
    """
    if "${program}" not in sweep.command or not any(f"${{{name}}}" in sweep.command for name in _ARGUMENTS):
        raise LmcError(
            f"sweep file {sweep.path}: 'command' must have ${{program}} and ${{args}}, or no cell is told apart"
        )
    return list(command[command.index(sweep.program) + 1 :])
