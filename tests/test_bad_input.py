"""Bad input: one clear line, the same on every rank, before long work, and nothing written or changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_zero3 import GPT2, small_config, this_runtime, train_job

from lmc_dist.config import Config, DataConfig, ForgetConfig, LogConfig, ModelConfig, RequestConfig, UnlearnConfig
from lmc_dist.errors import LmcError
from lmc_dist.ports import free_port


def unlearn_job(config: Config) -> str:
    """The error of an unlearning run on this rank; '' if it had none."""
    from lmc_dist.unlearn.run import unlearn

    try:
        unlearn(config, this_runtime())
    except LmcError as error:
        return str(error)
    return ""


def digest(folder: Path) -> str:
    """Digest of all files below a folder."""
    parts = [
        f"{p.relative_to(folder)}:{hashlib.sha256(p.read_bytes()).hexdigest()}"
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def trained(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = small_config(tmp_path_factory.mktemp("trained"))
    ranks(2).run(train_job, config)
    return config


def update_file(log: Path, rank: int = 1, step: int = 5) -> Path:
    return log / "steps" / f"step-{step:08d}" / f"update.rank-{rank:05d}-of-00002.safetensors"


def truncate(log: Path) -> None:
    path = update_file(log)
    path.write_bytes(path.read_bytes()[:-100])


def misname(log: Path) -> None:
    """A file of another world size under this one's name."""
    path = update_file(log)
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, metadata={"rank": "1", "world_size": "3"})


def rewrite(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(log: Path) -> None:
        path = update_file(log)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        change(tensors)
        save_file(tensors, path, metadata=header)

    return damage


def set_nan(tensors: Any) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = float("nan")


def flip_bit(tensors: Any) -> None:
    import torch

    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[0] ^= 1 << 24


def drop_tensor(tensors: Any) -> None:
    del tensors["model.norm.weight"]


def shorten(tensors: Any) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def sql(statement: str) -> Callable[[Path], None]:
    def damage(log: Path) -> None:
        with sqlite3.connect(log / "steps.sqlite") as connection:
            connection.execute(statement)

    return damage


def edit_manifest(log: Path) -> None:
    manifest = json.loads((log / "manifest.json").read_text())
    manifest["schema"] = 99
    (log / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no log": (shutil.rmtree, "no trajectory log in"),
    "no step table": (lambda log: (log / "steps.sqlite").unlink(), "steps.sqlite is missing"),
    "step table cut": (lambda log: (log / "steps.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 100), "is damaged"),
    "gap": (sql("DELETE FROM steps WHERE step = 4"), "lacks step 4: the log has a gap"),
    "manifest cut": (lambda log: (log / "manifest.json").write_text('{"schema": 3,'), "manifest.json is damaged"),
    "other schema": (edit_manifest, "has schema 99, this version reads 3"),
    "file of a rank missing": (lambda log: update_file(log).unlink(), "file of rank 1 of 2 is missing"),
    "file cut": (truncate, "step 5: .* is damaged"),
    "file of another world size": (misname, "step 5: the header of .* does not have the digest in the step table"),
    "NaN in a shard": (
        rewrite(set_nan),
        "rank 1: .*step 5: the bytes of tensor 'model.layers.0.self_attn.q_proj.weight' .* do not have their digest",
    ),
    "flipped bit": (
        rewrite(flip_bit),
        "step 5: the bytes of tensor 'model.layers.1.mlp.up_proj.weight' in .* do not have their digest",
    ),
    "tensor missing": (rewrite(drop_tensor), "step 5: rank 1's file lacks tensor 'model.norm.weight'"),
    "tensor too short": (
        rewrite(shorten),
        "tensor 'model.norm.weight' of rank 1 is stored as F32 of shape .7., its header says F32 of shape .8.",
    ),
    "snapshot cut": (
        lambda log: [p.write_bytes(p.read_bytes()[:200]) for p in (log / "snapshots/step-0").glob("*.safetensors")],
        "snapshot .* is damaged",
    ),
    "foreign path in the table": (
        sql("""UPDATE steps SET tensors = '{"../../etc": ["0", "0"]}' WHERE step = 5"""),
        "row of step 5 does not say where its tensors are",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_log_is_refused_on_every_rank(ranks: Any, trained: Config, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    log = tmp_path / "log"
    shutil.copytree(trained.log_dir, log)
    damage(log)
    before = digest(tmp_path)
    config = replace(
        trained, log_dir=str(log), output_dir=str(tmp_path / "out"), forget=ForgetConfig(samples=first_ids(trained))
    )
    errors = ranks(2).run(unlearn_job, config, timeout=30)
    import re

    assert all(re.search(message, error) for error in errors), errors
    assert digest(tmp_path) == before and not (tmp_path / "out").exists()


def first_ids(config: Config) -> str:
    from lmc_dist.trajectory.store import TrajectoryLog

    return ",".join(map(str, TrajectoryLog(config.log_dir).record(1).sample_ids[:2]))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown ids": ({"forget": ForgetConfig(samples="3,777,999")}, "2 ids to forget are not in the dataset: 777, 999"),
    "unknown split": ({"forget": ForgetConfig(split="person-9")}, "unknown split 'person-9'; the data has .*person-0"),
    "unknown batches": ({"forget": ForgetConfig(batches="2,88")}, r"not in the log: 88 \(it holds 0 to 7\)"),
    "nothing to forget": ({"forget": ForgetConfig()}, "say what to forget"),
    "two targets": ({"forget": ForgetConfig(samples="3", batches="1")}, "give one of"),
    "bad ids": ({"forget": ForgetConfig(samples="3,x")}, "x"),
    "samples skipped": ({"forget": ForgetConfig(samples="3", counterfactual="skip")}, "'skip' forgets whole batches"),
    "K < 0": ({"unlearn": UnlearnConfig(K=-1)}, "unlearn.K must be ≥ 0 or null, got -1"),
    "replay head": ({"unlearn": UnlearnConfig(replay_head=-5)}, "replay_head must be a number of steps"),
    "damping < 0": ({"unlearn": UnlearnConfig(damping=-0.1)}, "damping must be ≥ 0"),
    "other model": ({"model": ModelConfig(config=GPT2, vocab_size=300)}, r"the model is not the logged one: .*gpt2"),
    "other data": ({"data": DataConfig(people=4, facts_per_person=6, seed=1, max_length=96)}, "the dataset is not"),
    "bad comparison": ({"compare": "tim,magic"}, "unknown method 'magic'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings_are_refused_on_every_rank(ranks: Any, trained: Config, tmp_path: Path, name: str) -> None:
    import re

    change, message = SETTINGS[name]
    config = replace(trained, output_dir=str(tmp_path / "out"), forget=ForgetConfig(samples="3"))
    errors = ranks(2).run(unlearn_job, replace(config, **change), timeout=30)
    assert all(re.search(message, error) for error in errors), errors
    assert errors[0] == errors[1] and not list(tmp_path.iterdir())


def test_existing_results_are_not_overwritten_by_accident(ranks: Any, trained: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    config = replace(trained, output_dir=str(tmp_path / "out"), forget=ForgetConfig(samples="3"))
    assert "is not empty" in ranks(2).run(unlearn_job, config)[0]
    assert "holds no result.json" in ranks(2).run(unlearn_job, replace(config, overwrite=True))[0]
    (tmp_path / "out" / "result.json").touch()
    broken = replace(config, overwrite=True, forget=ForgetConfig(samples="999"))
    assert "not in the dataset" in ranks(2).run(unlearn_job, broken)[0]  # found before anything is removed
    assert (tmp_path / "out" / "precious.txt").exists()


def everything_job(config: Config) -> tuple[list[Any], str, list[str]]:
    """(losses on retained samples, the table, warnings) of a run that forgets all samples."""
    from lmc_dist.console import unlearning_table
    from lmc_dist.trajectory.store import TrajectoryLog
    from lmc_dist.unlearn import asked
    from lmc_dist.unlearn.run import unlearn

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asked.logger, "warning", lambda text, *args: said.append(text % args))
        ids = {i for record in TrajectoryLog(config.log_dir).records() for i in record.sample_ids}
        request = ForgetConfig(samples=",".join(map(str, sorted(ids))))
        result = unlearn(replace(config, forget=request), this_runtime())
    return [row["loss_retain"] for row in result["rows"]], unlearning_table(result), said


def test_forgetting_everything_is_remarked_on(ranks: Any, trained: Config, tmp_path: Path) -> None:
    config = replace(trained, output_dir=str(tmp_path / "out"), unlearn=UnlearnConfig(replay_head="all"))
    for retained, table, said in ranks(2).run(everything_job, config):
        assert retained == [None, None] and len(said) == 1 and said[0].startswith("nothing remains: all samples")
        assert all(re.search(r"\d\.\d{4} +- ", line) for line in table.splitlines()[2:]), table


def ring_and_log_job(config: Config) -> str:
    from lmc_dist.training import Trainer

    try:
        Trainer(config, this_runtime()).run()
    except LmcError as error:
        return str(error)
    return ""


def test_training_refuses_a_used_log_and_bad_settings(ranks: Any, trained: Config, tmp_path: Path) -> None:
    assert "is not empty" in ranks(2).run(ring_and_log_job, trained)[1]
    config = replace(trained, log_dir=str(tmp_path / "log"))
    cases = [
        (replace(config, train=replace(config.train, batch_size=0)), "train.batch_size must be at least 1"),
        (replace(config, train=replace(config.train, learning_rate=-1.0)), "train.learning_rate must be ≥ 0"),
        (replace(config, train=replace(config.train, schedule="wavy")), "wavy"),
        (replace(config, train=replace(config.train, deepspeed="no.json")), "train.deepspeed 'no.json'"),
        (replace(config, model=ModelConfig()), "say which model"),
        (replace(config, model=ModelConfig(path="./nowhere")), "model.path './nowhere'"),
        (replace(config, log=LogConfig(storage="all")), "unknown log storage 'all'"),  # type: ignore[arg-type]
        (replace(config, log=LogConfig(save_interval=None, max_steps=3)), "a ring .* needs save_interval"),
    ]
    for bad, message in cases:
        errors = ranks(2).run(ring_and_log_job, bad)
        assert all(re.search(message, error) for error in errors), (message, errors)
    assert not (tmp_path / "log").exists()
    kept = digest(Path(trained.log_dir))
    bad = replace(trained, overwrite=True, train=replace(trained.train, schedule="wavy"))
    assert "wavy" in ranks(2).run(ring_and_log_job, bad)[0]
    assert digest(Path(trained.log_dir)) == kept  # overwriting waits until everything else is known to be well


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launched_ranks_exit_with_one_line(tmp_path: Path, launcher: str) -> None:
    """The real launchers: non-zero, within 30 s, one error line, no traceback."""
    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
    }[launcher]
    bin_dir = Path(sys.executable).parent
    command = [str(bin_dir / start[0]), *start[1:], "launch/unlearn.py", "--config", "configs/demo.yaml"]
    command += [
        "--log_dir",
        str(tmp_path / "nothing"),
        "--forget.split",
        "person-1",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False, timeout=60)
    assert time.monotonic() - started < 30
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "no trajectory log in" in lines[0]
    assert "Traceback" not in done.stderr.split("elastic")[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_that_was_not_told_which_does_not_wait(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from lmc_dist import runtime
    from lmc_dist.log_commands.ranks import join_ranks

    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    runtime.check_launched(told)
    runtime.check_launched({})  # a process started alone
    runtime.check_launched({"WORLD_SIZE": "1"})
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(runtime, "quiet", pytest.fail)  # what comes next
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(missing)
    for join in (runtime.init, join_ranks):
        with pytest.raises(LmcError, match=f"WORLD_SIZE=2 in the environment, without {missing}: start the ranks with"):
            join()


def test_paths_that_end_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmc_dist.audit.show import show_audit
    from lmc_dist.log_commands.forget import file_request, show_ledger
    from lmc_dist.runtime import check_replaceable, promoted, set_aside
    from lmc_dist.trajectory.files import ledger_folder
    from lmc_dist.trajectory.swap import building

    (tmp_path / "log" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "log")
    for here in (".", "x/.."):
        assert ledger_folder(here) == tmp_path / "log.requests" and building(Path(here)) == tmp_path / "log.rewriting"
        assert set_aside(Path(here)) == tmp_path / "log.old"
        config = Config(log_dir=here, output_dir=here, request=RequestConfig(ids="3"))
        assert "1 sample" in file_request(config) and "pending" in show_ledger(config)
        with pytest.raises(LmcError, match=f"{tmp_path}/log holds no audit"):
            show_audit(config)
        with pytest.raises(LmcError, match="is the present folder, and results replace theirs as a whole"):
            check_replaceable(Path(here), "result.json", overwrite=True)
    assert ledger_folder("runs/log") == Path("runs/log.requests")  # others stay as they are written
    check_replaceable(Path("x/y/.."), "result.json", overwrite=False)
    with promoted(Path("x/y/..")) as part:
        (part / "result.json").touch()
    assert [path.name for path in (tmp_path / "log").rglob("*")] == ["x", "result.json"]


def test_results_are_whole_wherever_their_replacement_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmc_dist.runtime import check_replaceable, promoted

    out = tmp_path / "out"
    renames = Path.rename
    for cut in (1, 2, None):
        for folder in (out, out.with_name("out.old"), out.with_name("out.part")):
            shutil.rmtree(folder, ignore_errors=True)
        out.mkdir()
        (out / "result.json").write_text("old")
        left = [cut]

        def rename(self: Path, target: Path) -> Path:
            if left[0] is not None:  # noqa: B023
                left[0] -= 1  # noqa: B023
                if left[0] == 0:  # noqa: B023
                    raise KeyboardInterrupt
            return renames(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        try:
            with promoted(out) as part:
                (part / "result.json").write_text("new")
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(Path, "rename", renames)
        places = [out, out.with_name("out.old")]
        (whole,) = [place for place in places if (place / "result.json").exists()]
        assert (whole / "result.json").read_text() == ("new" if cut is None else "old")
        if whole != out:
            with pytest.raises(LmcError, match="cut off left: move it back"):
                check_replaceable(out, "result.json", overwrite=False)
        check_replaceable(out, "result.json", overwrite=True)
        with promoted(out) as part:
            assert (out / "result.json").exists()
            (part / "result.json").write_text("newest")
        assert (out / "result.json").read_text() == "newest" and not places[1].exists()
