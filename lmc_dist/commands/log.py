"""Looking at a log, checking it, making it smaller."""

from __future__ import annotations

from typing import Any

from lmc_dist.commands.command import LOG, Command, Outcome
from lmc_dist.config import Config


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


def prune_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.prune import prune_log

    return prune_log(config)


def rewrite_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.ranks import quiet_transformers
    from lmc_dist.log_commands.rewrite import rewrite_log

    quiet_transformers()
    return rewrite_log(config, runtime)


def reshard_work(config: Config, runtime: Any) -> Outcome:
    from lmc_dist.log_commands.reshard import reshard_log

    return reshard_log(config, runtime)


COMMANDS: dict[str, Command] = {
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
    "log rewrite": Command(
        "Take forgotten data out of the log itself: the trajectory of the run without it, or what does not depend on it.",
        """
examples:
  lmc log rewrite runs/log --config configs/demo.yaml --model.path runs/base --forget.samples 3,203-206 --how replay
  torchrun --nproc_per_node 2 -m lmc_dist.cli log rewrite runs/tofu/log --config configs/tofu.yaml --data.path DATA \\
      --model.path MODEL --forget.split forget01 --how replay
  lmc log rewrite runs/log --forget.samples 3,203-206 --how remove --dry_run true

replay needs the ranks and the engine of training, and about as many gradients as steps were trained since the first that
held any of the data. remove computes nothing and needs no data; what it cuts off, `lmc train --resume true` with the same
forget option trains anew. The old log stays until the new one is whole, then it is deleted: the room of both is needed. A
call that was cut off leaves one of them; the same command ends the work.
""",
        ("data", "model", "forget", "rewrite", "log_dir", "progress", "json"),
        rewrite_work,
        lambda config: "files" if config.rewrite.how == "remove" else "engine",
        LOG,
        {"--how": "rewrite.how", "--dry_run": "rewrite.dry_run"},
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
}
