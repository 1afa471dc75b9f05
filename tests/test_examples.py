"""The examples under a launcher: `accelerate launch` with DeepSpeed and a configuration of `auto` values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from test_commands import run
from torch.distributed.run import get_args_parser

from lmc_dist.config import Config, DataConfig
from lmc_dist.errors import LmcError
from lmc_dist.ports import free_port
from lmc_dist.training import build_dataset, check_targets
from lmc_dist.trajectory.store import TrajectoryLog


def test_the_accelerate_file_names_the_deepspeed_file() -> None:
    settings = yaml.safe_load((REPO / "configs" / "accelerate_zero3.yaml").read_text())
    deepspeed = json.loads((REPO / settings["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert deepspeed["zero_optimization"]["stage"] == 3 and "auto" in deepspeed.values()


def test_samples_of_the_log_are_for_unlearning_alone(tmp_path: Path) -> None:
    config = Config(data=DataConfig(source="log"), log_dir=str(tmp_path / "log"))
    with pytest.raises(LmcError, match="'log' is for unlearning"):
        check_targets(config)
    with pytest.raises(LmcError, match="with the tokenizer of training"):
        build_dataset(config)


@pytest.mark.parametrize("script", sorted(path.name for path in (REPO / "examples").glob("*.py")))
def test_torchrun_leaves_the_options_of_an_example_alone(script: str) -> None:
    """It looks for abbreviations of its own options behind the script's name as well: `--log` is one of three."""
    options = re.findall(r'add_argument\("(--\w+)"', (REPO / "examples" / script).read_text())
    assert options
    for option in options:
        found = get_args_parser().parse_args(["--standalone", script, option, "1"])
        assert found.training_script_args == [option, "1"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trainer_by_accelerate_launch_with_deepspeed(tmp_path: Path) -> None:
    """Without a GPU DeepSpeed compiles an operator at the first run on a machine, which takes most of the time."""
    example = tmp_path / "example"
    run(["python", "examples/base.py", "--output", str(example)])
    launch = ["accelerate", "launch", "--config_file", "configs/accelerate_zero3.yaml"]
    script = ["examples/trainer.py", "--model", f"{example}/base", "--data", f"{example}/data.jsonl"]
    port = ["--main_process_port", str(free_port())]
    run([*launch, *port, *script, "--log_dir", f"{example}/log", "--output", f"{example}/model"], timeout=1500)
    log = TrajectoryLog(example / "log")
    assert (log.manifest.engine, log.manifest.world_size, log.manifest.max_grad_norm) == ("deepspeed-zero3", 2, 1.0)
    assert log.num_steps == 8  # 64 samples, 2 ranks x 8 samples, 2 epochs
    assert sorted(i for step in range(4) for i in log.record(step).sample_ids) == sorted(log.samples().ids)
    assert all(record.loss is not None and 5 < record.loss < 7 for record in log.records())  # ln 400 = 6
    assert (example / "model" / "model.safetensors").exists()
    settings = ["--data.source", "log", "--model.path", f"{example}/base", "--log_dir", f"{example}/log"]
    request = ["--forget.samples", "300-303", "--unlearn.replay_head", "auto"]
    run(
        ["lmc", "unlearn", *settings, *request, "--output_dir", f"{example}/unlearned"]
    )  # on one rank, without DeepSpeed
    assert json.loads((example / "unlearned" / "result.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: make peers")
    example = tmp_path / "example"
    run(["python", "examples/base.py", "--output", str(example)])
    script = ["python", "examples/trl_sft.py", "--model", f"{example}/base", "--data", f"{example}/data.jsonl"]
    run([*script, "--log_dir", f"{example}/log"])
    log = TrajectoryLog(example / "log")
    assert log.num_steps == 16 and all(record.loss is not None for record in log.records())
    settings = ["--data.source", "log", "--model.path", f"{example}/base", "--log_dir", f"{example}/log"]
    request = ["--forget.samples", "300-303", "--unlearn.replay_head", "all", "--output_dir", f"{example}/out"]
    run(["lmc", "unlearn", *settings, *request])
    result = json.loads((example / "out" / "result.json").read_text())
    assert result["replay"]["bit_exact_world_size"] and result["v_norm"] > 0
