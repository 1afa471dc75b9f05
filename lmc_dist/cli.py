"""The command line: `lmc train`, `lmc unlearn`, and the scripts in launch/ that call the same functions.

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lmc_dist.config import Config

TRAIN_EXAMPLES = """
examples:
  deepspeed --num_accelerators 2 launch/train.py --config configs/tofu.yaml --data.path DATA --model.path MODEL
  torchrun --nproc_per_node 2 launch/train.py --config configs/demo_base.yaml --log_dir runs/base_log --model_dir runs/base
  lmc train --config configs/demo.yaml --model.path runs/base --log_dir runs/log --train.learning_rate 0.02

With a forget option the same command trains the reference: the run that never had that data.
"""

UNLEARN_EXAMPLES = """
examples:
  deepspeed --num_accelerators 2 launch/unlearn.py --config configs/tofu.yaml --log_dir runs/tofu/log \\
      --forget.split forget01 --output_dir runs/tofu/unlearn --reference retrain
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.batches 5,17 --compare replay

what to forget: --forget.samples takes ids (3,17,20-29) or a .json/.jsonl file of ids, --forget.split the name of a
split, --forget.batches ids of logged batches.
"""

SPECTRUM_EXAMPLES = """
examples:
  lmc log spectrum --config configs/demo.yaml --model.path runs/base --log_dir runs/log
  deepspeed --num_accelerators 2 -m lmc_dist.cli log spectrum --config configs/tofu.yaml --log_dir runs/tofu/log \\
      --spectrum.step 62 --spectrum.mode exact --spectrum.json spectrum.json
"""

CURVATURE_EXAMPLES = """
examples:
  lmc log curvature --config configs/demo.yaml --model.path runs/base --log_dir runs/log --curvature.rank 64
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.batches 5 \\
      --unlearn.hessian_mode low_rank --unlearn.curvature default
"""

DESCRIPTIONS = {
    "train": "Fine-tune under DeepSpeed ZeRO-3 and write a trajectory log.",
    "unlearn": "Compute the model that the logged training would have reached without some data.",
    "log spectrum": "Largest eigenvalues and trace of the curvature at a logged step, and what they mean for stability.",
    "log curvature": "Keep the largest eigenpairs of the curvature beside the log, for use without model and data.",
}

# Settings that a command does not use; a configuration file may still hold them, since one file serves all commands.
_RUNS = {"train", "log", "forget", "unlearn", "model_dir", "output_dir", "reference", "compare", "resume"}
UNUSED = {
    "train": {"unlearn", "spectrum", "curvature", "output_dir", "reference", "compare"},
    "unlearn": {"train", "log", "spectrum", "curvature", "model_dir", "resume"},
    "log spectrum": _RUNS | {"curvature", "overwrite"},
    "log curvature": _RUNS | {"spectrum"},
}


def build_parser(command: str | None, epilog: str = "") -> Any:
    """The parser of a command: the settings it uses, with their docstrings as help; None knows all settings."""
    import argparse

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=None if command is None else f"lmc {command}",
        description=None if command is None else DESCRIPTIONS[command],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        default_env=False,
    )
    parser.add_class_arguments(Config, None, skip=UNUSED.get(command or "", set()))
    return parser


def parse(command: str, argv: Sequence[str], epilog: str) -> Config:
    """Settings of a command: defaults, then the file of --config, then the options. Exits with 2 on a bad one."""
    everything = build_parser(None)
    parser = build_parser(command, epilog)
    parser.add_argument("--config", type=str, default=None, help="YAML or JSON file of settings; options override it")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher, not used")
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
    given = parser.parse_args(list(argv))
    for key, value in given.items():
        if key not in ("config", "local_rank") and not key.startswith("__"):
            settings[key] = value
    instantiate = getattr(everything, "instantiate", None) or everything.instantiate_classes
    return Config(**vars(instantiate(settings)))


def train_command(argv: Sequence[str] | None = None) -> None:
    """`lmc train` and launch/train.py."""
    config = parse("train", sys.argv[1:] if argv is None else argv, TRAIN_EXAMPLES)

    def work(runtime: Any) -> str:
        from lmc_dist.console import training_table
        from lmc_dist.training import train

        return training_table(train(config, runtime))

    run_on_ranks(work)


def unlearn_command(argv: Sequence[str] | None = None) -> None:
    """`lmc unlearn` and launch/unlearn.py."""
    config = parse("unlearn", sys.argv[1:] if argv is None else argv, UNLEARN_EXAMPLES)

    def work(runtime: Any) -> str:
        from lmc_dist.console import unlearning_table
        from lmc_dist.unlearn.run import unlearn

        return f"{unlearning_table(unlearn(config, runtime))}\nresults in {config.output_dir}"

    run_on_ranks(work)


def spectrum_command(argv: Sequence[str]) -> None:
    """`lmc log spectrum`."""
    config = parse("log spectrum", argv, SPECTRUM_EXAMPLES)

    def work(runtime: Any) -> str:
        from lmc_dist.log_commands import show_spectrum

        return show_spectrum(config, runtime)

    run_on_ranks(work)


def curvature_command(argv: Sequence[str]) -> None:
    """`lmc log curvature`."""
    config = parse("log curvature", argv, CURVATURE_EXAMPLES)

    def work(runtime: Any) -> str:
        from lmc_dist.log_commands import keep_curvature

        return keep_curvature(config, runtime)

    run_on_ranks(work)


def run_on_ranks(work: Callable[[Any], str]) -> None:
    """Runs a command's work in the job's process group, prints its text on rank 0, and ends the process."""
    from lmc_dist.runtime import init, run

    def body() -> None:
        runtime = init()
        text = work(runtime)
        if runtime.is_main:
            sys.stdout.write(text + "\n")

    run(body)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "unlearn": unlearn_command,
    "log spectrum": spectrum_command,
    "log curvature": curvature_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `lmc` command."""
    import argparse

    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {DESCRIPTIONS[name]}" for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="lmc",
        description=f"Remove the influence of training data from a fine-tuned language model.\n\ncommands:\n{listing}",
        epilog="`lmc COMMAND --help` shows a command's settings and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=sorted({name.split()[0] for name in COMMANDS}))
    arguments = list(sys.argv[1:] if argv is None else argv)
    group = parser.parse_args(arguments[:1]).command
    if group in COMMANDS:
        COMMANDS[group](arguments[1:])
        return
    nested = argparse.ArgumentParser(prog=f"lmc {group}", epilog=parser.epilog)
    choices = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
    nested.formatter_class = argparse.RawDescriptionHelpFormatter
    nested.description = "commands:\n" + "\n".join(
        f"  {name:<{width}}  {DESCRIPTIONS[f'{group} {name}']}" for name in choices
    )
    nested.add_argument("command", choices=choices)
    COMMANDS[f"{group} {nested.parse_args(arguments[1:2]).command}"](arguments[2:])


if __name__ == "__main__":
    main()
