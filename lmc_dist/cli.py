"""The command line: `lmc train`, `lmc unlearn`, `lmc baseline`, `lmc evaluate`, `lmc report`, `lmc sweep`, `lmc cell`,
`lmc log …`, `lmc plan …`, and the scripts in launch/ that call the same.

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from lmc_dist.commands import environment, log, plan, requests, run
from lmc_dist.commands.command import Command, Joins
from lmc_dist.config import Config

COMMANDS: dict[str, Command] = {
    **run.COMMANDS,
    **environment.COMMANDS,
    **log.COMMANDS,
    **requests.COMMANDS,
    **plan.COMMANDS,
}


# --- arguments ---------------------------------------------------------------------------------------------------------


def build_parser(name: str | None) -> Any:
    """The parser of a command: the settings it uses, with their docstrings as help; None knows all settings."""
    import argparse

    from jsonargparse import ArgumentParser

    command = None if name is None else COMMANDS[name]
    parser = ArgumentParser(
        prog=None if command is None else f"lmc {name}",
        description=None if command is None else command.description,
        epilog="" if command is None else command.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        default_env=False,
    )
    for argument, setting in {} if command is None else command.positional.items():
        nargs = "*" if command is not None and argument in command.several else "?"
        parser.add_argument(argument, nargs=nargs, type=str, default=None, help=f"the same as --{setting}")
    skipped = set() if command is None else {f.name for f in fields(Config)} - set(command.settings)
    parser.add_class_arguments(Config, None, skip=skipped)
    return parser


@cache
def parsers(name: str) -> tuple[Any, Any]:
    """The parser of all settings, and that of a command; made once, since a sweep parses the options of many cells."""
    parser = build_parser(name)
    parser.add_argument("--config", type=str, default=None, help="YAML or JSON file of settings; options override it")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher, not used")
    return build_parser(None), parser


def parse(name: str, argv: Sequence[str]) -> Config:
    """Settings of a command: defaults, then the file of --config, then the options. Exits with 2 on a bad one."""
    (everything, parser), argv = parsers(name), spelled_out(name, argv)
    found = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a == "--config"]
    found += [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    settings = everything.get_defaults()
    for path in found[-1:]:
        try:
            settings = everything.parse_path(path)
        except (OSError, TypeError) as error:
            parser.error(f"--config {path}: {error}")
    known = set(parser.get_defaults(skip_validation=True).keys())
    parser.set_defaults({key: value for key, value in settings.items() if key in known})
    given, positional = parser.parse_args(list(argv)), COMMANDS[name].positional
    for key, value in given.items():
        if key not in ("config", "local_rank", *positional) and not key.startswith("__"):
            settings[key] = value
    if found and "slurm" in COMMANDS[name].settings and settings["slurm.config"] is None:
        settings["slurm.config"] = found[-1]  # the job runs with the file that it was rendered from
    for argument, setting in positional.items():
        value = given[argument]
        if value not in (None, []):
            settings[setting] = ",".join(value) if argument in COMMANDS[name].several else value
    instantiate = getattr(everything, "instantiate", None) or everything.instantiate_classes
    return Config(**vars(instantiate(settings)))


def spelled_out(name: str, argv: Sequence[str]) -> list[str]:
    """The arguments of a command with its short options replaced by the settings they stand for."""
    short, found = COMMANDS[name].short, []
    for argument in argv:
        if name == "cell" and (argument == "None" or argument.endswith("=None")):  # as wandb's agent writes null
            argument = argument.removesuffix("None") + "null"
        option, equals, value = argument.partition("=")
        found.append(f"--{short[option]}{equals}{value}" if option in short else argument)
    return found


# --- running -----------------------------------------------------------------------------------------------------------


def run_command(name: str, argv: Sequence[str]) -> None:
    """Runs a command with the job's other ranks, prints its text on rank 0, and ends the process."""
    config, command = parse(name, argv), COMMANDS[name]
    if command.joins == "alone":
        run_alone(config, command)
        return
    from lmc_dist.runtime import run

    def body() -> int:
        joins = command.joins(config) if callable(command.joins) else command.joins
        runtime = join(joins)
        if joins == "nobody" and not runtime.is_main:
            return 0
        outcome = command.work(config, runtime)
        text, status = outcome if isinstance(outcome, tuple) else (outcome, 0)
        if runtime.is_main:
            sys.stdout.write(text + "\n")
        return status

    run(body)


def run_alone(config: Config, command: Command) -> None:
    """Runs a command that works where torch does not."""
    from lmc_dist.errors import LmcError

    try:
        outcome = command.work(config, None)
    except LmcError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    text, status = outcome if isinstance(outcome, tuple) else (outcome, 0)
    sys.stdout.write(text + "\n")
    sys.exit(status)


def join(joins: Joins) -> Any:
    """This process among those that a command runs with. Collective."""
    if joins == "engine":
        from lmc_dist import watchdog
        from lmc_dist.runtime import init

        runtime = init()
        watchdog.start(runtime.rank, runtime.world_size)
        return runtime
    from lmc_dist.log_commands.ranks import join_ranks

    return join_ranks()


def train_command(argv: Sequence[str] | None = None) -> None:
    """`lmc train` and launch/train.py."""
    run_command("train", sys.argv[1:] if argv is None else argv)


def unlearn_command(argv: Sequence[str] | None = None) -> None:
    """`lmc unlearn` and launch/unlearn.py."""
    run_command("unlearn", sys.argv[1:] if argv is None else argv)


def baseline_command(argv: Sequence[str] | None = None) -> None:
    """`lmc baseline` and launch/baseline.py."""
    run_command("baseline", sys.argv[1:] if argv is None else argv)


def evaluate_command(argv: Sequence[str] | None = None) -> None:
    """`lmc evaluate` and launch/evaluate.py."""
    run_command("evaluate", sys.argv[1:] if argv is None else argv)


def cell_command(argv: Sequence[str] | None = None) -> None:
    """`lmc cell` and launch/cell.py."""
    run_command("cell", sys.argv[1:] if argv is None else argv)


def sweep_command(argv: Sequence[str] | None = None) -> None:
    """`lmc sweep` and launch/sweep.py."""
    run_command("sweep", sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `lmc` command."""
    import argparse

    width = max(map(len, COMMANDS))

    def listing(names: Sequence[str]) -> str:
        return "commands:\n" + "\n".join(f"  {name:<{width}}  {COMMANDS[name].description}" for name in names)

    parser = argparse.ArgumentParser(
        prog="lmc",
        description=f"Remove the influence of training data from a fine-tuned language model.\n\n{listing(list(COMMANDS))}",
        epilog="`lmc COMMAND --help` shows a command's settings and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(dict.fromkeys(name.split()[0] for name in COMMANDS)))
    arguments = list(sys.argv[1:] if argv is None else argv)
    group = parser.parse_args(arguments[:1]).command
    if group in COMMANDS:
        run_command(group, arguments[1:])
        return
    names = [name for name in COMMANDS if name.startswith(f"{group} ")]
    nested = argparse.ArgumentParser(
        prog=f"lmc {group}",
        description=listing(names),
        epilog=parser.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nested.add_argument("command", choices=[name.split()[1] for name in names])
    run_command(f"{group} {nested.parse_args(arguments[1:2]).command}", arguments[2:])


if __name__ == "__main__":
    main()
