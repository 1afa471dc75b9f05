"""lmc log inspect, verify, doctor, prune, reshard and lmc plan log, on logs of real ranks."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_zero3 import small_config, this_runtime, train_job

from lmc_dist.config import Config, DoctorConfig, ForgetConfig, LogConfig, PlanConfig, PruneConfig, ReshardConfig
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.inspect import inspect_log, summary
from lmc_dist.trajectory import prune as pruning
from lmc_dist.trajectory.contents import folder_bytes, read_contents
from lmc_dist.trajectory.lock import LogLock
from lmc_dist.trajectory.prune import dry_run, prune
from lmc_dist.trajectory.reader import ShardReader, apply_fixes
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.reshard import reshard
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.table import StepTable
from lmc_dist.trajectory.verify import Verification, verify
from lmc_dist.trajectory.writer import drop_before

BIN = Path(sys.executable).parent
# Name → settings of its log; 2 ranks, 8 steps, snapshots 0, 3, 6, 8.
STORED: dict[str, dict[str, Any]] = {
    "replay": {"storage": "replay"},
    "update": {"storage": "update", "save_batch_data": True},
    "gradient": {"storage": "gradient", "compression": "zstd", "update_dtype": "bfloat16"},
    "full": {"storage": "full", "gradient_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def logs(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    configs = {}
    for name, settings in STORED.items():
        config = small_config(tmp_path_factory.mktemp(name), optimizer="adamw", learning_rate=0.003)
        configs[name] = replace(config, log=LogConfig(**({"save_interval": 3} | settings)))
        ranks(2).run(train_job, configs[name])
    return configs


@pytest.fixture
def copy(logs: dict[str, Config], tmp_path: Path) -> Callable[[str], Path]:
    """`copy(name)`: a log that the test may damage."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(logs[name].log_dir, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"))

    return make


# --- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", list(TIERS))
def test_plan_and_training_agree_on_bytes(logs: dict[str, Config], tmp_path: Path, storage: str) -> None:
    from lmc_dist.log_commands.plan import plan_log

    config = replace(logs[storage], json=str(tmp_path / "plan.json"), plan=PlanConfig(step_seconds=0.5))
    text = plan_log(replace(config, plan=replace(config.plan, calibrate=storage == "update")))
    assert f"→ {storage}" in text and all(f"  {other}" in text for other in TIERS if other != storage)
    plans = {tier["storage"]: tier for tier in json.loads((tmp_path / "plan.json").read_text())["tiers"]}
    actual = folder_bytes(Path(config.log_dir))
    assert plans[storage]["total"] == pytest.approx(actual, rel=0.05)
    assert (plans["update"]["overhead"] is not None) == (storage == "update")
    found = summary(read_contents(config.log_dir))["bytes"]
    assert found["total"] == actual == sum(found["disk"].values())
    for kind, predicted in found["predicted"].items():
        # how many elements u does not reproduce, and how far bytes shrink, is the run's; the rest is counted exactly
        guessed = {"update": 0.1, "gradient": 0.2} if storage == "gradient" else {"update": 0.1}
        assert predicted == pytest.approx(found["disk"][kind], rel=guessed.get(kind, 0.01)), kind


# --- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_log_holds(logs: dict[str, Config], tmp_path: Path) -> None:
    config = replace(logs["update"], json=str(tmp_path / "summary.json"), plot=str(tmp_path / "curves.png"))
    text = inspect_log(config)
    for words in (
        "complete",
        "llama",
        "deepspeed-zero3 on 2 ranks",
        "AdamW",
        "8 up to epoch",
        "24 seen 2 times",
        "snapshots   0, 3, 6, 8",
        "steps 0–7 by correction or replay",
        "bytes a step and parameter",
    ):
        assert words in text, words
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["steps"]["whole"] == "0–7" and found["problems"] == []
    assert found["forget"]["correction"] and found["loss"]["last"] < found["loss"]["first"]
    assert "no correction: storage 'replay'" in inspect_log(logs["replay"])


def test_inspect_of_logs_that_are_cut_off_written_or_damaged(copy: Callable[[str], Path]) -> None:
    path = copy("update")
    shutil.rmtree(path / "snapshots" / "step-8")
    (path / "steps" / "step-00000007" / "update.rank-00001-of-00002.safetensors").unlink()
    text = inspect_log(Config(log_dir=str(path)))
    assert "cut off" in text and "whole       0–6" in text and "step 7: the update of rank 1 of 2 is missing" in text
    lock = LogLock(path)
    assert "being written by process" in inspect_log(Config(log_dir=str(path)))
    lock.release()
    with closing(sqlite3.connect(path / "steps.sqlite")) as connection, connection:
        connection.execute("UPDATE steps SET lr = '[0.5]' WHERE step = 2")
    assert "damaged     step 2" in inspect_log(Config(log_dir=str(path)))


# --- verify ------------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    """Flips a bit of a byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << 4
    path.write_bytes(data)


def last_tensor(path: Path) -> str:
    """The tensor whose bytes are the last of a safetensors file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    filled = {name: entry["data_offsets"] for name, entry in header.items()}
    return max((name for name, (low, high) in filled.items() if low < high), key=lambda name: filled[name][1])


def step_file(log: Path, kind: str, step: int = 5, rank: int = 1) -> Path:
    return log / "steps" / f"step-{step:08d}" / f"{kind}.rank-{rank:05d}-of-00002.safetensors"


def flip_in_table(log: Path, query: str) -> None:
    """Flips a bit of the value that a query finds, in the file of the table."""
    path = log / "steps.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        (value,) = connection.execute(query).fetchone()
    wanted = value.encode() if isinstance(value, str) else value
    data = path.read_bytes()
    assert data.count(wanted) == 1
    flip(path, data.index(wanted) + len(wanted) // 2)


def damage_tensor(kind: str) -> Callable[[Path], list[dict[str, Any]]]:
    def damage(log: Path) -> list[dict[str, Any]]:
        path = step_file(log, kind)
        flip(path, -1)
        return [{"step": 5, "rank": 1, "kind": kind, "tensor": last_tensor(path)}]

    return damage


def damage_header(log: Path) -> list[dict[str, Any]]:
    path = step_file(log, "update", step=2, rank=0)
    flip(path, path.read_bytes().index(b"tensors") + 200)
    return [{"step": 2, "rank": 0, "kind": "update"}]


def damage_missing(log: Path) -> list[dict[str, Any]]:
    for rank in range(2):
        step_file(log, "update", step=4, rank=rank).unlink()
    return [{"step": 4, "rank": rank, "kind": "update"} for rank in range(2)]


def damage_snapshot(log: Path) -> list[dict[str, Any]]:
    path = log / "snapshots" / "step-6" / "shard-00002-model-00001-of-00001.safetensors"
    flip(path, -1)
    return [{"snapshot": 6, "kind": last_tensor(path).split("/")[0]}]


def damage_meta(log: Path) -> list[dict[str, Any]]:
    path = log / "snapshots" / "step-3" / "meta.json"
    flip(path, path.read_bytes().index(b'"step": ') + 8)
    return [{"snapshot": 3}]


def damage_row(log: Path) -> list[dict[str, Any]]:
    flip_in_table(log, "SELECT checksum FROM steps WHERE step = 3")
    return [{"step": 3, "file": "steps.sqlite"}]


def damage_named_digest(log: Path) -> list[dict[str, Any]]:
    flip_in_table(log, "SELECT json_extract(tensors, '$.update[1]') FROM steps WHERE step = 1")
    return [{"step": 1}]


def damage_sample(log: Path) -> list[dict[str, Any]]:
    flip_in_table(log, "SELECT tokens FROM samples WHERE id = 102")
    return [{"sample": 102}]


def damage_manifest(log: Path) -> list[dict[str, Any]]:
    path = log / "manifest.json"
    flip(path, path.read_bytes().index(b"weight_decay") + 15)
    return [{"file": "manifest.json"}]


def lie(log: Path) -> list[dict[str, Any]]:
    """An update that was changed along with all its digests: only the way from θ to θ shows it."""
    from lmc_dist.trajectory.files import publish_files, stage_shard_file

    opened = TrajectoryLog(log)
    path = step_file(log, "update")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    tensors["model.norm.weight"][0] += 1
    layout = type(opened.layout)(opened.layout.params, 1, 2)
    staged = stage_shard_file(path.parent, layout, tensors, {k: header[k] for k in ("step", "kind")}, "update")
    publish_files([staged])
    digests = {kind: list(by_rank) for kind, by_rank in opened.kinds(5).items()}
    digests["update"][1] = staged.digest
    table = StepTable(log)
    table.set_tensors({5: digests})
    table.close()
    return [{"step": 5, "kind": "update"}]


DAMAGE: dict[str, tuple[str, Callable[[Path], list[dict[str, Any]]]]] = {
    "update": ("update", damage_tensor("update")),
    "compressed gradient": ("gradient", damage_tensor("gradient")),
    "theta": ("full", damage_tensor("theta")),
    "header": ("update", damage_header),
    "missing": ("update", damage_missing),
    "snapshot": ("update", damage_snapshot),
    "meta": ("update", damage_meta),
    "row": ("update", damage_row),
    "digest": ("update", damage_named_digest),
    "sample": ("update", damage_sample),
    "manifest": ("update", damage_manifest),
    "lie": ("update", lie),
}


def names(found: Verification, place: dict[str, Any]) -> bool:
    return any(place.items() <= problem.to_json().items() for problem in found.problems)


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_verify_names_the_place_of_any_damage(copy: Callable[[str], Path], kind: str) -> None:
    name, damage = DAMAGE[kind]
    path = copy(name)
    places = damage(path)
    found = verify(path)
    assert len(found.problems) == len(places), found.problems
    assert all(names(found, place) for place in places), found.problems


def verify_job(paths: list[Path]) -> list[tuple[list[str], dict[str, int]]]:
    found = [verify(path) for path in paths]
    return [([f"{p.place}: {p.message}" for p in f.problems], f.counts) for f in found]


def test_verify_shares_the_work_and_finds_everything(ranks: Any, logs: dict[str, Config], copy: Any) -> None:
    """Whole logs of every tier are whole; many damages at once are all listed, the same on any number of ranks."""
    damaged = copy("update")
    places = [place for kind in ("update", "missing", "snapshot", "sample") for place in DAMAGE[kind][1](damaged)]
    paths = [Path(config.log_dir) for config in logs.values()]
    alone = verify_job([*paths, damaged])
    for problems, counts in alone[:-1]:
        assert problems == [] and counts["rows"] == 8 and counts["snapshots"] == 4
    assert [counts["steps followed"] for _, counts in alone[1:-1]] == [8, 8, 8]
    assert len(alone[-1][0]) == len(places)
    for world_size in (2, 3):
        for found in ranks(world_size).run(verify_job, [*paths, damaged]):
            assert found == alone


def test_verify_command_says_1_for_damage_and_2_for_bad_input(copy: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy("update")
    damage_row(path)
    done = lmc("log", "verify", str(path), "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1 and "damaged: step 3" in done.stdout and "1 problem in" in done.stdout
    (problem,) = json.loads((tmp_path / "found.json").read_text())["problems"]
    assert problem["step"] == 3
    done = lmc("log", "verify", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.startswith("error: no trajectory log")


def lmc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "lmc"), *arguments], capture_output=True, text=True, check=False, timeout=120)


# --- reshard -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_logs(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three steps on 2 ranks, snapshots 0, 2, 3."""
    paths = {}
    for name, settings in {"update": {}, "full": {"storage": "full"}, "zstd": {"compression": "zstd"}}.items():
        config = small_config(tmp_path_factory.mktemp(f"short-{name}"), max_steps=3, optimizer="adamw")
        ranks(2).run(train_job, replace(config, log=LogConfig(**({"save_interval": 2} | settings))))
        paths[name] = Path(config.log_dir)
    return paths


def bits(path: Path) -> dict[str, torch.Tensor]:
    """All vectors of a log as they are stored, whole, by place."""
    log = TrajectoryLog(path)
    found = {}
    for step in range(log.num_steps):
        for kind, digests in log.kinds(step).items():
            rule: Any = log.manifest.segment(step).partition
            reader = ShardReader(path / "steps" / f"step-{step:08d}", log.layout, rule, "test", kind, None, digests)
            vector = reader.read(reader.dtype(next(iter(log.layout.slots))))
            found[f"{step} {kind}"] = vector.flat
            if kind == "update":
                fixed = vector.clone()
                apply_fixes(fixed, reader.fixes())
                found[f"{step} {kind} fixed"] = fixed.flat
        if log.manifest.storage != "replay" and step >= log.first_step:
            found[f"theta {step}"] = log.followed(step).flat
    for step in log.snapshots:
        for kind, vector in log.snapshot(step)[0].items():
            found[f"snapshot {step} {kind}"] = vector.flat
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


def reshard_job(jobs: list[tuple[Path, Path, int, Any]]) -> list[str]:
    return [reshard(*job).fingerprint for job in jobs]


def test_reshard_keeps_every_bit(ranks: Any, short_logs: dict[str, Path], tmp_path: Path) -> None:
    """From 1 … 4 ranks' files to 1 … 4 ranks', both rules, written by 1 … 4 ranks; then the tiers and compression."""
    source = short_logs["update"]
    expected, fingerprint = bits(source), TrajectoryLog(source).fingerprint
    jobs: dict[int, list[Any]] = {}
    first = [(source, tmp_path / f"from-{n}", n, rule) for n, rule in ((1, "fsdp2"), (3, None), (4, "fsdp2"))]
    assert ranks(2).run(reshard_job, first) == [[fingerprint] * 3] * 2
    for i, (n, start) in enumerate([(2, source), *((n, path) for _, path, n, _ in first)]):
        for target in range(1, 5):  # each target by both rules, from sources of both
            rule = ("zero3", "fsdp2")[(i + target) % 2]
            output = tmp_path / f"{n}-to-{target}-{rule}"
            jobs.setdefault(1 + (i + target) % 4, []).append((start, output, target, rule))
    for writers, some in jobs.items():
        assert ranks(writers).run(reshard_job, some) == [[fingerprint] * len(some)] * writers
        for _, output, target, rule in some:
            assert same(bits(output), expected), output.name
            log = TrajectoryLog(output)
            assert log.manifest.world_size == 2 and log.manifest.segment(0).partition == rule
            assert {len(digests) for digests in log.kinds(0).values()} == {target}
    assert all(verify(output).problems == [] for some in jobs.values() for _, output, _, _ in some)
    for name in ("full", "zstd"):
        (found,) = ranks(1).run(reshard_job, [(short_logs[name], tmp_path / name, 3, "fsdp2")])[0]
        assert found == TrajectoryLog(short_logs[name]).fingerprint
        assert same(bits(tmp_path / name), bits(short_logs[name])) and verify(tmp_path / name).problems == []


def test_reshard_of_a_run_that_was_resumed_on_other_ranks(
    ranks: Any, logs: dict[str, Config], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its first steps are in files of 2 ranks, the later ones of 3; resharded and verified it is in files of 1."""
    path = copy("update")
    for step in (6, 8):
        shutil.rmtree(path / "snapshots" / f"step-{step}")
    ranks(3).run(train_job, replace(logs["update"], log_dir=str(path), resume=True))
    log = TrajectoryLog(path)
    assert [len(log.kinds(step)["update"]) for step in range(8)] == [2] * 3 + [3] * 5
    resharded = reshard(path, tmp_path / "one", 1, "fsdp2")
    assert same(bits(path), bits(tmp_path / "one")) and resharded.fingerprint == log.fingerprint
    assert verify(path).problems == verify(tmp_path / "one").problems == []
    assert "resumed     at step 3 with deepspeed-zero3 on 3 ranks" in inspect_log(Config(log_dir=str(path)))


def read_snapshot_job(path: Path) -> list[str]:
    """Checksums that torch.distributed.checkpoint's own reader finds in the snapshots."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    from lmc_dist.shards.vector import ShardedVector
    from lmc_dist.trajectory.snapshots import snapshot_state, vector_checksums

    log, found = TrajectoryLog(path), []
    for step in log.snapshots:
        folder = path / "snapshots" / f"step-{step}"
        vectors = {kind: ShardedVector.zeros(log.layout) for kind in log.snapshot(step)[0]}
        dcp.load(snapshot_state(vectors), storage_reader=HuggingFaceStorageReader(str(folder)))
        found.append(json.dumps(vector_checksums(vectors)))
    return found


def test_torch_reads_resharded_snapshots(ranks: Any, short_logs: dict[str, Path], tmp_path: Path) -> None:
    reshard(short_logs["update"], tmp_path / "log", 3)
    expected = ranks(2).run(read_snapshot_job, short_logs["update"])
    assert ranks(2).run(read_snapshot_job, tmp_path / "log") == expected


def test_reshard_refuses_what_cannot_be(short_logs: dict[str, Path], tmp_path: Path) -> None:
    from lmc_dist.log_commands.reshard import reshard_log

    path = Path(shutil.copytree(short_logs["update"], tmp_path / "log"))
    runtime = this_runtime_alone()
    for message, settings in {
        "say where to": ReshardConfig(),
        "must be between 1": ReshardConfig(str(tmp_path / "out"), 0),
        "in its own place": ReshardConfig(str(path), 2),
        "is not empty": ReshardConfig(str(tmp_path), 2),
    }.items():
        with pytest.raises(LmcError, match=message):
            reshard_log(Config(log_dir=str(path), reshard=settings), runtime)
    lock = LogLock(path)
    with pytest.raises(LmcError, match="is being written by process"):
        reshard(path, tmp_path / "out", 2)
    lock.release()
    flip(next((path / "snapshots").glob("step-2/*.safetensors")), -1)
    with pytest.raises(LmcError, match="of snapshot 2 does not have its checksum"):
        reshard(path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def this_runtime_alone() -> Any:
    from lmc_dist.runtime import Runtime

    return Runtime(0, 1, torch.device("cpu"))


# --- prune -------------------------------------------------------------------------------------------------------------


def test_prune_before_a_step(copy: Callable[[str], Path]) -> None:
    path = copy("update")
    size = folder_bytes(path)
    fingerprint = TrajectoryLog(path).fingerprint
    plan = dry_run(path, before=5)
    assert folder_bytes(path) == size and plan.first_kept == 3 and plan.snapshots == [0]
    assert prune(path, before=5) == plan
    assert size - folder_bytes(path) == sum(plan.freed.values())
    log = TrajectoryLog(path)
    assert (log.first_step, log.fingerprint, log.snapshots) == (3, fingerprint, [3, 6, 8])
    log.require(3)
    with pytest.raises(LmcError, match="steps 3 to 7 remain"):
        log.require(2)
    assert verify(path).problems == []
    from lmc_dist.log_commands.prune import prune_log

    text = prune_log(Config(log_dir=str(path), prune=PruneConfig(before=8, dry_run=True)))
    assert text.startswith("would free") and "steps 3–7 can no longer be forgotten, nor 24 samples" in text


@pytest.mark.parametrize(
    "name, tier", [("update", "replay"), ("gradient", "update"), ("full", "update"), ("full", "replay")]
)
def test_prune_to_a_tier(copy: Callable[[str], Path], name: str, tier: Any) -> None:
    path = copy(name)
    before, expected = TrajectoryLog(path), bits(path) if name == "full" else {}
    prune(path, to_tier=tier)
    log = TrajectoryLog(path)
    assert log.manifest.storage == tier and log.fingerprint == before.fingerprint
    assert all(set(log.kinds(step)) == set(TIERS[tier]) for step in range(8))
    assert {p.name.split(".")[0] for p in path.glob("steps/*/*")} == set(TIERS[tier])
    assert verify(path).problems == []
    if (name, tier) == ("full", "update"):
        for step in range(8):
            assert torch.equal(log.followed(step).flat, expected[f"theta {step}"])
            assert torch.equal(log.update(step).flat, before_update(expected, step)), step
    with pytest.raises(LmcError, match=r"does not hold what that tier keeps|say what to prune"):
        prune(path, to_tier="update" if tier == "replay" else None)


def before_update(expected: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    return expected[f"{step} theta"] - expected[f"theta {step}"]


def test_prune_snapshots_and_batch_data(copy: Callable[[str], Path]) -> None:
    path = copy("update")
    fingerprint = TrajectoryLog(path).fingerprint
    plan = prune(path, snapshots_every=4, batch_data=True)
    assert plan.snapshots == [3, 6] and plan.samples == 24
    log = TrajectoryLog(path)
    assert log.snapshots == [0, 8] and log.fingerprint == fingerprint and not log.manifest.save_batch_data
    assert verify(path).problems == []
    with closing(sqlite3.connect(path / "steps.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM samples").fetchone() == (0,)
    for message, settings in {
        "say what to prune": {},
        "the log holds steps 0 to 7": {"before": 9},
        "at least 1": {"snapshots_every": 0},
    }.items():
        with pytest.raises(LmcError, match=message):
            prune(path, **settings)  # type: ignore[arg-type]
    lock = LogLock(path)
    for act in (prune, dry_run):
        with pytest.raises(LmcError, match="is being written by process"):
            act(path, before=3)
    lock.release()


def test_a_ring_with_its_first_snapshot_stays_open_to_corrections(copy: Callable[[str], Path]) -> None:
    path = copy("update")
    table = StepTable(path)
    drop_before(path, table, 3, keeps_first=True)  # as `log.keep_first` leaves it
    table.close()
    for snapshots in ([0, 3, 6, 8], [0, 3, 8]):
        log = TrajectoryLog(path)
        assert log.snapshots == snapshots
        log.require(3)  # or there is no correction
        text = inspect_log(Config(log_dir=str(path)))
        assert "forget      steps 3–7 by correction or replay\nforget      steps 0–2 by replay\n" in text
        assert "no correction" not in text and verify(path).problems == []
        if snapshots[2] == 6:
            assert prune(path, snapshots_every=100).snapshots == [6]


class Cut(Exception):
    """The process died here."""


def cut_after(monkeypatch: pytest.MonkeyPatch, changes: int) -> Iterator[None]:
    """Lets that many changes to the disk through, then fails."""
    left = [changes]

    def counted(change: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            return change(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "rename"),
            (Path, "replace"),
            (Path, "rmdir"),
            (shutil, "rmtree"),
            (pruning, "write_manifest"),
            (StepTable, "set_tensors"),
            (StepTable, "drop_samples"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


@pytest.mark.parametrize(
    "name, settings", [("full", {"before": 2, "to_tier": "update"}), ("update", {"to_tier": "replay"})]
)
def test_prune_can_be_cut_off_anywhere(
    monkeypatch: pytest.MonkeyPatch, short_logs: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    whole = Path(shutil.copytree(short_logs[name], tmp_path / "whole"))
    prune(whole, **settings)
    expected = bits(whole)
    for changes in range(100):
        path = Path(shutil.copytree(short_logs[name], tmp_path / str(changes)))
        try:
            for _ in cut_after(monkeypatch, changes):
                prune(path, **settings)
        except Cut:
            assert verify(path).problems == [], changes
            prune(path, **settings)
        else:
            break
        assert verify(path).problems == [] and same(bits(path), expected), changes
        left = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
        assert sorted(left) == sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()), changes
    assert changes > 5


# --- doctor ------------------------------------------------------------------------------------------------------------


def diagnose(config: Config, **forget: str) -> tuple[dict[str, tuple[str, str]], Any]:
    from lmc_dist.log_commands.doctor import diagnose

    checks, request = diagnose(replace(config, forget=ForgetConfig(**forget)), this_runtime_alone())
    return {check.name: (check.status, check.found) for check in checks}, request


def test_doctor_finds_a_good_log_well(logs: dict[str, Config]) -> None:
    from lmc_dist.log_commands.doctor import examine

    checks, request = diagnose(logs["update"], split="person-1")
    assert {status for status, _ in checks.values()} == {"ok"}, checks
    assert len(checks) == 13
    ways = {way.name: way for way in request.ways}
    assert ways["correction"].possible and ways["replay"].possible and request.touched[0] == 0
    assert (ways["correction"].steps, ways["replay"].steps, ways["replay"].snapshot) == (7, 8, 0)
    text, status = examine(replace(logs["update"], forget=ForgetConfig(batches="7")), this_runtime_alone())
    assert status == 0 and "touches steps 7" in text and "from snapshot 6, 1 steps run again" in text


def test_doctor_says_what_is_wrong_and_what_to_do(logs: dict[str, Config], copy: Callable[[str], Path]) -> None:
    from lmc_dist.log_commands.doctor import examine

    update = replace(logs["update"], doctor=DoctorConfig(read_tensors=False))
    changed = replace(update, model=replace(update.model, vocab_size=280))
    checks, _ = diagnose(changed)
    assert checks["dataset"][0] == checks["denominators"][0] == checks["batches"][0] == checks["model"][0] == "failed"
    assert "vocab_size is 280, the log's 300" in checks["model"][1]
    assert "fingerprint" in checks["dataset"][1] and "was divided by" in checks["denominators"][1]
    text, status = examine(changed, this_runtime_alone())
    assert status == 1 and "what to do" in text
    fewer, _ = diagnose(replace(update, data=replace(update.data, rows="0:12")))
    assert (
        fewer["sample ids"][0] == "failed" and "12 samples of the log are not in the dataset" in fewer["sample ids"][1]
    )
    # pruned: what is gone is named, the rest can still be done
    path = copy("update")
    prune(path, before=5)
    pruned = replace(logs["update"], log_dir=str(path))
    checks, request = diagnose(pruned, batches="1")
    assert {status for status, _ in checks.values()} == {"ok"}
    assert not request.possible and all("steps 3 to 7 remain" in way.detail for way in request.ways)
    assert examine(replace(pruned, forget=ForgetConfig(batches="1")), this_runtime_alone())[1] == 1
    prune(path, to_tier="replay")
    checks, request = diagnose(pruned, batches="5")
    assert checks["correction"][0] == "warning"
    assert {way.name: way.possible for way in request.ways} == {"correction": False, "replay": True}
    damage_row(path)
    checks, _ = diagnose(pruned)
    assert checks["contents"][0] == checks["log"][0] == "failed"


def test_a_model_that_is_not_the_logged_one_is_told_by_what_differs(logs: dict[str, Config]) -> None:
    from lmc_dist.logged_run import logged_skeleton, other_model
    from lmc_dist.training import build_config, build_tokenizer

    config = logs["update"]
    log = TrajectoryLog(config.log_dir)
    model_config = build_config(config.model, build_tokenizer(config))
    skeleton = logged_skeleton(config, model_config, log, "cpu")
    assert other_model(log.manifest, skeleton) is None
    fewer = replace(config, model=replace(config.model, trainable="norm"))
    found, _ = other_model(log.manifest, logged_skeleton(fewer, model_config, log, "cpu")) or ("", "")
    assert "is trained in the log alone (model.trainable)" in found
    row = {"name": "base_model.model.q_proj.lora_A.default.weight", "shape": [2, 4], "tied_to": []}
    adapters = replace(log.manifest, model_fingerprint="x", parameters=[row])
    found, advice = other_model(adapters, skeleton) or ("", "")
    assert "the log is of adapters" in found and "lora_A" in found and "run_lmcleaner_sample_unlearning" in advice


def doctor_job(config: Config) -> str:
    from lmc_dist.log_commands.doctor import examine

    return str(examine(config, this_runtime()))


def test_doctor_says_the_same_on_all_ranks(ranks: Any, logs: dict[str, Config]) -> None:
    found = ranks(2).run(doctor_job, replace(logs["full"], forget=ForgetConfig(samples="3,101")))
    assert found[0] == found[1] and "failed" not in found[0]


# --- the command line --------------------------------------------------------------------------------------------------


def test_help_of_every_command_is_quick_and_shows_examples() -> None:
    from lmc_dist.cli import COMMANDS

    for name in ("log", *COMMANDS):
        times = []
        while not times or (min(times) > 1 and len(times) < 5):
            started = time.perf_counter()
            done = lmc(*name.split(), "--help")
            times.append(time.perf_counter() - started)
        assert min(times) < 1.0, (name, times)
        assert done.returncode == 0 and ("examples:" in done.stdout or name == "log")
    assert all(name in lmc("--help").stdout for name in COMMANDS)


def test_a_log_is_named_by_place_or_by_option(logs: dict[str, Config], tmp_path: Path) -> None:
    from lmc_dist.cli import parse

    assert parse("log inspect", ["runs/x"]).log_dir == parse("log inspect", ["--log_dir", "runs/x"]).log_dir == "runs/x"
    config = parse("log reshard", ["runs/x", "runs/y", "--reshard.ranks", "3"])
    assert (config.log_dir, config.reshard.output, config.reshard.ranks) == ("runs/x", "runs/y", 3)
    started = time.perf_counter()
    done = lmc("log", "inspect", logs["full"].log_dir)
    seconds = time.perf_counter() - started
    assert (
        done.returncode == 0 and "tier        full" in done.stdout and seconds < 15
    )  # a loaded machine; alone under 3
