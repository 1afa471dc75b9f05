"""The main job on a GPU, under each engine: trained, logged, replayed, corrected. `pytest -m gpu`; nothing here runs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO

from lmc_dist.trajectory.files import read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

MODEL = ["--config", "configs/demo_base.yaml", "--data.people", "8"]
RUN = [*MODEL, "--train.max_steps", "8", "--train.learning_rate", "0.001"]


def lmc(command: str, *arguments: str) -> None:
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, "-m", "lmc_dist.cli", command, *arguments]
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def unlearned(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    ask = ["--log_dir", str(folder / "log"), "--forget.split", "person-3", "--output_dir", str(folder / name)]
    lmc("unlearn", *MODEL, *ask, "--progress", "none", *arguments)
    return read_json(folder / name / "result.json")


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2", "ddp", "single"])
def test_a_run_on_a_gpu_is_replayed_and_corrected(tmp_path: Path, engine: str) -> None:
    how = ["--train.engine", engine, "--log.storage", "update", "--log.save_interval", "4"]
    lmc("train", *RUN, *how, "--log_dir", str(tmp_path / "log"))
    replayed = unlearned(tmp_path, "replayed", "--unlearn.replay_head", "all", "--reference", "retrain")
    assert replayed["rel_error"] == 0 and replayed["replay"]["bit_exact_world_size"]
    exact = unlearned(tmp_path, "exact", "--unlearn.hessian_mode", "exact", "--reference", "replay")
    tim = unlearned(tmp_path, "tim", "--unlearn.hessian_mode", "none", "--reference", "replay")
    assert 0 < exact["rel_error"] < 0.2 and exact["rel_error"] < tim["rel_error"]
