"""Deletion while training runs: what the engine ends with against retrains, to the bit where the method is exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from forks import Forks
from test_engine_logs import engine_config
from test_zero3 import build_for_replay, forget_config, this_runtime, train_job

from lmc_dist.audit.chain import AuditChain
from lmc_dist.audit.keys import keygen
from lmc_dist.config import Config, LogConfig, OnlineConfig
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import relative_error
from lmc_dist.online.asked import Relearning
from lmc_dist.online.ledger import CHAIN_FILE, Ledger
from lmc_dist.online.service import OnlineUnlearning
from lmc_dist.online.verify import verify_books
from lmc_dist.shards.checksum import checksum
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import ledger_folder
from lmc_dist.trajectory.lock import require_free
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

# Step boundary → what is asked for there.
Asked = Mapping[int, Sequence[Mapping[str, Any]]]
ADAM = {"optimizer": "adamw", "learning_rate": 0.005, "max_grad_norm": 1.0}


def online_config(folder: Path, engine: str, online: Mapping[str, Any], **more: Any) -> Config:
    """24 samples in batches of 7, 7, 7 and 3, four epochs."""
    tier = more.pop("tier", "update")
    config = engine_config(folder, engine, tier, **({"epochs": 4, "learning_rate": 0.05} | more))
    return replace(config, online=OnlineConfig(enabled=True, **{"replay_head": 0, **online}))


def train_with_requests(config: Config, asked: Asked) -> dict[str, Any]:
    """Trains while rank 0 files requests at step boundaries; what it ends with."""
    from lmc_dist.training import Trainer

    trainer = Trainer(config, this_runtime())

    def file(step: int) -> None:
        if dist.get_rank() == 0:
            for request in asked.get(step, ()):
                Ledger(ledger_folder(config.log_dir)).submit(**request)

    trainer.logger.boundaries.append(file)
    summary = trainer.run()
    end = checksum(trainer.shards.read())
    trainer.engine.destroy()
    ledger = Ledger(ledger_folder(config.log_dir)) if dist.get_rank() == 0 else None
    requests = [] if ledger is None else [(r.status, r.step, dict(r.result)) for r in ledger.requests()[0]]
    return {"checksum": end, "summary": summary, "requests": requests}


def distances(config: Config, forgotten: Counterfactual, retrained: Config | None) -> dict[str, Any]:
    """How far the run's end is from runs without the data: a replay of its own log, and a retrain from scratch."""
    from lmc_dist.training import build_dataset

    log = TrajectoryLog(config.log_dir)
    theta = log.theta(log.num_steps)
    engine = replay_engine(build_for_replay(config), log)
    found = replay(engine, log, DatasetBatches(build_dataset(config)[0]), forgotten)
    engine.destroy()
    result = {"replay": checksum(found.theta), "end": checksum(theta), "edits": sorted(log.edits)}
    result["ids"] = [sorted(log.record(s).sample_ids) for s in range(log.num_steps)]
    if retrained is not None:
        other = TrajectoryLog(retrained.log_dir)
        reference = other.theta(other.num_steps)
        result["retrain"] = checksum(reference)
        nothing = TrajectoryLog(str(Path(config.log_dir).with_name("nothing")))
        result["rel_error"] = relative_error(theta, nothing.theta(nothing.num_steps), reference)
    return result


SAMPLES = {3: [{"sample_ids": [3, 101]}], 6: [{"sample_ids": [204]}], 9: [{"sample_ids": [5]}]}
IDS = frozenset({3, 101, 204, 5})


def run_all(config: Config, asked: Asked, forgotten: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(training with requests, distances), with a retrain and a run that nothing is asked of."""
    folder = Path(config.log_dir).parent
    plain = replace(config, online=OnlineConfig())
    train_job(replace(plain, log_dir=str(folder / "nothing")))
    request = Counterfactual("renormalize", frozenset(forgotten))
    retrain = forget_config(plain, request, folder / "retrain")
    train_job(retrain)
    trained = train_with_requests(config, asked)
    return trained, distances(config, request, retrain)


@pytest.mark.parametrize(
    ("engine", "world_size", "more"), [("zero3", 2, {}), ("fsdp2", 2, {}), ("fsdp2", 4, {"replicas": 2})]
)
def test_replay_online_is_retraining(
    ranks: Callable[[int], Any], tmp_path: Path, engine: str, world_size: int, more: dict[str, Any]
) -> None:
    config = online_config(tmp_path, engine, {"replay_head": "all"}, **ADAM, **more)
    trained, found = ranks(world_size).run(run_all, config, SAMPLES, sorted(IDS))[0]
    assert [status for status, _, _ in trained["requests"]] == ["applied"] * 3
    assert found["edits"] == [3, 6, 9]
    assert found["end"] == found["replay"] == found["retrain"] == trained["checksum"]
    assert all(result["exact"] for _, _, result in trained["requests"])
    for step, ids in enumerate(found["ids"]):
        gone = {i for since, asked in SAMPLES.items() if step >= since for i in asked[0]["sample_ids"]}
        assert gone.isdisjoint(ids)


def correct_at_the_end(config: Config, forgotten: Sequence[int], mode: str) -> float:
    """rel_error of one request at the end of the run that nothing was asked of."""
    from lmc_dist.curvature import HVPConfig
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.unlearn.correction import compute_correction

    nothing = replace(config, online=OnlineConfig(), log_dir=str(Path(config.log_dir).with_name("nothing")))
    run = open_logged_run(nothing, this_runtime())
    theta = run.log.theta(run.log.num_steps)
    request = Counterfactual("renormalize", frozenset(forgotten))
    found = compute_correction(run.log, run.module, run.batches, request, HVPConfig(mode))
    reference = TrajectoryLog(str(Path(config.log_dir).with_name("retrain")))
    return relative_error(theta + found.v, theta, reference.theta(reference.num_steps))


@pytest.mark.parametrize(
    ("engine", "mode", "train"),
    [
        ("zero3", "GGN", {"max_grad_norm": 1.0}),
        ("fsdp2", "exact", {"learning_rate": 0.02}),
        ("zero1", "secant", {**ADAM, "learning_rate": 0.001}),
    ],
    ids=["zero3, GGN, clipped SGD", "fsdp2, exact, SGD", "zero1, secant, AdamW"],
)
def test_corrections_online_are_as_good_as_one_at_the_end(
    ranks: Callable[[int], Any], tmp_path: Path, engine: str, mode: str, train: dict[str, Any]
) -> None:
    config = online_config(tmp_path, engine, {"hessian_mode": mode}, tier="gradient", **train)
    trained, found = ranks(2).run(run_all, config, SAMPLES, sorted(IDS))[0]
    assert [status for status, _, _ in trained["requests"]] == ["applied"] * 3
    assert found["end"] == trained["checksum"] and found["replay"] == found["retrain"]
    at_the_end = ranks(2).run(correct_at_the_end, config, sorted(IDS), mode)[0]
    print(engine, mode, found["rel_error"], at_the_end)
    assert found["rel_error"] <= at_the_end


# --- order -----------------------------------------------------------------------------------------------------------


def in_order(config: Config, order: Sequence[int]) -> tuple[str, list[str]]:
    """(checksum of the end, what does not agree in the books) where the requests come in another order."""
    requests = [asked[0] for asked in SAMPLES.values()]
    asked = {step: [requests[i]] for step, i in zip(SAMPLES, order, strict=True)}
    trained = train_with_requests(config, asked)
    problems, _ = verify_books(config.log_dir, ledger_folder(config.log_dir))
    assert all(status == "applied" for status, _, _ in trained["requests"])
    return trained["checksum"], problems


def test_all_orders_of_requests_end_alike(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    ends = set()
    for order in permutations(range(3)):
        folder = tmp_path / "".join(map(str, order))
        config = online_config(folder, "ddp", {"replay_head": "all"}, max_steps=11, **ADAM)
        end, problems = ranks(2).run(in_order, config, order)[0]
        ends.add(end)
        assert problems == []
    assert len(ends) == 1  # to the bit


# --- killed ----------------------------------------------------------------------------------------------------------

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "sqlite3.connect")


def online_job(config: Config, asked: Asked, at: int, death: int | None, told: str) -> None:
    """Trains with requests; rank 0 dies at the n-th operation on files of log and ledger from the boundary `at` on."""
    from lmc_dist.training import Trainer

    trainer = Trainer(config, this_runtime())
    seen: list[str] = []
    is_watching = False

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if is_watching and name in WATCHED and str(args[0]).startswith(config.log_dir):
            seen.append(f"{name} {str(args[0]).removeprefix(config.log_dir)}")
            if len(seen) == death:
                os.write(2, f"dies at {seen[-1]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def file(step: int) -> None:
        nonlocal is_watching
        if dist.get_rank() == 0:
            for request in asked.get(step, ()):
                Ledger(ledger_folder(config.log_dir)).submit(**request)
            is_watching = step == at

    trainer.logger.boundaries.append(file)
    if dist.get_rank() == 0:
        sys.addaudithook(hook)
    trainer.run()
    if dist.get_rank() == 0:
        Path(told).write_text(json.dumps({"seen": seen}))


def ended(forks: Forks, config: Config, asked: Asked, at: int, death: int | None = None) -> tuple[list[int], str]:
    told = Path(config.log_dir).parent / "told.json"
    job = (config, asked, at, death, str(told))
    group = forks.start(Path(config.log_dir).parent / "out", 2, online_job, *job)
    return group.wait(50), group.output()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "method", [{"replay_head": "all"}, {"replay_head": 0, "hessian_mode": "exact"}], ids=["replay", "exact"]
)
def test_a_run_killed_between_any_two_writes_ends_alike(forks: Forks, tmp_path: Path, method: dict[str, Any]) -> None:
    config = online_config(tmp_path / "whole", "ddp", method, max_steps=9, learning_rate=0.02)
    config = replace(config, resume=True)
    asked = {3: SAMPLES[3], 6: [*SAMPLES[6], *SAMPLES[9]]}
    statuses, output = ended(forks, config, asked, 6)
    assert statuses == [0, 0], output
    whole = TrajectoryLog(config.log_dir)
    writes = json.loads((tmp_path / "whole" / "told.json").read_text())["seen"]
    assert any("chain.jsonl" in write for write in writes) and any("step-6" in write for write in writes)
    died, again = [], []
    for death in range(1, len(writes) + 1):
        killed = replace(config, log_dir=str(tmp_path / f"killed-{death}" / "log"))
        statuses, output = ended(forks, killed, asked, 6, death)
        if statuses == [0, 0]:
            continue  # the writer's thread did less in this run
        assert statuses[0] == -signal.SIGKILL, output
        died.append(re.search("dies at .*", output)[0])
        statuses, output = ended(forks, killed, asked, 6)
        assert statuses == [0, 0], output
        log = TrajectoryLog(killed.log_dir)
        # a request that was not decided yet is answered at the first boundary of the run that goes on
        again.append(sorted(log.edits) == sorted(whole.edits) == [3, 6])
        if again[-1] or method["replay_head"] == "all":
            assert log.record(8).checksum == whole.record(8).checksum, died[-1]
        problems, _ = verify_books(killed.log_dir, ledger_folder(killed.log_dir))
        assert problems == [], died[-1]
        shutil.rmtree(tmp_path / f"killed-{death}")
    print(*died, sep="\n")
    assert len(died) > 0.8 * len(writes) and sum(again) > 0.6 * len(died)


class Died(BaseException):
    pass


def with_a_hiccup(config: Config) -> tuple[dict[str, Any], str]:
    """A run that dies once a request is decided, at step 4, and whose next process cannot read the ledger there."""
    asked = {4: [{"sample_ids": [3, 101]}]}
    read, trouble = Ledger.requests, [LmcError("disk I/O error")]

    def die(self: OnlineUnlearning, step: int, requests: Any) -> None:
        raise Died

    def requests(self: Ledger, *statuses: Any) -> Any:
        if "pending" in statuses and trouble:
            raise trouble.pop()
        return read(self, *statuses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineUnlearning, "_answer", die)
        with pytest.raises(Died):
            train_with_requests(config, asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "requests", requests)
        found = train_with_requests(config, {})
    return found, retrained(config, [3, 101])


def test_a_ledger_in_trouble_is_looked_at_again(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    config = online_config(tmp_path, "ddp", {"replay_head": "all", "poll_every": 4}, max_steps=7)
    config = replace(config, resume=True)
    trained, retrain = ranks(2).run(with_a_hiccup, config)[0]
    assert [(status, step) for status, step, _ in trained["requests"]] == [("applied", 5)]
    assert sorted(TrajectoryLog(config.log_dir).edits) == [5] and trained["checksum"] == retrain
    assert verify_books(config.log_dir, ledger_folder(config.log_dir)) == ([], [])
    # what was decided and never answered is found
    with sqlite3.connect(ledger_folder(config.log_dir) / "requests.sqlite") as connection:
        connection.execute("UPDATE requests SET status = 'decided', step = 1")
    problems, _ = verify_books(config.log_dir, ledger_folder(config.log_dir))
    assert any("was decided at step 1, and training went on to step 7 without an answer" in p for p in problems)
    assert any("trained on sample 3, which was to be forgotten from step 1 on" in p for p in problems)
    # and no run goes on with an answered request that nobody can read
    with sqlite3.connect(ledger_folder(config.log_dir) / "requests.sqlite") as connection:
        connection.execute("UPDATE requests SET status = 'applied', samples = '[]'")
    with pytest.raises(AssertionError, match="what they forgot is not known any more"):
        ranks(2).run(train_with_requests, config, {})


# --- what the log is afterwards --------------------------------------------------------------------------------------


def edited_log(config: Config) -> dict[str, Any]:
    """Trains with requests, then all that a log is used for."""
    from lmc_dist.curvature import HVPConfig
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.trajectory.prune import plan_prune
    from lmc_dist.trajectory.reshard import reshard
    from lmc_dist.trajectory.verify import verify
    from lmc_dist.unlearn.correction import compute_correction

    train_with_requests(config, SAMPLES)
    log = TrajectoryLog(config.log_dir)
    theta = log.theta(log.num_steps)
    engine = replay_engine(build_for_replay(config), log)
    run = open_logged_run(config, this_runtime())
    found: dict[str, Any] = {"end": checksum(theta), "problems": verify(config.log_dir).problems}
    as_it_was = replay(engine, log, run.batches)
    found |= {"again": checksum(as_it_was.theta), "verified": as_it_was.verified}
    more = Counterfactual("renormalize", frozenset({100, 103}))
    reference = replay(engine, log, run.batches, more).theta  # leaves the others out as well: it passes their edits
    everything = Counterfactual("renormalize", IDS | more.sample_ids)
    found["same"] = checksum(replay(engine, log, run.batches, everything).theta) == checksum(reference)
    engine.destroy()
    for mode in ("none", "exact"):
        correction = compute_correction(run.log, run.module, run.batches, more, HVPConfig(mode))
        found[mode] = relative_error(theta + correction.v, theta, reference)
    with pytest.raises(LmcError, match="corrected at step 9, past which a deviation is carried as a whole"):
        compute_correction(run.log, run.module, run.batches, more, HVPConfig("none"), 3)
    gone = plan_prune(log, snapshots_every=100).snapshots
    found["pruned"] = sorted(set(log.snapshots) - set(gone))
    other = str(Path(config.log_dir).with_name("other"))
    reshard(config.log_dir, other, 3)
    resharded = TrajectoryLog(other)
    found["resharded"] = (
        resharded.edits == log.edits and checksum(resharded.theta(9)) == checksum(log.theta(9)),
        resharded.fingerprint == log.fingerprint,
    )
    return found


@pytest.mark.parametrize("update_dtype", ["float32", "bfloat16"])
def test_an_edited_log_is_a_log(ranks: Callable[[int], Any], tmp_path: Path, update_dtype: str) -> None:
    config = online_config(tmp_path, "fsdp2", {"hessian_mode": "exact"}, learning_rate=0.02)
    config = replace(config, log=LogConfig("update", 4, update_dtype=update_dtype))
    found = ranks(2).run(edited_log, config)[0]
    assert found["problems"] == [] and found["resharded"] == (True, True)
    assert found["again"] == found["end"] and found["verified"] == 16
    assert found["same"]
    assert found["pruned"] == [0, 3, 6, 9, 16]
    assert found["exact"] < 0.01 < 0.05 < found["none"]


def resumed_past_an_edit(config: Config, folder: Path) -> tuple[float, float, int]:
    """(‖difference of a sweep that was stopped behind an edit and gone on with, and of one that was not‖, ‖v‖, open steps)."""
    from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.trajectory.edits import with_open_edits
    from lmc_dist.unlearn.problem import Problem
    from lmc_dist.unlearn.unit_sweeps import correct_units
    from lmc_dist.unlearn.units import joint_unit

    run = open_logged_run(config, this_runtime())
    log = run.log
    asked = Counterfactual("renormalize", frozenset(log.record(0).sample_ids[:1]))
    request, passed = with_open_edits(asked, log.edits, log.records())
    assert list(passed) == [2] and request.batch_ids
    problem = Problem(log, run.module, TokenCrossEntropy(), run.batches, request, HVPConfig("none"))

    def stop(status: Any) -> None:
        if status.step == 5:
            raise LmcError("stopped here")

    whole = correct_units(problem, [joint_unit(request)], folder / "whole")
    with pytest.raises(LmcError, match="stopped here"):
        correct_units(problem, [joint_unit(request)], folder / "again", mark_every=1, progress=stop)
    again = correct_units(problem, [joint_unit(request)], folder / "again", mark_every=1)
    return (whole.v - again.v).norm(), whole.v.norm(), whole.behind


def test_companions_of_removed_batches_are_learned_later(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    config = online_config(tmp_path, "fsdp2", {"replay_head": "all", "relearn_per_step": 3}, max_steps=8, **ADAM)
    trained = ranks(2).run(train_with_requests, config, {2: [{"sample_ids": [3], "unit": "batch"}]})[0]
    log = TrajectoryLog(config.log_dir)
    (edit,) = log.edits.values()
    removed = next(record for record in log.records() if 3 in record.sample_ids)
    assert edit.request == Counterfactual("skip", batch_ids=frozenset({removed.batch_id}))
    assert set(edit.relearn) == set(removed.sample_ids) - {3} and removed.step < 2
    assert [r[0] for r in trained["requests"]] == ["applied"]
    plain = ranks(2).run(distances, config, edit.request, None)[0]
    assert plain["end"] == plain["replay"] == trained["checksum"]
    later = [log.record(step).sample_ids for step in range(2, 8)]
    assert 3 not in {i for ids in later for i in ids}
    for k, ids in enumerate(later[:2]):
        assert set(edit.relearn[3 * k : 3 * k + 3]) <= set(ids)
    # a later correction that goes over this one, cut off behind it
    difference, size, behind = ranks(1).run(resumed_past_an_edit, config, tmp_path)[0]
    assert difference == 0 < size and behind == 0


def twice_and_resumed(config: Config, asked: Asked) -> list[str]:
    """Checksums of the end of a run with requests, and of the same run once more from step 6 on."""
    end = train_with_requests(config, asked)["checksum"]
    for step in TrajectoryLog(config.log_dir).snapshots:
        if step > 6:
            shutil.rmtree(Path(config.log_dir) / f"snapshots/step-{step}")
    return [end, train_with_requests(replace(config, resume=True), {})["checksum"]]


def test_every_companion_is_learned_again_once(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    from lmc_dist.training import Schedule, build_dataset

    config = online_config(tmp_path, "single", {"replay_head": "all", "relearn_per_step": 3}, max_steps=12)
    order = [ids for _, _, ids in Schedule(build_dataset(config)[0].ids, 7, 3, 12, config.train.seed)]
    asked = {1: [{"sample_ids": order[0][:1], "unit": "batch"}], 4: [{"sample_ids": order[0][1:2], "unit": "batch"}]}
    end, again = ranks(1).run(twice_and_resumed, config, asked)[0]
    assert end == again  # what is taken up where follows from the log
    log = TrajectoryLog(config.log_dir)
    first, second = log.edits[1], log.edits[4]
    assert first.relearn == tuple(order[0][1:]) and second.request.batch_ids == {0, 1}
    # batch 1 took up three of the first ones, one of which is forgotten now; batch 0 was made up for
    assert second.relearn == (*order[1], *first.relearn[1:3])
    assert any(i in order[s] for s in range(4, 8) for i in second.relearn[3 * (s - 4) : 3 * (s - 3)])  # and waits
    forgotten, planned, seen = {*order[0][:2]}, Counter(), Counter()
    for ids, record in zip(order, log.records(), strict=True):
        planned.update(i for i in ids if i not in forgotten)
        assert len(set(record.sample_ids)) == len(record.sample_ids)
        seen.update(() if record.batch_id in second.request.batch_ids else record.sample_ids)
    assert seen == planned


def test_companions_wait_while_they_are_in_the_batch() -> None:
    queue = Relearning(3, [1, 2, 3, 4, 5])
    assert queue.take(2, {1}, 2) == []  # before the edit
    assert queue.take(3, {1}, 2) == [2, 3] and queue.take(4, (), 2) == [1, 4]
    other = Relearning(3, [1, 2, 3, 4, 5])
    assert other.take(5, {2}, 2) == [5]  # steps that nobody asked for had samples of their own


def test_what_left_the_ring(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    asked = {10: [{"sample_ids": [3]}, {"batches": [9]}, {"batches": [77]}, {"sample_ids": [9999]}]}
    ends = {}
    for name, more in (("refuse", {}), ("replay", {"keep_first": True})):
        config = online_config(tmp_path / name, "ddp", {"hessian_mode": "exact", "fallback": name}, max_steps=12)
        config = replace(config, log=LogConfig("update", 2, max_steps=4, **more))
        trained = ranks(2).run(train_with_requests, config, asked)[0]
        ends[name] = {result.get("reason", "")[:60]: status for status, _, result in trained["requests"]}
        problems, _ = verify_books(config.log_dir, ledger_folder(config.log_dir))
        assert problems == []
        log = TrajectoryLog(config.log_dir)
        assert all(3 not in record.sample_ids for record in log.records() if record.step >= 10)
        (edit,) = log.edits.values()
        assert edit.method == ("exact" if name == "refuse" else "replay")
    assert sorted(ends["refuse"].values()) == ["applied", "excluded", "refused", "rejected"]
    assert any("fell out of the ring" in reason for reason in ends["refuse"])
    assert sorted(ends["replay"].values()) == ["applied", "excluded", "rejected"]  # two are one correction


def retrained(config: Config, forgotten: Sequence[int]) -> str:
    """Checksum of the end of a run that never saw the samples."""
    request = Counterfactual("renormalize", frozenset(forgotten))
    config = forget_config(replace(config, online=OnlineConfig()), request, Path(config.log_dir).with_name("retrain"))
    train_job(config)
    *_, last = TrajectoryLog(config.log_dir).records()
    return str(last.checksum)


def run_and_retrain(config: Config, asked: Asked, forgotten: Sequence[int]) -> tuple[str, str]:
    """(checksum of the end of a run with requests, of one that never saw the samples)."""
    return train_with_requests(config, asked)["checksum"], retrained(config, forgotten)


def test_a_ring_keeps_the_edits_that_a_replay_comes_past(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    config = online_config(tmp_path, "single", {"replay_head": "all"}, max_steps=13)
    config = replace(config, log=LogConfig("update", 2, max_steps=4, keep_first=True))
    asked = {4: [{"sample_ids": [3, 101]}], 12: [{"sample_ids": [204]}]}
    end, retrain = ranks(1).run(run_and_retrain, config, asked, [3, 101, 204])[0]
    assert end == retrain  # without the samples of both requests
    log = TrajectoryLog(config.log_dir)
    assert sorted(log.edits) == [4, 12] and log.snapshots == [0, 4, 8, 10, 12, 13]
    assert verify_books(config.log_dir, ledger_folder(config.log_dir)) == ([], [])


# --- as people do it -------------------------------------------------------------------------------------------------


def test_a_request_from_another_process_while_training_runs(tmp_path: Path) -> None:
    config = replace(engine_config(tmp_path, "single", "update", epochs=60, learning_rate=0.02), model_dir=None)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    lmc = [sys.executable, "-m", "lmc_dist.cli"]
    command = [*lmc, "train", "--config", str(file), "--online.enabled", "true", "--online.replay_head", "0"]
    command += ["--online.hessian_mode", "exact"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        while not (tmp_path / "log" / "steps" / "step-00000012").exists():
            assert training.poll() is None, training.communicate()[1]
            time.sleep(0.01)
        ledger = Ledger(ledger_folder(config.log_dir))
        ledger.submit([3, 101])
        _, told = training.communicate(timeout=200)
    assert training.returncode == 0, told
    shown = subprocess.run([*lmc, "ledger", "show", config.log_dir], capture_output=True, text=True, check=True).stdout
    assert "2 samples" in shown and "applied" in shown
    checked = subprocess.run([*lmc, "ledger", "verify", config.log_dir], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "agree" in checked.stdout, checked.stdout
    (request,), _ = ledger.requests()
    assert request.step is not None and 12 < request.step < 240 and request.result["latency_seconds"] < 60
    found = subprocess.run([*lmc, "log", "verify", config.log_dir], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    # what does not agree is found
    edit = tmp_path / "log" / "snapshots" / f"step-{request.step}" / "edit.json"
    content = edit.read_bytes()
    edit.unlink()
    checked = subprocess.run([*lmc, "ledger", "verify", config.log_dir], capture_output=True, text=True, check=False)
    assert checked.returncode == 1 and "the log has no such edit" in checked.stdout
    edit.write_bytes(content)
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("DELETE FROM requests")
    checked = subprocess.run([*lmc, "ledger", "verify", config.log_dir], capture_output=True, text=True, check=False)
    assert (
        checked.returncode == 1 and "the ledger does not" in checked.stdout and "which no ledger has" in checked.stdout
    )


def test_a_run_that_was_asked_is_not_resumed_without_looking(tmp_path: Path) -> None:
    from lmc_dist.training import check_targets

    config = engine_config(tmp_path, "single")
    ledger = Ledger(ledger_folder(config.log_dir))
    name = ledger.submit([3])[0].name
    check_targets(replace(config, resume=True))  # nothing has been answered yet
    ledger.decide([name], 4)
    with pytest.raises(LmcError, match=r"resume with --online\.enabled true"):
        check_targets(replace(config, resume=True))
    check_targets(replace(config, resume=True, online=OnlineConfig(enabled=True)))


def refused_starts(config: Config, key: str) -> None:
    """What cannot be answered is refused before anything is made or removed, on every rank."""
    import lmc_dist.training as training

    train_job(replace(config, online=OnlineConfig()))
    dist.barrier()  # rank 0 has let go of the log
    new, further = replace(config, overwrite=True), replace(config, resume=True)
    signed = replace(config.online, signing_key=key)

    def refused(one: Config, told: str) -> None:
        with pytest.raises(LmcError, match=told):
            training.Trainer(one, this_runtime())
        assert TrajectoryLog(config.log_dir).num_steps == 2

    refused(replace(new, online=replace(config.online, poll_every=0)), "poll_every must be at least 1")
    refused(replace(new, online=replace(config.online, signing_key=f"{key}.none")), "none")
    if dist.get_rank() == 0:
        ledger = Ledger(ledger_folder(config.log_dir))
        ledger.decide([ledger.submit([3])[0].name], 1)
        AuditChain(ledger.folder / CHAIN_FILE).append("applied", {})
    refused(new, "1 answered requests of an earlier run, and a new one begins: move it away")
    refused(replace(further, online=signed), "is not signed and cannot go on with a key")

    def fail(*_: Any) -> None:
        raise LmcError("no such thing")

    trainer = training.Trainer(further, this_runtime())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "OnlineUnlearning", fail)
        with pytest.raises(LmcError, match="no such thing"):
            trainer.run()
    if dist.get_rank() == 0:
        require_free(Path(config.log_dir))  # the logger has let go of it
    trainer.engine.destroy()


def test_a_start_that_is_refused_leaves_an_earlier_run_alone(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    keygen(tmp_path / "key")
    ranks(2).run(refused_starts, online_config(tmp_path, "ddp", {}, max_steps=2), str(tmp_path / "key"))


def test_a_new_run_does_not_begin_beside_an_old_ledger(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    config = online_config(tmp_path, "ddp", {}, max_steps=2)
    ledger = Ledger(ledger_folder(config.log_dir))
    ledger.decide([ledger.submit([3])[0].name], 4)
    with pytest.raises(AssertionError, match="answered requests of an earlier run, and a new one begins: move it away"):
        ranks(2).run(train_with_requests, config, {})
    config = replace(config, resume=True)  # of a log that is not there
    with pytest.raises(AssertionError, match="answered requests of an earlier run, and a new one begins: move it away"):
        ranks(2).run(train_with_requests, config, {})
