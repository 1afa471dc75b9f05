"""The commands as users type them: launchers, help, the demo, TOFU, and what the README shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from test_zero3 import distance_job

from lmc_dist.ports import free_port
from lmc_dist.trajectory.store import TrajectoryLog

BIN = Path(sys.executable).parent


def run(command: list[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command from the repository root with the environment's programs first on PATH; it must succeed."""
    variables = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment
    variables.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, env=variables, check=False, timeout=timeout
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_all_launchers_reach_the_same_weights(ranks: Any, tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=2\n")
    without_ssh = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    zero3 = ["--use_deepspeed", "--zero_stage", "3", "--num_processes", "2", "--num_machines", "1"]
    starts = {
        "deepspeed": ["deepspeed", *without_ssh, "--master_port", str(free_port()), "launch/train.py"],
        "accelerate": ["accelerate", "launch", *zero3, "--main_process_port", str(free_port()), "launch/train.py"],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "launch/train.py"],
        "one process": [sys.executable, "launch/train.py"],
        "lmc": ["lmc", "train"],
    }
    options = ["--config", "configs/demo_base.yaml"]
    settings = {"optimizer": "sgd", "learning_rate": "0.1", "max_steps": "12"}
    train = [part for key, value in settings.items() for part in (f"--train.{key}", value)] + [
        "--log.storage",
        "update",
    ]
    for name, start in starts.items():
        run(
            [*start, *options, *train, "--log_dir", str(tmp_path / name), "--model_dir", str(tmp_path / name / "model")]
        )
        assert (tmp_path / name / "model" / "model.safetensors").exists()
    assert TrajectoryLog(tmp_path / "one process").manifest.world_size == 1
    checksums = {name: TrajectoryLog(tmp_path / name).record(11).checksum for name in starts}
    assert checksums["deepspeed"] == checksums["torchrun"] == checksums["accelerate"]
    assert checksums["one process"] == checksums["lmc"]
    distance = ranks(2).run(distance_job, str(tmp_path / "deepspeed"), str(tmp_path / "one process"))[0]
    assert distance <= 1e-6  # powers of two scale exactly: here even the bits agree

    # the same request, unlearned under each launcher from the same log
    results = {}
    for name, start in starts.items():
        start = [part.replace("train", "unlearn") for part in start]
        request = ["--log_dir", str(tmp_path / "deepspeed"), "--forget.batches", "5", "--reference", "replay"]
        run([*start, *options, *request, "--output_dir", str(tmp_path / "out" / name)])
        results[name] = json.loads((tmp_path / "out" / name / "result.json").read_text())
    for result in results.values():
        assert result["status"] == "done"
        assert result["v_norm"] == pytest.approx(results["deepspeed"]["v_norm"], rel=1e-5)
        assert result["rel_error"] == pytest.approx(results["deepspeed"]["rel_error"], rel=1e-3)


@pytest.mark.parametrize("command", [["lmc", "--help"], ["lmc", "train", "--help"], ["lmc", "unlearn", "--help"]])
def test_help_is_quick(command: list[str]) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        text = run(command).stdout
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
    assert "usage" in text
    if "unlearn" in command[1:2]:
        assert "--forget.split" in text and "deepspeed --num_accelerators 2 launch/unlearn.py" in text


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import lmc_dist; print(time.perf_counter() - t)"
    assert min(float(run([sys.executable, "-c", code]).stdout) for _ in range(3)) < 0.3


def test_a_bad_option_is_one_line_and_status_2() -> None:
    for options in (["--train.batch_size", "many"], ["--no_such", "1"], ["--config", "nowhere.yaml"]):
        done = subprocess.run([str(BIN / "lmc"), "train", *options], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


def check_table(rows: list[dict[str, Any]], ggn_below: float) -> None:
    errors = {row["method"]: row["rel_error"] for row in rows}
    assert list(errors) == ["do_nothing", "tim", "ggn", "replay", "retrain"]
    assert errors["do_nothing"] == 1 and errors["replay"] == 0 and errors["retrain"] == 0
    assert errors["ggn"] < min(ggn_below, errors["tim"], 1.0)
    assert all(row["loss_forget"] > 0 and row["loss_retain"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_demo(tmp_path: Path) -> None:
    started = time.perf_counter()
    shown = run([sys.executable, "-m", "lmc_dist.demo", "--output", str(tmp_path / "demo")]).stdout
    assert time.perf_counter() - started < 360
    check_table(json.loads((tmp_path / "demo" / "table.json").read_text())["rows"], ggn_below=0.5)
    assert re.search(r"forgot: 12 samples of 1 person, in \d+ of 150 steps", shown)
    out = tmp_path / "demo" / "unlearn"
    assert json.loads((out / "result.json").read_text())["rel_error"] < 0.5
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for command in readme_commands():  # the README's other launchers, on the base model the demo made
        if command.startswith(("torchrun", "lmc")):
            words = shlex.split(
                command.replace("runs/demo/", f"{tmp_path}/demo/").replace("runs/", f"{tmp_path}/runs/")
            )
            if words[0] == "torchrun":
                words[1:1] = ["--master_port", str(free_port())]
            run(words)
    assert json.loads((tmp_path / "runs" / "b" / "unlearn" / "result.json").read_text())["rel_error"] < 0.5
    assert json.loads((tmp_path / "runs" / "units" / "result.json").read_text())["units"]["undone"] == ["sample-3"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("Question: Where", return_tensors="pt").input_ids
    assert model(ids).logits.shape[:2] == ids.shape


def readme_commands() -> list[str]:
    """Commands of the README's shell blocks, continuation lines joined."""
    text = (REPO / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


# The test that runs each of the README's commands; the two `make` targets are what CI and the demo test call.
COVERED = {
    "make demo": "test_make_demo",
    "make test": "test_every_readme_command_is_run_by_a_test",
    "deepspeed --num_accelerators 2 launch/train.py": "test_tofu_as_in_the_readme",
    "deepspeed --num_accelerators 2 launch/unlearn.py": "test_tofu_as_in_the_readme",
    "torchrun --nproc_per_node 2 launch/train.py": "test_make_demo",
    "source .venv/bin/activate": "run",  # it puts the environment's programs first on PATH, as activating does
    "lmc train": "test_make_demo",
    "lmc unlearn": "test_make_demo",
    "lmc plan": "test_make_demo",
    "lmc log": "test_make_demo",
    "lmc baseline": "test_make_demo",
    "lmc report": "test_make_demo",
    "lmc slurm": "test_make_demo",
    "lmc doctor": "test_make_demo",
    "lmc forget": "test_make_demo",
    "lmc ledger": "test_make_demo",
    "lmc audit": "test_make_demo",
}


def test_every_readme_command_is_run_by_a_test() -> None:
    for command in readme_commands():
        covering = [test for known, test in COVERED.items() if command.startswith(known)]
        assert covering and covering[0] in globals(), f"README shows a command no test runs: {command}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tofu_as_in_the_readme(tmp_path: Path, test_data: Path) -> None:
    """The README's two TOFU commands, forget01 against a retrain; the other requests are in bench/tofu.py."""
    commands = [c for c in readme_commands() if c.startswith("deepspeed") and "configs/tofu.yaml" in c]
    assert len(commands) == 2
    for command in commands:
        words = [
            word.replace("DATA/", f"{test_data}/").replace("runs/tofu", str(tmp_path)) for word in shlex.split(command)
        ]
        words[1:1] = ["--master_port", str(free_port())]
        run([*words, *(["--compare", "tim,replay"] if "launch/unlearn.py" in words else [])], timeout=900)
    result = json.loads((tmp_path / "unlearn" / "result.json").read_text())
    assert TrajectoryLog(tmp_path / "log").num_steps >= 100
    assert result["request"]["samples"] == 40
    check_table(result["rows"], ggn_below=0.5)
