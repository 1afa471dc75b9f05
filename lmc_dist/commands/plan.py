"""What a log or an answer to a request will take."""

from __future__ import annotations

from typing import Any

from lmc_dist.commands.command import LOG, Command, Outcome
from lmc_dist.config import Config


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


COMMANDS: dict[str, Command] = {
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
