"""The batch scripts: rendered, and run on a real SLURM of two nodes with one process each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO
from slurm import Slurm, missing
from test_faults import LLAMA, records_of

from lmc_dist.config import SlurmConfig
from lmc_dist.errors import LmcError
from lmc_dist.slurm.render import JOBS, render
from lmc_dist.trajectory.files import read_json
from lmc_dist.trajectory.store import TrajectoryLog

BIN = Path(sys.executable).parent
STEPS = 60


def test_the_scripts_in_the_repository_are_what_is_rendered() -> None:
    for job in JOBS:
        assert (REPO / f"launch/slurm/{job}.sbatch").read_text() == render(job, SlurmConfig()), (
            f"lmc slurm render {job} --output launch/slurm/{job}.sbatch --overwrite true"
        )


def test_settings_are_filled_in_and_bad_ones_refused(tmp_path: Path) -> None:
    settings = {"nodes": 4, "ranks_per_node": 2, "gpus_per_node": 2, "partition": "gpu", "time": "02:00:00"}
    text = render("unlearn", SlurmConfig(**settings, setup="module load cuda"), "my run.yaml")
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=02:00:00",
    ):
        assert line in text.splitlines()
    assert "module load cuda" in text and "ARGUMENTS=(--config 'my run.yaml')" in text
    for job in JOBS:
        for launcher in ("torchrun", "deepspeed", "srun"):
            script = tmp_path / f"{job}-{launcher}"
            script.write_text(render(job, SlurmConfig(launcher=launcher)))
            subprocess.run(["bash", "-n", str(script)], check=True)
    for bad, said in (
        ({"nodes": 0}, "slurm.nodes must be at least 1"),
        ({"partition": "gpu; rm -r x"}, "slurm.partition must be a plain word"),
        ({"ranks_per_node": 4}, "a rank has one GPU each"),
        ({"launcher": "mpirun"}, "slurm.launcher is one of"),
    ):
        with pytest.raises(LmcError, match=said):
            render("train", SlurmConfig(**bad))
    with pytest.raises(LmcError, match="unknown job 'eval'"):
        render("eval", SlurmConfig())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if (reason := missing()) is not None:
        if os.environ.get("LMC_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


def submit(
    slurm: Slurm, folder: Path, job: str, launcher: str, config: Path | None, *options: str, nodes: int = 2
) -> str:
    """The number of a job on that many nodes, one rank each; a sweep is an array of two tasks."""
    script = folder / f"{job}-{launcher}.sbatch"
    settings = SlurmConfig(
        nodes=nodes,
        array=2,
        ranks_per_node=1,
        cpus_per_rank=1,
        gpus_per_node=0,
        launcher=launcher,
        time="00:10:00",
        grace=60,  # type: ignore[arg-type]
    )
    script.write_text(render(job, settings, None if config is None else str(config)))
    path = f"{BIN}:{os.environ['PATH']}:/usr/sbin"
    return slurm.run("sbatch", "--parsable", "--chdir", str(folder), str(script), *options, PATH=path).strip()


def output(folder: Path) -> str:
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.out"))]
    texts += [path.read_text(errors="replace") for path in sorted((folder / "logs").rglob("*")) if path.is_file()]
    return "\n".join(texts)[-6000:]


@pytest.mark.slow
def test_the_tasks_of_an_array_share_a_sweep(slurm: Slurm, tmp_path: Path) -> None:
    """Four cells by two tasks, which train once between them; the sweep's own command then only shows the table."""
    settings: dict[str, Any] = {
        "data": {"people": 3, "facts_per_person": 4, "max_length": 64},
        "model": {"config": LLAMA, "vocab_size": 280},
        "train": {"max_steps": 4, "batch_size": 5, "learning_rate": 0.02, "engine": "single"},
        "forget": {"split": "person-1"},
        "cell": {"evaluate": False},
        "progress": "none",
    }
    base, file, folder = (tmp_path / name for name in ("base.yaml", "sweep.yaml", "sweep"))
    base.write_text(yaml.safe_dump(settings))
    command = ["python", "${program}", "--config", str(base), "--cell.folder", "${envvar:LMC_OUTPUT}", "${args}"]
    methods = {"cell.method": {"values": ["do_nothing", "tim", "replay", "retrain"]}}
    sweep = {"program": str(REPO / "launch/cell.py"), "method": "grid", "command": command, "parameters": methods}
    file.write_text(yaml.safe_dump(sweep))
    options = [str(file), "--output", str(folder)]
    job = submit(slurm, tmp_path, "sweep", "torchrun", None, *options, "--sweep.fork", "true", nodes=1)
    slurm.wait(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(slurm.states(job)), 240)
    assert slurm.states(job) == ["COMPLETED"] * 2, output(tmp_path)
    rows = {path: read_json(path) for path in folder.glob("cells/*/row.json")}
    errors = {row["method"]: row["rel_error"] for row in rows.values()}
    assert set(errors) == set(methods["cell.method"]["values"]) and all(row["failure"] is None for row in rows.values())
    assert errors["do_nothing"] == 1 and errors["replay"] == errors["retrain"] == 0 < errors["tim"]
    assert len(list((folder / "shared").iterdir())) == 2  # one training run, one retrain: by whichever task came first
    for task in range(2):
        assert f"part {task} of 2: 2 cells, 0 failed" in (tmp_path / f"lmc-sweep-{job}_{task}.out").read_text()
    before = {path: path.stat().st_mtime_ns for path in rows}
    done = subprocess.run([str(BIN / "lmc"), "sweep", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "exact replay" in done.stdout, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in rows} == before and (folder / "report/report.html").exists()


@pytest.mark.slow
def test_a_job_on_two_nodes_is_requeued_and_ends_as_if_it_had_not_been(slurm: Slurm, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": {"people": 3, "facts_per_person": 4, "max_length": 64},
        "model": {"config": LLAMA, "vocab_size": 280},
        "train": {
            "epochs": 20, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 0.02, "optimizer": "adamw"
        },
        "log": {"save_interval": 10},
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    whole, log = tmp_path / "whole", tmp_path / "log"

    # Two agents of torchrun on one host are two nodes as well: the run to compare with.
    job = submit(slurm, tmp_path, "train", "torchrun", config, "--log_dir", str(whole))
    slurm.wait(lambda: slurm.state(job) not in ("RUNNING", "PENDING", "COMPLETING"), 240)
    assert slurm.state(job) == "COMPLETED", output(tmp_path)
    assert TrajectoryLog(whole).num_steps == STEPS and TrajectoryLog(whole).manifest.world_size == 2

    job = submit(slurm, tmp_path, "train", "deepspeed", config, "--log_dir", str(log))
    slurm.wait(lambda: (log / "snapshots" / "step-10").is_dir() or slurm.state(job) == "FAILED", 240)
    assert slurm.state(job) == "RUNNING", output(tmp_path)
    slurm.run("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.state(job) == "PENDING", 60)
    stopped = TrajectoryLog(log).num_steps
    print(f"requeued after step {stopped} of {STEPS}")
    assert 10 <= stopped < STEPS and (log / "snapshots" / f"step-{stopped}").is_dir(), output(tmp_path)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.wait(lambda: slurm.state(job) not in ("RUNNING", "PENDING", "COMPLETING"), 240)
    assert slurm.state(job) == "COMPLETED", output(tmp_path)
    assert records_of(TrajectoryLog(log)) == records_of(TrajectoryLog(whole))

    found = tmp_path / "unlearned"
    sample = TrajectoryLog(log).record(1).sample_ids[0]
    options = [
        "--log_dir",
        str(log),
        "--forget.samples",
        str(sample),
        "--reference",
        "replay",
        "--output_dir",
        str(found),
    ]
    job = submit(slurm, tmp_path, "unlearn", "srun", config, *options, "--unlearn.replay_head", "all")
    slurm.wait(lambda: slurm.state(job) not in ("RUNNING", "PENDING", "COMPLETING"), 240)
    assert slurm.state(job) == "COMPLETED", output(tmp_path)
    result = read_json(found / "result.json")
    assert result["status"] == "done" and result["world_size"] == 2 and result["rel_error"] == 0
    bad = submit(slurm, tmp_path, "unlearn", "srun", config, "--log_dir", str(tmp_path / "nowhere"))
    slurm.wait(lambda: slurm.state(bad) not in ("RUNNING", "PENDING", "COMPLETING"), 120)
    assert slurm.state(bad) == "FAILED" and "nowhere" in output(tmp_path)
