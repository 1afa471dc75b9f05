"""The log under attack: ranks killed at any moment, disks full, bytes flipped, files gone, logs by somebody else."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Group

from lmc_dist.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig
from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.trajectory.lock import LOCK_FILE, LogLock
from lmc_dist.trajectory.resume import resume
from lmc_dist.trajectory.sealed import write_sealed
from lmc_dist.trajectory.store import TrajectoryLog

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}


def tiny_config(
    folder: Path, engine: str = "ddp", model: dict[str, Any] = LLAMA, steps: int = 14, **log: Any
) -> Config:
    """12 invented samples in batches of 5, 5 and 2; at 2 ranks two passes a step, some of them empty."""
    return Config(
        data=DataConfig(people=3, facts_per_person=4, max_length=64),
        model=ModelConfig(config=model, vocab_size=280, dropout=0.1 if model is GPT2 else None),
        train=TrainConfig(
            epochs=9,
            batch_size=5,
            micro_batch_size=2,
            learning_rate=0.02,
            optimizer="adamw",
            engine=engine,
            max_steps=steps,  # type: ignore[arg-type]
        ),
        log=LogConfig(**({"save_interval": 3} | log)),
        log_dir=str(folder / "log"),
        resume=True,
    )


def train_job(config: Config) -> None:
    import torch.distributed as dist

    from lmc_dist.runtime import Runtime
    from lmc_dist.training import Trainer

    Trainer(config, Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))).run()


def finished(forks: Forks, config: Config, world_size: int = 2) -> TrajectoryLog:
    group = forks.start(Path(config.log_dir).parent / "out", world_size, train_job, config)
    assert group.wait() == [0] * world_size, group.output()
    return TrajectoryLog(config.log_dir)


def records_of(log: TrajectoryLog) -> list[dict[str, Any]]:
    return [asdict(record) for record in log.records()]


# --- killed ----------------------------------------------------------------------------------------------------------


def die_at(log_dir: str, event: int, delay: float, victims: tuple[int, ...], rank: int) -> None:
    """Kills this process `delay` seconds after its n-th operation on the log's files (opening, renaming, removing)."""
    if rank not in victims:
        return
    left = event

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(args[0]).startswith(log_dir):
            left -= 1
            if left == 0:
                place = str(args[0]).removeprefix(log_dir).lstrip("/") or "."
                os.write(2, f"dies at {name} {place} on {threading.current_thread().name}\n".encode())
                if delay:
                    threading.Thread(target=die, daemon=True).start()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_in(place: str, rank: int) -> None:
    """Kills this process when it renames a file of the log whose path holds `place`."""

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name == "os.rename" and place in str(args[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check_what_is_left(config: Config, reference: list[dict[str, Any]]) -> str:
    """Whatever opens is right; returns what the log says of itself."""
    try:
        log = TrajectoryLog(config.log_dir)
    except LmcError as error:
        assert any(
            part in str(error) for part in ("manifest.json is missing", "holds no step", "steps.sqlite is missing")
        ) or ("tables are not those of a log" in str(error)), error
        return "nothing yet"
    assert records_of(log) == reference[: log.num_steps]
    assert log.missing() == {}
    for step in range(log.first_step, log.num_steps + 1):
        if config.log.storage == "replay" and step not in log.snapshots:
            continue
        log.theta(step)  # raises unless it has its checksum
    for step in range(log.first_step, log.num_steps):
        if config.log.storage in ("gradient", "full"):
            log.gradient(step)
    return f"{log.num_steps} steps"


KILLED: list[tuple[str, dict[str, Any]]] = [
    ("fsdp2", {"storage": "update"}),
    ("ddp", {"storage": "gradient", "compression": "zstd", "max_steps": 4}),
    ("deepspeed", {"storage": "full", "model": GPT2}),
    ("fsdp2", {"storage": "update", "update_dtype": "bfloat16", "save_interval": 4}),
    ("ddp", {"storage": "replay", "save_batch_data": True, "model": GPT2}),
]
KILLS = 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(forks: Forks, tmp_path: Path) -> None:
    """30 kills of one rank or of all, at random operations on the log's files and between them."""
    chance, told, done, count = random.Random(7), [], 0, 0
    cases = []
    for i, (engine, settings) in enumerate(KILLED):
        config = tiny_config(tmp_path / f"whole-{i}", engine, **settings)
        whole = finished(forks, config)
        cases.append((config, records_of(whole), whole))
    while done < KILLS:
        config, reference, whole = cases[count % len(cases)]
        count += 1
        config = replace(config, log_dir=str(tmp_path / f"killed-{count}" / "log"))
        for _ in range(6):  # one run that dies several times over
            victim = chance.randrange(2)
            delay = chance.choice([0.0, 0.0, chance.uniform(0, 0.02)])
            before = partial(die_at, config.log_dir, chance.randrange(1, 70), delay, (victim,))
            group = forks.start(tmp_path / f"killed-{count}" / "out", 2, train_job, config, before=before)
            while not group.statuses():
                time.sleep(0.002)
            together = chance.random() < 0.4
            if (
                together and -signal.SIGKILL in group.statuses().values()
            ):  # the others die with it, as under a scheduler
                group.kill(range(2))
            statuses = group.wait(50)  # or they end themselves, and do not wait for ever
            if statuses[victim] != -signal.SIGKILL:
                assert statuses == [0, 0], group.output()
                break
            assert statuses[1 - victim] != 0, group.output()
            done += 1
            where = next(line for line in group.output().splitlines() if "dies at" in line)
            told.append(f"{check_what_is_left(config, reference)}, rank {where}")
        log = finished(forks, config)
        assert records_of(log) == reference
        assert log.fingerprint.split() and log.snapshots == whole.snapshots
        assert [log.kinds(s) for s in range(log.num_steps)] == [whole.kinds(s) for s in range(whole.num_steps)]
        check_what_is_left(config, reference)
        assert sorted(p.name for p in Path(config.log_dir).iterdir()) == [
            "manifest.json",
            "snapshots",
            "steps",
            "steps.sqlite",
        ]
        assert not list(Path(config.log_dir).rglob("*.part"))
        shutil.rmtree(tmp_path / f"killed-{count}")
    print(*told, sep="\n")
    for place in ("snapshots/", "steps/", "lmc log writer", "MainThread"):
        assert any(place in each for each in told), place


def test_one_job_at_a_time(forks: Forks, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=10)
    folder = Path(config.log_dir)
    folder.mkdir()
    lock = LogLock(folder)  # this process is another job
    group = forks.start(tmp_path / "second", 2, train_job, config)
    assert group.wait() == [2, 2]
    named = f"being written by process {os.getpid()} on {socket.gethostname()}"
    assert group.output().count("error: ") == 1 and named in group.output()
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    lock.release()

    holder = {"host": "elsewhere", "pid": 1, "started": "x", "token": "y"}
    write_sealed(folder / LOCK_FILE, holder)
    with pytest.raises(LmcError, match=r"process 1 on elsewhere .last sign of life \d s ago"):
        LogLock(folder)
    (folder / LOCK_FILE).write_bytes((folder / LOCK_FILE).read_bytes().replace(b"elsewhere", b"elsewhare"))
    with pytest.raises(LmcError, match=r"by a job that lock\.json does not name"):
        LogLock(folder)
    os.utime(folder / LOCK_FILE, (time.time() - 100,) * 2)  # its heart has stopped
    assert len(finished(forks, config)._records) == 10
    assert not (folder / LOCK_FILE).exists()


# --- no room ---------------------------------------------------------------------------------------------------------


def fill_at(disk: str, event: str, place: str, rank: int) -> None:
    """Fills the disk before rank 0 does something for the first time (`open`, `os.rename`) to a path with `place`."""
    if rank:
        return
    is_full = False

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal is_full
        if is_full or name != event or place not in str(args[0]):
            return
        is_full = True
        with open(f"{disk}/filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                pass

    sys.addaudithook(hook)


def limit_at(num_bytes: int, rank: int) -> None:
    """No file may grow beyond this."""
    import resource

    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a disk of its own needs a mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def check_stopped(group: Group, causes: tuple[str, ...]) -> None:
    """All ranks ended with status 2 and one line that says why."""
    assert group.wait() == [2, 2], group.output()
    lines = [line for line in group.output().splitlines() if "error: " in line]
    assert len(lines) == 1 and any(cause in lines[0] for cause in causes), group.output()
    assert "Traceback" not in group.output()


FULL: dict[
    str, Any
] = {  # while a step is written, a snapshot, what makes it whole, and (nothing else is written there) the table
    "step": ("os.rename", "steps/step-00000004", {"storage": "update"}),
    "snapshot": ("os.mkdir", "snapshots/step-6.part", {"storage": "update"}),
    "meta": ("open", "snapshots/step-3.part/meta", {"storage": "full"}),
    "table": ("os.rename", "snapshots/step-5.part", {"storage": "replay", "save_interval": 5}),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_stops_training_and_is_survived(forks: Forks, tmp_path: Path, disk: Path, name: str) -> None:
    event, place, log = FULL[name]
    whole = finished(forks, tiny_config(tmp_path, steps=10, **log))
    config = tiny_config(disk, steps=10, **log)
    before = partial(fill_at, str(disk), event, place)
    causes = ("No space left on device", "database or disk is full")  # whichever writer meets it first
    group = forks.start(tmp_path / "full", 2, train_job, config, before=before)
    check_stopped(group, causes)
    left = check_what_is_left(config, records_of(whole))
    if "steps before the failure" not in group.output():
        assert f"steps before {left.split()[0]} are whole" in group.output()
    (disk / "filler").unlink()
    assert records_of(finished(forks, config)) == records_of(whole)


@pytest.mark.parametrize("kilobytes", [4, 60])
def test_a_file_that_may_not_grow_stops_training(forks: Forks, tmp_path: Path, kilobytes: int) -> None:
    """60 KiB: the table's limit is met in the middle; 4 KiB: nothing fits at all."""
    config = tiny_config(tmp_path / "small", "ddp", GPT2, steps=10, storage="replay")
    group = forks.start(tmp_path / "limited", 2, train_job, config, before=partial(limit_at, kilobytes * 1024))
    assert group.wait() == [2, 2], group.output()
    lines = [line for line in group.output().splitlines() if "error: " in line]
    assert len(lines) == 1 and any(c in lines[0] for c in ("disk I/O error", "full", "File too large")), lines
    whole = finished(forks, tiny_config(tmp_path, "ddp", GPT2, steps=10, storage="replay"))
    left = check_what_is_left(config, records_of(whole))
    assert (left == "nothing yet") == (kilobytes == 4), left
    assert records_of(finished(forks, config)) == records_of(whole)


# --- damaged ---------------------------------------------------------------------------------------------------------


def bits(vector: Any) -> bytes:
    return vector.flat.numpy().tobytes()


def everything(folder: Path) -> dict[str, Any]:
    """All that a log tells, to the bit."""
    log = TrajectoryLog(folder)
    found: dict[str, Any] = {"manifest": log.manifest, "records": records_of(log)}
    steps = range(log.num_steps)
    theta = log.theta(0)
    found["theta"], found["update"] = [bits(theta)], []
    for step in steps:
        found["update"].append(bits(log.advance(theta, step)))
        found["theta"].append(bits(theta))
    assert bits(log.theta(log.num_steps)) == found["theta"][-1]
    if log.manifest.storage != "update":
        found["gradient"] = [bits(log.gradient(step)) for step in steps]
    if log.manifest.save_batch_data:
        samples = log.samples()
        found["samples"] = [samples[i] for i in range(len(samples))]
    for step in log.snapshots:
        vectors, scalars = log.snapshot(step)
        found[f"snapshot {step}"] = ({kind: bits(vector) for kind, vector in vectors.items()}, scalars)
    return found


@pytest.fixture(scope="module")
def logs(forks: Forks, tmp_path_factory: Any) -> dict[str, Path]:
    """Small logs of two kinds."""
    root = tmp_path_factory.mktemp("logs")
    settings = {
        "update": {"storage": "update", "save_batch_data": True},
        "full": {"storage": "full", "compression": "zstd"},
    }
    for name, log in settings.items():
        finished(forks, tiny_config(root / name, "fsdp2", steps=5, **log))
    return {name: root / name / "log" for name in settings}


def all_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    kinds = {path.name.split(".")[0] for path in found}
    assert {"manifest", "steps", "meta"} <= kinds and len(found) > 15
    return found


def check_reads(folder: Path, truth: dict[str, Any], what: str) -> bool:
    """A log is what it was, or an error of ours says where it is not; returns whether the latter."""
    try:
        found = everything(folder)
    except LmcError as error:
        assert len(str(error)) < 1500 and "\n" not in str(error), what
        return True
    lost = set(truth) - set(found)  # a snapshot without meta.json is none
    assert all(key.startswith("snapshot") for key in lost), f"{what}: silently short"
    assert found == {key: truth[key] for key in found}, f"{what}: silently wrong"
    return bool(lost)


@pytest.mark.parametrize("name", ["update", "full"])
def test_no_flipped_bit_is_ever_taken_for_data(logs: dict[str, Path], name: str) -> None:
    folder, chance, noticed, flips = logs[name], random.Random(3), 0, 0
    truth = everything(folder)
    for path in all_files(folder):
        content = path.read_bytes()
        for _ in range(60 if path.suffix == ".sqlite" else 5):
            place, bit = chance.randrange(len(content)), chance.randrange(8)
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            noticed += check_reads(folder, truth, f"bit {bit} of byte {place} of {path.relative_to(folder)}")
            flips += 1
        path.write_bytes(content)
    assert everything(folder) == truth
    print(f"{name}: {flips} flips, {noticed} noticed, the others changed nothing")
    assert noticed > 0.6 * flips  # unused pages of the table, padding of headers


def damage(path: Path, how: str, chance: random.Random) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)


@pytest.mark.parametrize("name", ["update", "full"])
def test_a_damaged_log_goes_back_to_what_is_whole_or_says_why_not(
    logs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder, chance = logs[name], random.Random(5)
    truth, manifest = everything(folder), TrajectoryLog(folder).manifest
    layout = ShardLayout.of_table(manifest.parameters)
    outcomes: dict[str, int] = {}
    for number, original in enumerate(all_files(folder)):
        for how in ("gone", "cut", "flipped"):
            copy = tmp_path / f"{number}-{how}"
            shutil.copytree(folder, copy)
            place = original.relative_to(folder)
            damage(copy / place, how, chance)
            check_reads(copy, truth, f"{place} {how}")
            before = sorted(path for path in copy.rglob("*"))
            try:
                resumed = resume(copy, manifest, layout)
            except LmcError as error:
                assert str(copy) in str(error), f"{place} {how}: {error}"
                assert sorted(path for path in copy.rglob("*")) == before  # nothing was removed
                outcome = "refused"
            else:
                assert resumed is not None, f"{place} {how}: the log was thrown away"
                vectors, scalars = truth[f"snapshot {resumed.step}"]
                assert {kind: bits(vector) for kind, vector in resumed.vectors.items()} == vectors
                assert resumed.scalars == scalars
                resumed.lock.release()  # type: ignore[union-attr]
                outcome = f"back to {resumed.step}"
                if resumed.step:
                    assert records_of(TrajectoryLog(copy)) == truth["records"][: resumed.step]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            shutil.rmtree(copy)
    print(name, outcomes)
    assert set(outcomes) == {"refused", "back to 0", "back to 3", "back to 5"}
