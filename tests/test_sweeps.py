"""Sweep files as wandb has them, cells of a sweep, the local runner, and what wandb is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPO
from test_zero3 import small_config, this_runtime

from lmc_dist import tracking
from lmc_dist.cli import parse
from lmc_dist.config import (
    BaselineConfig,
    CellConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ForgetConfig,
    ModelConfig,
    SweepConfig,
    TrainConfig,
    UnlearnConfig,
    WandbConfig,
)
from lmc_dist.errors import LmcError
from lmc_dist.runtime import Runtime
from lmc_dist.sweeps.cell import cell, row_path, stored_row
from lmc_dist.sweeps.children import Fork, wait
from lmc_dist.sweeps.grid import SweepFile, combinations, read_sweep, render
from lmc_dist.sweeps.identity import identify
from lmc_dist.sweeps.plan import plan_sweep
from lmc_dist.sweeps.runner import sweep
from lmc_dist.sweeps.shared import remove_shared, turn
from lmc_dist.sweeps.summary import mean_of
from lmc_dist.trajectory.lock import LogLock

FILES = sorted((REPO / "configs" / "sweeps").glob("*.yaml"))
PLACES = {"LMC_DATA": "data", "LMC_MODEL": "model", "LMC_OUTPUT": "runs/sweep", "LMC_RANKS": "2"}
ALONE = Runtime(0, 1, torch.device("cpu"))


# --- sweep files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_those_of_wandb(path: Path) -> None:
    """By the schema of W&B's own search package; its grid has the same cells in the same order."""
    pytest.importorskip("sweeps", reason="W&B's search package is not installed: make peers")
    from sweeps.config import schema_violations_from_proposed_config
    from sweeps.grid_search import grid_search_next_runs

    content = yaml.safe_load(path.read_text())
    assert schema_violations_from_proposed_config(content) == []
    assert schema_violations_from_proposed_config(content | {"method": "nonsense"})
    mine = combinations(read_sweep(path))
    theirs = grid_search_next_runs([], content, n=len(mine) + 1)
    assert theirs.pop() is None  # no more than these
    assert [{name: entry["value"] for name, entry in run.config.items()} for run in theirs if run] == mine


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_lines_are_those_of_wandb(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_agent = pytest.importorskip("wandb.wandb_agent", reason="pip install 'lmc_dist[wandb]'")
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    for name, value in {**PLACES, "WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    file = read_sweep(path)
    agent = wandb_agent.Agent(None, None)
    cells = combinations(file)
    for i, parameters in enumerate(cells):
        agent._sweep_command = list(file.content["command"])
        arguments = {name: {"value": value} for name, value in parameters.items()}
        agent._command_run({"run_id": f"r{i}", "program": file.program, "args": arguments})
    assert started == [render(file, parameters, os.environ) for parameters in cells]


def test_the_proof_sweep_has_all_that_it_should() -> None:
    plan = plan_sweep([str(path) for path in FILES if path.stem.startswith("tofu")], os.environ | PLACES, 0)
    cells = [planned.identity for planned in plan.cells]
    methods = {"do_nothing", "retrain", "replay", "tim", "lmcleaner", "retain", "ga", "graddiff", "npo"}
    assert {c.method for c in cells} == methods
    for split in ("forget01", "forget10"):
        assert {c.method for c in cells if c.split == split} == methods
        assert {c.seed for c in cells if c.split == split} == {0, 1, 2}
    own = [c.config.unlearn for c in cells if c.method == "lmcleaner"]
    assert {u.hessian_mode for u in own} == {"GGN", "exact", "low_rank", "fisher"}
    assert {u.K for u in own} == {10, 50, None} and {u.replay_head for u in own} == {0, 10}
    assert len({c.name for c in cells}) == len(cells)
    assert not plan.dropped
    launchers = ("torchrun", "deepspeed")
    assert all(any(word in planned.command for word in launchers) for planned in plan.cells)


def sweep_file(folder: Path, **content: Any) -> str:
    path = folder / "sweep.yaml"
    usual = {"program": "cell.py", "method": "grid", "parameters": {"train.seed": {"values": [0, 1]}}}
    path.write_text(yaml.safe_dump({key: x for key, x in (usual | content).items() if x is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"method": "bayes"}, "needs W&B's server"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1}}, "'early_terminate' needs W&B's server"),
        ({"parameters": {"a": {"min": 0.0, "max": 1.0}}}, "parameter a needs 'value' or 'values'"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "nested parameters are not carried out"),
        ({"parameters": {"a": {"values": []}}}, "not empty"),
        ({"parameters": None}, "needs 'method', 'program' and 'parameters'"),
        ({"program": None}, "needs 'program'"),
        ({"command": ["${program}", "${args_json}"]}, "${args_json} in 'command' is not known"),
        (
            {"command": ["${program}", "--x", "${envvar:LMC_NOWHERE}", "${args}"]},
            "variable LMC_NOWHERE, which is not set",
        ),
        ({"command": ["python", "cell.py", "${args}"]}, "must have ${program} and ${args}"),
        ({"method": "random"}, "needs run_cap"),
        ({"run_cap": 0}, "run_cap must be"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(LmcError) as refused:
        plan_sweep([sweep_file(tmp_path, **content)], {}, 0)
    assert said in str(refused.value) and "sweep.yaml" in str(refused.value)
    (tmp_path / "broken.yaml").write_text("a: [")
    for path in ("broken.yaml", "nowhere.yaml"):
        with pytest.raises(LmcError, match=path):
            read_sweep(tmp_path / path)


def test_draws_are_those_of_the_seed(tmp_path: Path) -> None:
    values = {"a": {"values": list(range(100))}, "b": {"value": "x"}}
    file = read_sweep(sweep_file(tmp_path, method="random", run_cap=5, parameters=values))
    first = combinations(file, 3)
    assert first == combinations(file, 3) != combinations(file, 4) and len(first) == 5
    assert all(drawn["b"] == "x" for drawn in first)
    capped = read_sweep(sweep_file(tmp_path, run_cap=3, parameters=values))
    assert [drawn["a"] for drawn in combinations(capped)] == [0, 1, 2]


def test_null_and_the_other_spelling_reach_the_cell(tmp_path: Path) -> None:
    file = SweepFile(tmp_path, "cell.py", ("${program}", "${args_no_equals}"), "grid", {}, None, {})
    command = render(file, {"unlearn.K": None, "unlearn.damping": 1e-05, "cell.evaluate": False}, {})
    assert command == ["cell.py", "--unlearn.K", "None", "--unlearn.damping", "1e-05", "--cell.evaluate", "False"]
    for arguments in (command[1:], ["--unlearn.K=None", "--unlearn.damping=1e-05", "--cell.evaluate=False"]):
        config = parse("cell", ["--unlearn.K", "7", *arguments])
        assert (config.unlearn.K, config.unlearn.damping, config.cell.evaluate) == (None, 1e-5, False)


# --- which cells are the same ----------------------------------------------------------------------------------------------


def test_settings_without_effect_make_no_other_cell() -> None:
    base = Config(forget=ForgetConfig(split="person-1"), cell=CellConfig(evaluate=False))

    def name(method: str = "lmcleaner", **changes: Any) -> str:
        sections = {"cell": replace(base.cell, method=method, **changes.pop("cell", {})), **changes}  # type: ignore[arg-type]
        return identify(replace(base, **sections)).name

    replays = {
        name("replay"),
        name("replay", unlearn=UnlearnConfig(K=3)),
        name(unlearn=UnlearnConfig(replay_head="all")),
    }
    assert len(replays) == 1
    rollbacks = {name("tim"), name("tim", unlearn=UnlearnConfig(K=3)), name(unlearn=UnlearnConfig(hessian_mode="none"))}
    assert len(rollbacks) == 1
    assert name(unlearn=UnlearnConfig(rank=4)) == name()  # GGN has no rank
    low_rank = UnlearnConfig(hessian_mode="low_rank")
    assert name(unlearn=replace(low_rank, rank=4)) != name(unlearn=low_rank)
    assert name("npo", baseline=BaselineConfig(beta=0.5)) != name("npo")
    assert name("ga", baseline=BaselineConfig(beta=0.5, retain_weight=3)) == name("ga")
    assert name("do_nothing", baseline=BaselineConfig(epochs=9), cell={"post_epochs": 2}) == name("do_nothing")
    assert name("tim", cell={"post_epochs": 2}) != name("tim")
    assert name("do_nothing", cell={"folder": "elsewhere"}) == name("do_nothing")
    others = [name(), name(unlearn=UnlearnConfig(K=10)), name(unlearn=UnlearnConfig(damping=0.1)), *replays, *rollbacks]
    others += [
        name(train=TrainConfig(seed=1)),
        name(forget=ForgetConfig(split="person-2")),
        name(data=DataConfig(seed=1)),
    ]
    assert len(set(others)) == len(others)
    for bad in ({"forget": ForgetConfig()}, {"unlearn": UnlearnConfig(strategy="auto")}, {"cell": {"post_epochs": -1}}):
        with pytest.raises(LmcError):
            name(**bad)


# --- cells -----------------------------------------------------------------------------------------------------------------


def tiny_cell(folder: Path, **changes: Any) -> Config:
    """24 invented samples in eight steps, of whom one person is forgotten."""
    config = small_config(folder, learning_rate=0.05)
    sections = {
        "forget": ForgetConfig(split="person-1"),
        "cell": CellConfig(folder=str(folder), evaluate=False),
        "baseline": BaselineConfig(epochs=1, batch_size=7, micro_batch_size=7, learning_rate=1e-3),
        "progress": "none",
    }
    for name, value in changes.items():
        sections[name] = replace(sections.get(name, getattr(config, name)), **value)  # type: ignore[type-var]
    return replace(config, **sections)


def cells_job(configs: list[Config], folder: str) -> list[dict[str, Any]]:
    os.environ.update(WANDB_DIR=folder, WANDB_MODE="offline")
    rows = []
    for config in configs:
        try:
            rows.append(cell(config, this_runtime()))
        except LmcError as error:
            rows.append({"error": str(error)})
    return rows


@pytest.mark.timeout(1500)
def test_cells_share_training_and_leave_rows(ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    kinds: dict[str, dict[str, Any]] = {
        "do nothing": {"cell": {"method": "do_nothing"}},
        "replay": {"cell": {"method": "replay"}, "unlearn": {"K": 3}},
        "GGN": {"wandb": {"project": "tests", "tags": "a, b"}},
        "GGN, then tuned": {"cell": {"post_epochs": 1}},
        "npo": {"cell": {"method": "npo"}, "wandb": {"project": "tests"}},
        "diverges": {"unlearn": {"damping": 1e9}},
        "retrain": {"cell": {"method": "retrain"}},
    }
    configs = {name: tiny_cell(folder, **changes) for name, changes in kinds.items()}
    (tmp_path / "wandb").mkdir()
    first, second = ranks(2).run(cells_job, list(configs.values()), str(tmp_path), timeout=1200)
    assert first == second
    rows = dict(zip(kinds, first, strict=True))
    errors = {name: row.get("rel_error") for name, row in rows.items()}
    assert errors["do nothing"] == 1 and errors["retrain"] == errors["replay"] == 0
    assert 0 < errors["GGN"] < 1 and errors["npo"] > 0
    assert errors["GGN, then tuned"] != errors["GGN"] and rows["GGN, then tuned"]["label"].endswith(
        "1 epochs on retained"
    )
    assert rows["retrain"]["v_norm"] == pytest.approx(rows["replay"]["v_norm"], rel=1e-5)
    assert rows["do nothing"]["gradients"] == 0 and rows["retrain"]["gradients"] == 8
    assert rows["GGN, then tuned"]["gradients"] > rows["GGN"]["gradients"] > 8
    assert all(row["loss_forget"] > 0 and row["seed"] == 0 for row in first if "error" not in row)
    assert len(list((folder / "shared").iterdir())) == 2  # one training run, one retrain

    assert "the correction diverged" in rows["diverges"]["error"]
    stored = stored_row(identify(configs["diverges"]))
    assert stored is not None and "the correction diverged" in stored["failure"]["reason"]
    for name in ("GGN", "npo"):  # judged, so no longer needed
        run = row_path(identify(configs[name])).parent / "run"
        assert (run / "result.json").exists() and not (run / "model").exists() and not (run / "correction").exists()

    # wandb: one run a cell that asked for it, of the first rank alone, and never the network
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    told = b"".join(path.read_bytes() for path in runs)
    for words in (b"ggn/v_norm", b"ggn/growth", b"ggn/step", b"npo/step", b"audit.hvp_calls", b"rel_error"):
        assert words in told, words

    # nothing is done twice
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = ranks(2).run(cells_job, [c for name, c in configs.items() if name != "diverges"], str(tmp_path))[0]
    assert again == [row for row in first if "error" not in row]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before
    assert remove_shared(folder) > 0 and list((folder / "shared").iterdir()) == []


def test_cells_are_asked_tofus_questions(ranks: Any, test_data: Path, tmp_path: Path) -> None:
    base = Config(
        data=DataConfig("tofu", str(test_data / "tofu"), "3900:4000", max_length=160, prompt="{question}\n"),
        model=ModelConfig(str(test_data / "models" / "stories260K")),
        train=TrainConfig(max_steps=3, batch_size=8, learning_rate=0.05, engine="single"),
        forget=ForgetConfig(split="forget01"),
        evaluate=EvaluateConfig(limit=3, generate=False, resamples=20),
        cell=CellConfig(folder=str(tmp_path)),
        progress="none",
    )
    configs = [replace(base, cell=replace(base.cell, method=method)) for method in ("do_nothing", "retrain")]
    ((nothing, retrain),) = ranks(1).run(cells_job, configs, str(tmp_path))
    assert (
        set(nothing["metrics"]) == set(retrain["metrics"]) >= {"forget.probability", "auc.loss", "retain.probability"}
    )
    assert all(entry["distance"] in (0, None) for entry in retrain["metrics"].values())
    entry = nothing["metrics"]["forget.probability"]
    assert entry["distance"] == pytest.approx(entry["value"] - entry["retrain"]) and entry["distance"] > 0
    assert retrain["metrics"]["forget_quality.p_value"]["value"] == 1
    shared = list((tmp_path / "shared").glob("retrain-*/measured-*.json"))
    assert len(shared) == 1  # what the retrained model said was asked once
    ((other,),) = ranks(1).run(cells_job, [replace(base, data=DataConfig())], str(tmp_path))
    assert "TOFU's questions" in other["error"]


def test_work_is_waited_for(tmp_path: Path) -> None:
    done = tmp_path / "done"
    other = LogLock(tmp_path)

    def finish() -> None:
        time.sleep(1.5)
        done.touch()
        other.release()

    thread = threading.Thread(target=finish)
    thread.start()
    with turn(tmp_path, done.exists, ALONE) as is_mine:
        assert not is_mine
    thread.join()
    done.unlink()
    with pytest.raises(LmcError, match="no luck"), turn(tmp_path, done.exists, ALONE) as is_mine:
        assert is_mine
        raise LmcError("no luck")
    with turn(tmp_path, done.exists, ALONE) as is_mine:  # the lock was given back
        assert is_mine


# --- the runner ------------------------------------------------------------------------------------------------------------

# In place of launch/cell.py: what a cell leaves, at once. Seed 1 fails by itself, seed 2 is killed, seed 3 waits until it may.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from lmc_dist.cli import parse
from lmc_dist.sweeps.cell import empty_row, row_path
from lmc_dist.sweeps.identity import identify
from lmc_dist.trajectory.files import write_json

identity = identify(parse("cell", sys.argv[1:]))
folder, seed = Path(identity.config.cell.folder), identity.seed
with open(folder / "started", "a") as file:
    file.write(f"{seed} {os.getpid()}\\n")
if seed == 1:
    print("some words")
    sys.exit("error: no luck today")
if seed == 2:
    os.kill(os.getpid(), 9)
while seed == 3 and not (folder / "go").exists():
    time.sleep(0.05)
row = empty_row(identity)
row |= {"rel_error": 0.1 + seed, "loss_forget": 1.0, "loss_retain": 2.0, "gradients": 3.0, "seconds": 4.0}
write_json(row_path(identity), row)
"""


@pytest.mark.timeout(1500)
def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (tmp_path / "cell.py").write_text(PROGRAM)
    file = sweep_file(
        tmp_path,
        program=str(tmp_path / "cell.py"),
        command=["${env}", "python", "${program}", "--cell.folder", "${envvar:LMC_OUTPUT}", "--cell.evaluate", "false",
                 "--forget.split", "person-1", "${args}"],
        parameters={
            "train.seed": {"values": [0, 1, 2, 3, 4]},
            "cell.method": {"value": "replay"},
            "unlearn.K": {"values": [5, None]},
        },
    )  # fmt: skip

    def started() -> list[str]:
        lines = (folder / "started").read_text().splitlines() if (folder / "started").exists() else []
        return [line.split()[0] for line in lines]

    command = [sys.executable, "-m", "lmc_dist.cli", "sweep", file, "--output", str(folder)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while "3" not in started() and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    _, said = runner.communicate(timeout=300)
    assert runner.returncode == 130 and started() == ["0", "1", "2", "3"]
    assert said.count("dropped: ") == 5 and "unlearn.K=None, the same work as person-1-seed0-replay-" in said
    with pytest.raises(ProcessLookupError):  # the cell has not outlived it
        os.kill(int((folder / "started").read_text().split()[-1]), 0)
    rows = {json.loads(path.read_text())["seed"]: json.loads(path.read_text()) for path in folder.rglob("row.json")}
    assert sorted(rows) == [0, 1, 2] and rows[0]["failure"] is None
    assert rows[1]["failure"]["reason"] == "exit status 1: error: no luck today"
    assert (
        "some words" in Path(rows[1]["failure"]["log"]).read_text()
        and "killed by signal 9" in rows[2]["failure"]["reason"]
    )

    (folder / "go").touch()
    config = Config(sweep=SweepConfig(files=file, output=str(folder)))
    text, status = sweep(config)
    assert status == 1 and started() == ["0", "1", "2", "3", "1", "2", "3", "4"]  # the finished one not again
    assert "failed: 2 of the cells" in text and "no luck today" in text and "output: " in text
    assert re.search(r"person-1: exact replay +3 of 5 +2\.433 ± ", text)
    assert "| person-1: exact replay | 3 of 5 | 2.433 ± " in (folder / "sweep.md").read_text()
    sweep(replace(config, sweep=replace(config.sweep, retry=False)))
    assert len(started()) == 8
    found = json.loads((folder / "sweep.json").read_text())
    assert len(found["cells"]) == 5 and len(found["dropped"]) == 5 and found["files"][0]["content"]["method"] == "grid"
    table = (folder / "sweep.csv").read_text().splitlines()
    assert len(table) == 6 and table[1].startswith("replay,,exact replay,person-1,0,")
    page = (folder / "report" / "report.html").read_text()
    assert "Cells that failed" in page and "no luck today" in page and "Cells left out" in page
    assert sweep(replace(config, sweep=replace(config.sweep, dry_run=True)))[1] == 0


def test_forked_cells_are_cells(tmp_path: Path) -> None:
    with open(tmp_path / "output.txt", "w") as output:
        status = wait(Fork(["--forget.split", "person-1", "--cell.no_such", "1"], dict(os.environ), output))
    assert status == 2 and "cell.no_such" in (tmp_path / "output.txt").read_text()
    with pytest.raises(LmcError, match="cells of one process"):
        parameters = {"forget.split": {"value": "person-1"}, "cell.evaluate": {"value": False}}
        files = sweep_file(tmp_path, parameters=parameters)
        sweep(Config(sweep=SweepConfig(files=files, output=str(tmp_path), fork=True, ranks=2)))


def test_files_of_one_sweep_share_a_folder(tmp_path: Path) -> None:
    parameters = {
        "cell.folder": {"values": ["a", "b"]},
        "forget.split": {"value": "person-1"},
        "cell.evaluate": {"value": False},
    }
    with pytest.raises(LmcError, match=r"one cell\.folder"):
        plan_sweep([sweep_file(tmp_path, parameters={**parameters, "train.seed": {"values": [0, 1]}})], {}, 0)
    with pytest.raises(LmcError, match="say which sweep"):
        plan_sweep([], {}, 0)


def test_means_have_t_intervals() -> None:
    found = mean_of([1.0, 2.0, 3.0, None, float("nan")])
    assert (found.value, found.count) == (2.0, 3) and found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert mean_of([5.0]).half is None and mean_of([]).value is None


# --- wandb -----------------------------------------------------------------------------------------------------------------


def test_when_wandb_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*tracking.KEYS, "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    auto = WandbConfig(project="p")
    assert tracking.effective_mode(WandbConfig()) == "disabled" and tracking.effective_mode(auto) == "offline"
    with pytest.raises(LmcError, match="there is no key"):
        tracking.check_tracking(replace(auto, mode="online"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking.effective_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tracking.effective_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.effective_mode(auto) == "online"
    for given, found in (("dryrun", "offline"), ("disabled", "disabled"), ("offline", "offline")):
        monkeypatch.setenv("WANDB_MODE", given)
        assert tracking.effective_mode(auto) == found
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(LmcError, match=r"pip install 'lmc_dist\[wandb\]'"):
        tracking.check_tracking(auto)
    tracking.check_tracking(WandbConfig())
    with tracking.tracked(Config(), True) as tracker:  # nothing is imported, nothing is told
        tracker.event({"method": "ggn", "step": 1})
        assert tracker.listeners == []


def test_wandb_is_not_told_what_is_forgotten(tmp_path: Path) -> None:
    """In a process of its own: wandb takes the command line from sys.argv, and writes it a moment after the start."""
    pytest.importorskip("wandb", reason="pip install 'lmc_dist[wandb]'")
    script = f"""if True:
        import time
        from lmc_dist.config import Config, ForgetConfig, SlurmConfig, WandbConfig
        from lmc_dist.tracking import tracked
        config = Config(
            forget=ForgetConfig(samples="987654"),
            slurm=SlurmConfig(arguments="--forget.samples 987654"),
            wandb=WandbConfig(project="tests", mode="offline"),
        )
        with tracked(config, True, {str(tmp_path)!r}) as tracker:
            time.sleep(3)
            tracker.summary({{"rel_error": 0.25}})
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    subprocess.run(
        [sys.executable, "-c", script, "--forget.samples", "987654"], env=environment, check=True, timeout=300
    )
    (told,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"rel_error" in told.read_bytes()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"987654" in path.read_bytes()] == []


def test_figures_are_flat() -> None:
    assert tracking.flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
