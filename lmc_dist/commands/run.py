"""Training, unlearning, and judging what came of them."""

from __future__ import annotations

from typing import Any

from lmc_dist.commands.command import Command, Outcome
from lmc_dist.config import Config


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


def report_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.report.render import report

    return report(config)


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
}
