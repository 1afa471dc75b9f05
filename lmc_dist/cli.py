"""The command line: `lmc train`, `lmc unlearn`, `lmc baseline`, `lmc evaluate`, `lmc report`, `lmc sweep`, `lmc cell`,
`lmc log …`, `lmc plan …`, and the scripts in launch/ that call the same.

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from lmc_dist.config import Config

# What a command prints on rank 0, and its exit status where that is not 0.
Outcome = str | tuple[str, int]
Joins = Literal["engine", "files", "nobody", "alone"]


@dataclass(frozen=True)
class Command:
    """A command of `lmc`.

    Attributes:
        description: One line for the listing.
        examples: Shown under its options.
        settings: Fields of `Config` that it uses; a configuration file may hold the others, since one file serves all.
        work: Does it, given settings and runtime; imports what it needs.
        joins: Whom it runs with: the ranks of an `engine`, ranks that work on `files`, or `nobody`; or which of these, by
            the settings. `alone` is nobody, and without torch.
        positional: Arguments without a name → the settings they are, with dots.
        short: Options → the settings that they are short for.
        several: Arguments of `positional` that may be several; the setting has commas between.
    """

    description: str
    examples: str
    settings: tuple[str, ...]
    work: Callable[[Config, Any], Outcome]
    joins: Joins | Callable[[Config], Joins] = "engine"
    positional: Mapping[str, str] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)
    several: tuple[str, ...] = ()


# --- what the commands do ----------------------------------------------------------------------------------------------


def train_work(config: Config, runtime: Any) -> Outcome:
    from pathlib import Path

    from lmc_dist.console import training_table
    from lmc_dist.log_commands.text import size
    from lmc_dist.stopping import listen
    from lmc_dist.training import train
    from lmc_dist.trajectory.contents import folder_bytes

    listen()
    text = training_table(train(config, runtime))
    return f"{text} ({size(folder_bytes(Path(config.log_dir)))})"


def unlearn_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.console import recombined_line, unlearning_table

    if config.unlearn.undo or config.unlearn.add:
        from lmc_dist.unlearn.recombine import recombine

        if config.privacy.basis != "off":
            from lmc_dist.errors import LmcError

            raise LmcError("unlearn.undo and unlearn.add put weights together without noise: set privacy.basis off")

        return f"{recombined_line(recombine(config, runtime))}\nresults in {config.output_dir}"
    from lmc_dist.stopping import listen
    from lmc_dist.unlearn.run import unlearn

    listen()
    if config.unlearn.strategy == "auto":
        from lmc_dist.log_commands.plan_unlearn import choose

        config = choose(config, runtime)
    return f"{unlearning_table(unlearn(config, runtime))}\nresults in {config.output_dir}"


def baseline_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.baselines.run import baseline
    from lmc_dist.console import unlearning_table

    return f"{unlearning_table(baseline(config, runtime))}\nresults in {config.output_dir}"


def evaluate_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.evaluate.run import evaluate

    result = evaluate(config, runtime)
    from lmc_dist.evaluate.table import evaluation_table

    return evaluation_table(result)


def cell_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.sweeps.cell import cell, cell_line

    return cell_line(cell(config, runtime))


def sweep_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.sweeps.runner import sweep

    return sweep(config)


def slurm_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.slurm.render import render_job

    return render_job(config)


def report_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.report.render import report

    return report(config)


def environment_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.environment import examine

    return examine(config)


def spectrum_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.curvature import show_spectrum

    return show_spectrum(config, runtime)


def curvature_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.curvature import keep_curvature

    return keep_curvature(config, runtime)


def inspect_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.inspect import inspect_log

    return inspect_log(config)


def verify_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.verify import verify_log

    return verify_log(config, runtime)


def doctor_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.doctor import examine
    from lmc_dist.log_commands.ranks import quiet_transformers

    quiet_transformers()
    return examine(config, runtime)


def audit_verify_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.verify import verify_audit

    return verify_audit(config, runtime)


def audit_show_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.show import show_audit

    return show_audit(config)


def audit_keygen_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.audit.show import make_key

    return make_key(config)


def forget_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import file_request

    return file_request(config)


def ledger_show_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import show_ledger

    return show_ledger(config)


def ledger_verify_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.forget import verify_ledger

    return verify_ledger(config)


def prune_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.prune import prune_log

    return prune_log(config)


def reshard_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.reshard import reshard_log

    return reshard_log(config, runtime)


def plan_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.plan import plan_log
    from lmc_dist.log_commands.ranks import quiet_transformers

    quiet_transformers()
    return plan_log(config)


def plan_unlearn_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.plan_unlearn import plan_unlearn
    from lmc_dist.log_commands.ranks import quiet_transformers

    quiet_transformers()
    return plan_unlearn(config, runtime)


def _audit_joins(config: Config) -> Joins:
    from lmc_dist.audit.verify import asks_for_a_step

    return "engine" if asks_for_a_step(config) else "files"


# --- what they are called ----------------------------------------------------------------------------------------------

LOG = {"LOG": "log_dir"}

COMMANDS: dict[str, Command] = {
    "train": Command(
        "Fine-tune a model and write a trajectory log.",
        """
examples:
  deepspeed --num_accelerators 2 launch/train.py --config configs/tofu.yaml --data.path DATA --model.path MODEL
  torchrun --nproc_per_node 2 launch/train.py --config configs/demo_base.yaml --log_dir runs/base_log --model_dir runs/base
  lmc train --config configs/demo.yaml --model.path runs/base --log_dir runs/log --train.learning_rate 0.02

With a forget option the same command trains the reference: the run that never had that data.
""",
        ("data", "model", "train", "log", "online", "forget", "log_dir", "model_dir", "resume", "overwrite"),
        train_work,
    ),
    "unlearn": Command(
        "Compute the model that the logged training would have reached without some data.",
        """
examples:
  deepspeed --num_accelerators 2 launch/unlearn.py --config configs/tofu.yaml --log_dir runs/tofu/log \\
      --forget.split forget01 --output_dir runs/tofu/unlearn --reference retrain
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.batches 5,17 --compare replay
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206 \\
      --unlearn.units sample --unlearn.store_units true --output_dir runs/units
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --output_dir runs/units --undo sample-3
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.split person-57 --strategy auto \\
      --max_error 0.3
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3 \\
      --privacy.basis controls --privacy.controls 9 --privacy.epsilon 4

what to forget: --forget.samples takes ids (3,17,20-29) or a .json/.jsonl file of ids, --forget.split the name of a
split, --forget.batches ids of logged batches.
""",
        (
            "data",
            "model",
            "forget",
            "unlearn",
            "privacy",
            "plan_unlearn",
            "log_dir",
            "output_dir",
            "audit",
            "reference",
            "compare",
            "progress",
            "overwrite",
            "wandb",
        ),
        unlearn_work,
        short={
            "--strategy": "unlearn.strategy",
            "--max_error": "plan_unlearn.max_error",
            "--undo": "unlearn.undo",
            "--add": "unlearn.add",
        },
    ),
    "baseline": Command(
        "Answer a request by fine-tuning: retain-only, gradient ascent, GradDiff or NPO, for comparison.",
        """
examples:
  deepspeed --num_accelerators 2 launch/baseline.py --config configs/tofu.yaml --log_dir runs/tofu/log \\
      --forget.split forget01 --method npo --output_dir runs/tofu/npo --reference runs/tofu/retrain_log
  lmc baseline --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206 \\
      --method graddiff --baseline.learning_rate 1e-3 --baseline.epochs 3 --output_dir runs/graddiff --reference retrain
  lmc baseline --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206 \\
      --method retain --start runs/unlearn --baseline.max_steps 10 --output_dir runs/unlearn_tuned

It starts from the end of the log, or from the run or model in --start. What fine-tuning alone does, the control of every
correction with fine-tuning after it, is the last command without --start. The engine is that of train.engine; the output is
that of `lmc unlearn`.
""",
        (
            "data",
            "model",
            "train",
            "forget",
            "baseline",
            "log_dir",
            "output_dir",
            "reference",
            "progress",
            "overwrite",
            "wandb",
        ),
        baseline_work,
        short={"--method": "baseline.method", "--start": "baseline.start"},
    ),
    "evaluate": Command(
        "Ask models TOFU's questions and compare them with the retrained one: memorisation, truth, membership, utility.",
        """
examples:
  lmc evaluate original=runs/tofu/model unlearned=runs/tofu/unlearn --evaluate.retrain runs/tofu/retrain \\
      --config configs/tofu.yaml --data.path DATA --forget.split forget01 --json runs/tofu/evaluation.json
  torchrun --nproc_per_node 2 launch/evaluate.py --config configs/tofu.yaml --data.path DATA --forget.split forget01 \\
      --evaluate.models unlearned=runs/tofu/unlearn --evaluate.retrain runs/tofu/retrain --evaluate.generate false

A folder is a Hugging Face checkpoint, or the output of an unlearning run; the retrained model is what `lmc train` with the
same forget option leaves in model_dir. Numbers on what was forgotten are shown as differences to it, since it is the aim:
knowing less than it is as far off as knowing more.
""",
        ("data", "forget", "evaluate", "json"),
        evaluate_work,
        positional={"RUN": "evaluate.models"},
        several=("RUN",),
    ),
    "sweep": Command(
        "Run the cells of a W&B sweep file here, one after the other, and compare their methods over seeds.",
        """
examples:
  lmc sweep configs/sweeps/tofu_baselines.yaml configs/sweeps/tofu_lmcleaner.yaml --data DATA/tofu \\
      --model DATA/models/stories260K --output runs/sweep --ranks 1
  lmc sweep configs/sweeps/models.yaml --output runs/models --ranks 2 --sweep.dry_run true
  lmc sweep configs/sweeps/models.yaml --output runs/models --ranks 2 --part 0/4      one of four jobs that share it

What is finished is skipped; a cell that fails is shown at the end, and the exit status is then 1. The same files go to
`wandb sweep`, and the cells to `wandb agent`, with LMC_DATA, LMC_MODEL, LMC_OUTPUT and LMC_RANKS in the environment.
""",
        ("sweep",),
        sweep_work,
        "nobody",
        {"FILE": "sweep.files"},
        {
            "--output": "sweep.output",
            "--data": "sweep.data",
            "--model": "sweep.model",
            "--ranks": "sweep.ranks",
            "--part": "sweep.part",
        },
        ("FILE",),
    ),
    "cell": Command(
        "One cell of a sweep: train, retrain (once for all cells), forget by one method, judge, write one row.",
        """
examples:
  torchrun --standalone --nproc_per_node 2 launch/cell.py --config configs/sweeps/base/tofu.yaml --data.path DATA/tofu \\
      --model.path DATA/models/stories260K --cell.folder runs/sweep --cell.method lmcleaner --unlearn.K=None \\
      --forget.split forget01 --train.seed 0
  lmc cell --config configs/demo.yaml --model.path runs/base --cell.folder runs/sweep --cell.method npo \\
      --cell.evaluate false --forget.split person-57

`None` stands for null, as wandb's agent writes it.
""",
        ("data", "model", "train", "log", "forget", "unlearn", "baseline", "evaluate", "wandb", "cell", "progress"),
        cell_work,
    ),
    "report": Command(
        "Show finished unlearning runs or sweeps on one page: error against cost, losses, audit; as HTML, Markdown and CSV.",
        """
examples:
  lmc report runs/unlearn
  lmc report runs/seed-0 runs/seed-1 runs/seed-2 --output runs/report
  lmc report runs/unlearn --layers true --overwrite true
  lmc report runs/sweep --output runs/sweep_report

A run's evaluation.json (lmc evaluate --json RUN/evaluation.json) is shown too. The page needs no network.
""",
        ("report", "overwrite"),
        report_work,
        "nobody",
        {"RUN": "report.runs"},
        {"--output": "report.output", "--layers": "report.layers"},
        ("RUN",),
    ),
    "doctor": Command(
        "Look at the environment: versions, GPUs, operators, compiler, launchers, a folder; with advice (a log: log doctor).",
        """
examples:
  lmc doctor
  lmc doctor runs/log --json environment.json

FOLDER is where a log is to go: it is checked for writing and for room. Of a log that is there, with its model and data, the
command is `lmc log doctor`.

Exit status: 0, or 1 where something that is needed is missing, 2 for bad input.
""",
        ("environment", "json"),
        environment_work,
        "alone",
        {"FOLDER": "environment.folder"},
    ),
    "slurm render": Command(
        "A batch script for SLURM that starts a job on any number of nodes, stops it in time, and lets it go on.",
        """
examples:
  lmc slurm render unlearn --slurm.nodes 2 --slurm.time 02:00:00 --slurm.output unlearn.sbatch
  lmc slurm render train --config configs/demo.yaml --slurm.launcher srun --slurm.gpus_per_node 0 \\
      --slurm.ranks_per_node 2 --slurm.arguments "--model.path runs/base --log_dir runs/log"
  sbatch unlearn.sbatch --config configs/demo.yaml --log_dir runs/log --forget.batches 5

Settings may also stand in the `slurm:` section of the file of --config, which the job then runs with.
""",
        ("slurm", "overwrite"),
        slurm_work,
        "nobody",
        {"JOB": "slurm.job"},
        {"--output": "slurm.output"},
    ),
    "log inspect": Command(
        "What a log holds, on one page: the run, which steps can be forgotten and how, bytes by kind.",
        """
examples:
  lmc log inspect runs/log
  lmc log inspect runs/log --plot curves.png --json summary.json

Also of a log that is being written, was cut off or is damaged: it says which steps are whole.
""",
        ("log_dir", "json", "plot"),
        inspect_work,
        "nobody",
        LOG,
    ),
    "log verify": Command(
        "Read all of a log and list every place that is not as it was written.",
        """
examples:
  lmc log verify runs/log
  torchrun --nproc_per_node 4 -m lmc_dist.cli log verify runs/log --json damage.json

Exit status: 0 where all is whole, 1 where anything is damaged, 2 for bad input.
""",
        ("log_dir", "json"),
        verify_work,
        "files",
        LOG,
    ),
    "log doctor": Command(
        "Check everything a later deletion needs, and say what a given deletion could do.",
        """
examples:
  lmc log doctor runs/log --config configs/demo.yaml --model.path runs/base
  lmc log doctor runs/log --config configs/tofu.yaml --data.path DATA --model.path MODEL --forget.split forget01

Exit status: 0, or 1 where a check failed or the deletion is not possible, 2 for bad input.
""",
        ("data", "model", "forget", "doctor", "log_dir", "json"),
        doctor_work,
        "files",
        LOG,
    ),
    "log prune": Command(
        "Take parts out of a log: old steps, vectors of a tier, snapshots, the samples' tokens.",
        """
examples:
  lmc log prune runs/log --prune.before 500 --prune.dry_run true
  lmc log prune runs/log --prune.to_tier update
  lmc log prune runs/log --prune.snapshots_every 200 --prune.batch_data true

It can be cut off at any moment: the log opens and verifies, and the same command ends the work.
""",
        ("prune", "log_dir", "json"),
        prune_work,
        "nobody",
        LOG,
    ),
    "log reshard": Command(
        "Write a log anew for another number of ranks or another partition rule, to the bit.",
        """
examples:
  lmc log reshard runs/log runs/log4 --reshard.ranks 4
  torchrun --nproc_per_node 2 -m lmc_dist.cli log reshard runs/log runs/log8 --reshard.ranks 8 --reshard.partition fsdp2

Logs are read at any world size as they are; files as many as ranks are read faster. No process holds more than one
parameter at a time.
""",
        ("reshard", "log_dir", "overwrite"),
        reshard_work,
        "files",
        {**LOG, "OUT": "reshard.output"},
    ),
    "log spectrum": Command(
        "Largest eigenvalues and trace of the curvature at a logged step, and what they mean for stability.",
        """
examples:
  lmc log spectrum runs/log --config configs/demo.yaml --model.path runs/base
  torchrun --nproc_per_node 2 -m lmc_dist.cli log spectrum runs/tofu/log --config configs/tofu.yaml --data.path DATA \\
      --model.path MODEL --spectrum.step 62 --spectrum.mode exact --spectrum.json spectrum.json
""",
        ("data", "model", "spectrum", "log_dir"),
        spectrum_work,
        positional=LOG,
    ),
    "log curvature": Command(
        "Keep the largest eigenpairs of the curvature beside the log, for use without model and data.",
        """
examples:
  lmc log curvature runs/log --config configs/demo.yaml --model.path runs/base --curvature.rank 64
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.batches 5 \\
      --unlearn.hessian_mode low_rank --unlearn.curvature default
""",
        ("data", "model", "curvature", "log_dir", "overwrite"),
        curvature_work,
        positional=LOG,
    ),
    "audit verify": Command(
        "Check that an audit is whole and the output is its own; with the log, take a random step again.",
        """
examples:
  lmc audit verify runs/unlearn
  lmc audit verify runs/unlearn --public_key keys/audit.pub --known DIGEST --json verified.json
  lmc audit verify runs/unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3,203-206
  torchrun --nproc_per_node 2 -m lmc_dist.cli audit verify runs/unlearn --config configs/demo.yaml --model.path runs/base \
      --log_dir runs/log --forget.samples 3,203-206 --audit.seed 7

OUTPUT is the output of an unlearning run, a folder with a chain.jsonl, or such a file. With a --forget option, which must be
the run's, a step is drawn and taken again from the log, and ‖v‖ on the way is compared with what was recorded.

Exit status: 0, or 1 where anything is not as it was written, 2 for bad input.
""",
        ("data", "model", "forget", "audit", "log_dir", "output_dir", "progress", "json"),
        audit_verify_work,
        _audit_joins,
        {"OUTPUT": "output_dir"},
        {"--public_key": "audit.public_key", "--known": "audit.known"},
    ),
    "audit show": Command(
        "Show the records of an audit.",
        """
examples:
  lmc audit show runs/unlearn
  lmc audit show runs/unlearn --json records.json
""",
        ("audit", "output_dir", "json"),
        audit_show_work,
        "nobody",
        {"OUTPUT": "output_dir"},
        {"--public_key": "audit.public_key"},
    ),
    "audit keygen": Command(
        "Make a key pair that signs audits: FILE and FILE.pub.",
        """
examples:
  lmc audit keygen keys/audit
  lmc unlearn --config configs/demo.yaml --model.path runs/base --log_dir runs/log --forget.samples 3 \
      --audit.signing_key keys/audit
""",
        ("audit",),
        audit_keygen_work,
        "nobody",
        {"FILE": "audit.signing_key"},
    ),
    "forget": Command(
        "Ask a run that trains to forget samples or batches: it does so at its next step.",
        """
examples:
  lmc forget runs/log --ids 3,203-206
  lmc forget runs/log --ids ids.json --unit batch
  lmc forget runs/log --batches 17

The request goes into the ledger beside the log (LOG.requests); training answers it where --online.enabled is true. It holds
salted digests, not ids, and a request that is there already is not filed twice. `lmc ledger show` says what came of it.
""",
        ("request", "log_dir", "json"),
        forget_work,
        "nobody",
        LOG,
        {"--ids": "request.ids", "--batches": "request.batches", "--unit": "request.unit"},
    ),
    "ledger show": Command(
        "Show the deletion requests of a run and what came of them.",
        """
examples:
  lmc ledger show runs/log
  lmc ledger show runs/log --json requests.json
""",
        ("log_dir", "json"),
        ledger_show_work,
        "nobody",
        LOG,
    ),
    "ledger verify": Command(
        "Check that the ledger, its audit, the log's corrections and all later steps agree.",
        """
examples:
  lmc ledger verify runs/log
  lmc ledger verify runs/log --public_key keys/audit.pub --json verified.json

Exit status: 0 where they do, 1 where anything does not, 2 for bad input.
""",
        ("audit", "log_dir", "json"),
        ledger_verify_work,
        "nobody",
        LOG,
        {"--public_key": "audit.public_key"},
    ),
    "plan log": Command(
        "Predict a log's size and cost before training, for every storage tier.",
        """
examples:
  lmc plan log --config configs/tofu.yaml --data.path DATA --model.path MODEL --plan.world_size 8
  lmc plan log --config configs/demo.yaml --model.path runs/base --plan.step_seconds 0.4 --json plan.json
""",
        ("data", "model", "train", "log", "plan", "log_dir", "json"),
        plan_work,
        "nobody",
    ),
    "plan unlearn": Command(
        "Predict time, memory and error of every way to forget, here or on other machines, and recommend one.",
        """
examples:
  lmc plan unlearn runs/log --config configs/demo.yaml --model.path runs/base --forget.samples 3,203-206
  lmc plan unlearn runs/log --config configs/demo.yaml --model.path runs/base --forget.split person-57 --controls 3 \\
      --max_error 0.05 --json plan.json
  torchrun --nproc_per_node 2 -m lmc_dist.cli plan unlearn runs/tofu/log --config configs/tofu.yaml --data.path DATA \\
      --model.path MODEL --forget.split forget01
  lmc plan unlearn runs/log --config configs/demo.yaml --model.path runs/base --forget.batches 5 --world 64 --hardware h100
  lmc plan unlearn --config configs/shapes/llama3_8b.yaml --plan_unlearn.steps 1000 --world 64 --hardware h100

Times this machine for some seconds, unless --hardware names another. --controls N forgets N random others of the same
number for comparison, by the candidates and by replay, and keeps their errors beside the log.
""",
        ("data", "model", "train", "log", "forget", "unlearn", "plan_unlearn", "log_dir", "json"),
        plan_unlearn_work,
        lambda config: "engine" if config.plan_unlearn.steps is None else "nobody",
        LOG,
        {
            "--controls": "plan_unlearn.controls",
            "--hardware": "plan_unlearn.hardware",
            "--max_error": "plan_unlearn.max_error",
            "--world": "plan_unlearn.world_size",
        },
    ),
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
