"""`lmc log rewrite`: the new log is that of training without the data, to the bit, and nothing forgotten is left in a byte of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import Forks
from test_engine_logs import engine_config
from test_faults import finished, tiny_config
from test_online import online_config, train_with_requests
from test_zero3 import GPT2, LLAMA, build_for_replay, this_runtime, train_job

from lmc_dist import TrainingLogger
from lmc_dist.audit.chain import AuditChain
from lmc_dist.audit.digests import salt_at, write_salt
from lmc_dist.audit.hidden import hidden, is_hidden
from lmc_dist.config import Config, ForgetConfig, LogConfig, OnlineConfig, RewriteConfig
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.inspect import inspect_log
from lmc_dist.online.ledger import CHAIN_FILE, Ledger
from lmc_dist.online.verify import verify_books
from lmc_dist.runtime import Runtime
from lmc_dist.shards.checksum import checksum
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import LogEdit
from lmc_dist.trajectory.files import ledger_folder
from lmc_dist.trajectory.lock import LogLock
from lmc_dist.trajectory.record import MicroRecord, TrajectoryManifest
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.rewrite import Rewritten, remove, rewrite
from lmc_dist.trajectory.rewrite_logger import without_samples
from lmc_dist.trajectory.rewrite_plan import check_companions
from lmc_dist.trajectory.rewritten import salt_file
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.table import TABLE_FILE, decode_tokens, encode_tokens
from lmc_dist.trajectory.verify import verify

SALT = bytes(range(32))
ADAM = {"optimizer": "adamw", "learning_rate": 0.004, "max_grad_norm": 0.05, "weight_decay": 0.1}


def config_of(folder: Path, engine: str, model: Any = LLAMA, **log: Any) -> Config:
    """24 samples in steps of 7, 7, 7 and 3, AdamW with clipping; the tokens are in the log."""
    config = engine_config(folder, engine, model=model, epochs=2, **ADAM)
    return replace(config, log=LogConfig(**({"save_interval": 2, "save_batch_data": True} | log)))


def without(config: Config, request: Counterfactual, name: str) -> Config:
    """The run that never had the data, logged like the other."""
    ids = ",".join(map(str, sorted(request.sample_ids or request.batch_ids)))
    forget = ForgetConfig(
        samples=ids if request.sample_ids else None,
        batches=ids if request.batch_ids else None,
        counterfactual=request.kind,
    )
    return replace(config, forget=forget, log_dir=str(Path(config.log_dir).with_name(name)))


def replayed(config: Config, request: Counterfactual) -> Rewritten:
    """The rewriting of a configuration's log. Collective."""
    from lmc_dist.training import build_dataset

    log = TrajectoryLog(config.log_dir)
    engine = replay_engine(build_for_replay(config), log)
    batches = DatasetBatches(build_dataset(config)[0])
    try:
        return rewrite(engine, config.log_dir, batches, request, SALT)
    finally:
        engine.destroy()


def content(log_dir: str) -> dict[str, Any]:
    """All that two logs of one run have in common: records, digests of all files, snapshots, samples."""
    log = TrajectoryLog(log_dir)
    with closing(sqlite3.connect(log.path / TABLE_FILE)) as connection:
        samples = connection.execute("SELECT id, tokens FROM samples ORDER BY id").fetchall()
    metas = {n: json.loads((log.path / f"snapshots/step-{n}/meta.json").read_text()) for n in log.snapshots}
    return {
        "records": [asdict(record) for record in log.records()],
        "files": [log.kinds(step) for step in range(log.num_steps)],
        "snapshots": metas,
        "samples": [(i, decode_tokens(tokens)) for i, tokens in samples],
        "normalization": log.manifest.loss_normalization,
    }


def ids_in(log_dir: str | Path) -> set[int]:
    """Every sample id that a table of a log or a correction names."""
    with closing(sqlite3.connect(Path(log_dir) / TABLE_FILE)) as connection:
        found = {i for (i,) in connection.execute("SELECT id FROM samples")}
        for (micros,) in connection.execute("SELECT micro_batches FROM steps"):
            found |= {i for micro in json.loads(micros) for i in micro["ids"]}
    for path in Path(log_dir).glob("snapshots/*/edit.json"):
        found |= set(json.loads(path.read_text())["sample_ids"])
    return found


def traces(log_dir: str | Path, dataset: SampleDataset, ids: frozenset[int]) -> list[str]:
    """Files of a log that hold the tokens of a sample, as they are or as the table keeps them."""
    needles = []
    for item in dataset.by_id(sorted(ids)):
        answer = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label >= 0]
        needles += [np.array(answer, dtype).tobytes() for dtype in ("<i4", "<i8")]
        needles.append(encode_tokens(item["input_ids"], item["labels"]))
    files = [path for path in Path(log_dir).rglob("*") if path.is_file()]
    return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]


def check_gone(config: Config, request: Counterfactual, is_of_lmc: bool = True) -> None:
    from lmc_dist.training import build_dataset

    assert request.sample_ids.isdisjoint(ids_in(config.log_dir))
    assert not traces(config.log_dir, build_dataset(config)[0], request.sample_ids)
    manifest = TrajectoryLog(config.log_dir).manifest
    assert manifest.dataset_fingerprint is None
    assert not is_of_lmc or manifest.run["config"]["forget"]["samples"] is None
    entry = manifest.run["rewritten"][-1]
    assert len(entry["request"]["samples"]) == len(request.sample_ids)
    assert all(len(digest) == 32 for digest in entry["request"]["samples"])
    folder = Path(config.log_dir)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "snapshots", "steps", "steps.sqlite"]
    assert {p.name for p in folder.parent.iterdir() if p.name.startswith(f"{folder.name}.")} <= {"log.requests"}


# --- replay ------------------------------------------------------------------------------------------------------------


def seen_at(log: TrajectoryLog, step: int, number: int) -> frozenset[int]:
    """Some samples that were first seen at a step."""
    before = {i for s in range(step) for i in log.record(s).sample_ids}
    return frozenset(sorted(set(log.record(step).sample_ids) - before)[:number])


def equals_training_job(config: Config, kind: str, first: int, again: int) -> dict[str, Any]:
    """Rewrites a log for two requests one after the other; says how far it is what training without them logs."""
    from lmc_dist.training import build_dataset

    train_job(config)
    log = TrajectoryLog(config.log_dir)
    dataset = build_dataset(config)[0]
    if kind == "skip":
        one, other = (Counterfactual("skip", batch_ids=frozenset({s})) for s in (first, again))
    else:
        one, other = (Counterfactual(kind, seen_at(log, s, 2)) for s in (first, again))  # type: ignore[arg-type]
        assert traces(config.log_dir, dataset, one.sample_ids)  # or the search below would prove nothing
    both = replace(one, sample_ids=one.sample_ids | other.sample_ids, batch_ids=one.batch_ids | other.batch_ids)
    train_job(without(config, one, "without-one"))
    train_job(without(config, both, "without-both"))
    found: dict[str, Any] = {}
    dist.barrier()
    for name, request, reference in (("first", one, "without-one"), ("second", other, "without-both")):
        before = TrajectoryLog(config.log_dir).fingerprint
        done = replayed(config, request)
        dist.barrier()
        mine, theirs = content(config.log_dir), content(str(Path(config.log_dir).with_name(reference)))
        problems = verify(config.log_dir).problems
        assert [p.message for p in problems] == []
        check_gone(config, request)
        new = TrajectoryLog(config.log_dir)
        assert (done.before, done.after) == (before, new.fingerprint) and done.exact
        assert new.manifest.run["rewritten"][-1]["from"] == before
        found[name] = {key: mine[key] == theirs[key] for key in mine} | {"plan": done.plan, "verified": done.verified}
        if found[name]["records"] is False:
            pairs = zip(mine["records"], theirs["records"], strict=True)
            found[name]["records"] = next((a, b) for a, b in pairs if a != b)
        dist.barrier()
    is_exact = kind == "renormalize" and config.log.update_dtype == "float32"
    found["corrections"] = corrections_agree(config, sorted(other.sample_ids), dataset) if is_exact else True
    return found


def corrections_agree(config: Config, ids: list[int], dataset: SampleDataset) -> bool:
    """Whether a request on the rewritten log is answered as on the log of the training without the data, to the bit."""
    from lmc_dist import run_lmcleaner_sample_unlearning
    from lmc_dist.training import build_config, build_tokenizer

    third = [i for i in dataset.ids if i not in ids][5:6]
    model = build_config(config.model, build_tokenizer(config))
    folders = (config.log_dir, str(Path(config.log_dir).with_name("without-both")))
    v, w = (run_lmcleaner_sample_unlearning(model, folder, third, dataset=dataset).v for folder in folders)
    return torch.equal(v.flat, w.flat) and v.norm() > 0


REPLAYED: dict[str, tuple[str, Any, str, int, int, dict[str, Any]]] = {
    "fsdp2, update": ("fsdp2", LLAMA, "renormalize", 3, 0, {}),
    "zero3, bfloat16 and zstd": (
        "zero3",
        LLAMA,
        "renormalize",
        2,
        3,
        {"update_dtype": "bfloat16", "compression": "zstd"},
    ),
    "zero3, gradient, dropout, zero": ("zero3", GPT2, "zero", 1, 2, {"storage": "gradient", "compression": "zstd"}),
    "fsdp2, full, batches": ("fsdp2", LLAMA, "skip", 5, 2, {"storage": "full"}),
    "zero3 in bfloat16": ("zero3-bf16", LLAMA, "renormalize", 3, 1, {}),
    "ddp, ring, batches": ("ddp", GPT2, "skip", 6, 7, {"max_steps": 3}),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_log_is_that_of_training_without_the_data(
    ranks: Callable[[int], Any], tmp_path: Path, name: str
) -> None:
    engine, model, kind, first, again, log = REPLAYED[name]
    config = config_of(tmp_path, engine, model, **log)
    for found in ranks(2).run(equals_training_job, config, kind, first, again):
        for part in ("first", "second"):
            same = {key: value for key, value in found[part].items() if key not in ("plan", "verified")}
            assert all(value is True for value in same.values()), (part, same)
        assert found["corrections"]
        assert found["first"]["plan"].first == first


def test_a_hand_written_loop_is_rewritten_too(tmp_path: Path) -> None:
    """One process, a mean over micro-batches; a forgotten sample is a pass of its own, one of a pass, and a whole step."""
    from lmc_dist.data import collate
    from lmc_dist.training import build_dataset

    config = config_of(tmp_path, "single")
    dataset = build_dataset(config)[0]
    a, b, c, d, e = dataset.ids[:5]
    steps = [[[a, b], [c]], [[d], [e, a]], [[c], [c]], [[b, c], [d, e]], [[e, d], [a]]]
    model = build_for_replay(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    logger = TrainingLogger(
        config.log_dir,
        save_interval=2,
        loss_normalization="micro_batch_token_mean",
        max_grad_norm=0.1,
        save_batch_data=True,
    )
    logger.attach(model, optimizer)
    model.train()
    for passes in steps:
        for ids in passes:
            (model(**collate(dataset.by_id(ids), dataset.pad_token_id)).loss / len(passes)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    logger.close()

    def again(request: Counterfactual | None) -> Any:
        log = TrajectoryLog(config.log_dir)
        return replay(replay_engine(build_for_replay(config), log), log, DatasetBatches(dataset), request)

    request = Counterfactual("renormalize", frozenset({c}))
    expected = checksum(again(request).theta)
    with pytest.raises(LmcError, match="use 'renormalize', or --how remove"):
        replayed(config, replace(request, kind="zero"))
    replayed(config, request)
    log = TrajectoryLog(config.log_dir)
    records = list(log.records())
    assert records[-1].checksum == expected and ids_in(config.log_dir) == {a, b, d, e}
    assert [record.applied for record in records] == [True, True, False, True, True]
    assert [(m.sample_ids, m.blanks) for m in records[0].micro_batches] == [((a, b), ()), ((), (0,))]
    found = again(None)  # every step of the new log comes out again
    assert found.exact and found.verified == 5 and checksum(found.theta) == expected
    check_gone(config, request, is_of_lmc=False)
    assert verify(config.log_dir).problems == []


# --- remove ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Config, Counterfactual]:
    """(a run of 2 ranks, the same without some samples, these); they were first seen at step 3."""
    config = config_of(tmp_path_factory.mktemp("trained"), "zero3")
    ranks(2).run(train_job, config)
    request = Counterfactual("renormalize", seen_at(TrajectoryLog(config.log_dir), 3, 2))
    other = without(config, request, "without")
    ranks(2).run(train_job, other)
    return config, other, request


@pytest.fixture
def copy(trained: tuple[Config, Config, Counterfactual], tmp_path: Path) -> Config:
    """The run in a folder of its own, with the request and the way to rewrite its log."""
    config, other, _ = trained
    log_dir = shutil.copytree(config.log_dir, tmp_path / "log")
    return replace(config, log_dir=str(log_dir), forget=other.forget, rewrite=RewriteConfig("remove"))


ALONE = Runtime(0, 1, torch.device("cpu"))


def rewritten(config: Config, **settings: Any) -> str:
    from lmc_dist.log_commands.rewrite import rewrite_log

    return rewrite_log(replace(config, rewrite=replace(config.rewrite, **settings)), ALONE)


def resume_job(config: Config) -> list[str]:
    """Goes on with a run as its log is now; what is said where that must not be."""
    told = []
    for wrong in (ForgetConfig(), replace(config.forget, samples="7")):
        with pytest.raises(LmcError) as caught:
            train_job(replace(config, forget=wrong))
        told.append(str(caught.value))
    train_job(config)
    return told


def test_what_is_removed_can_be_trained_anew(
    ranks: Any, trained: tuple[Config, Config, Counterfactual], copy: Config, tmp_path: Path
) -> None:
    _, reference, request = trained
    before = TrajectoryLog(copy.log_dir)
    text = rewritten(replace(copy, json=str(tmp_path / "found.json")))
    assert "steps 0–2; snapshots 0, 2" in text and "steps 3–7 with all they led to; snapshots 4, 6, 8" in text
    check_gone(copy, request)
    log = TrajectoryLog(copy.log_dir)
    assert log.num_steps == 3 and log.snapshots == [0, 2] and verify(copy.log_dir).problems == []
    assert list(log.records()) == list(before.records())[:3]
    assert log.theta(3).norm() > 0  # followed along the links
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["snapshots_removed"] == [4, 6, 8] and found["steps_removed"] == 5 and found["samples"] == 2
    assert found["fingerprint_before"] == before.fingerprint and found["fingerprint_after"] == log.fingerprint
    assert "there is nothing to do" in rewritten(copy)
    assert f"without 2 samples from step 3 on (remove); it was run {before.fingerprint[:12]}" in inspect_log(copy)
    told = ranks(2).run(resume_job, replace(copy, resume=True))[0]
    assert all("was rewritten without 2 samples" in message for message in told)
    assert content(copy.log_dir) == content(reference.log_dir)  # to the bit what training without the data logs
    check_gone(copy, request)
    assert TrajectoryLog(copy.log_dir).manifest.run["rewritten"] == log.manifest.run["rewritten"]


def command_job(config: Config, reference: Config) -> tuple[str, bool, list[str]]:
    """`lmc log rewrite --how replay` and `lmc unlearn` after it. Collective."""
    from lmc_dist.log_commands.rewrite import rewrite_log
    from lmc_dist.unlearn.run import unlearn

    text = rewrite_log(replace(config, rewrite=RewriteConfig("replay"), progress="none"), this_runtime())
    dist.barrier()
    same = content(config.log_dir) == content(reference.log_dir)
    second = replace(config, forget=ForgetConfig(samples="5"), output_dir=str(Path(config.log_dir).with_name("out")))
    second = replace(second, unlearn=replace(config.unlearn, replay_head="all"), progress="none")
    told = []
    with pytest.raises(LmcError) as caught:
        unlearn(replace(second, reference="retrain"), this_runtime())
    told.append(str(caught.value))
    result = unlearn(replace(second, reference="replay"), this_runtime())
    assert result["rel_error"] == 0
    return text, same, told


def test_the_command_replays_and_the_log_answers_further_requests(
    ranks: Any, trained: tuple[Config, Config, Counterfactual], copy: Config
) -> None:
    text, same, told = ranks(2).run(command_job, copy, trained[1])[0]
    assert (
        same
        and "steps 2–7 without the data, 6 gradients, 1 step before the first change found again to the bit" in text
    )
    assert "use --reference replay" in told[0]
    check_gone(copy, trained[2])


# --- logs that were corrected while training ran -----------------------------------------------------------------------


def edited_job(config: Config) -> dict[str, Any]:
    """Training forgets two requests on the way; then its log is rewritten for a third one. Collective."""
    asked = {3: [{"sample_ids": [3, 101]}], 6: [{"sample_ids": [204]}]}
    trained = train_with_requests(config, asked)
    dist.barrier()
    assert {status for status, _, _ in trained["requests"]} <= {"applied"}
    if dist.get_rank() == 0:
        shutil.copytree(config.log_dir, Path(config.log_dir).with_name("late"))
        shutil.copytree(f"{config.log_dir}.requests", Path(config.log_dir).with_name("late.requests"))
    dist.barrier()
    found: dict[str, Any] = {}
    late = replace(config, log_dir=str(Path(config.log_dir).with_name("late")), online=OnlineConfig())
    for name, each, request in (
        ("all", replace(config, online=OnlineConfig()), Counterfactual("renormalize", frozenset({5}))),
        ("late", late, Counterfactual("skip", batch_ids=frozenset({9}))),
    ):
        done = replayed(each, request)
        dist.barrier()
        log = TrajectoryLog(each.log_dir)
        found[name] = {
            "edits": (sorted(log.edits), list(done.plan.edits)),
            "ids": {i for record in log.records() for i in record.sample_ids},
            "steps": [record.step for record in log.records() if not record.applied],
            "content": content(each.log_dir),
            "problems": [p.message for p in verify(each.log_dir).problems],
            "books": verify_books(each.log_dir, ledger_folder(each.log_dir))[0],
        }
        dist.barrier()
    return found


def test_corrections_made_in_training_go_where_a_replay_passes_them(ranks: Any, tmp_path: Path) -> None:
    config = replace(online_config(tmp_path, "fsdp2", {"replay_head": "all"}, **ADAM), log=LogConfig("update", 2))
    everything = Counterfactual("renormalize", frozenset({3, 101, 204, 5}))
    retrain = replace(without(config, everything, "retrain"), online=OnlineConfig())
    ranks(2).run(train_job, retrain)
    found = ranks(2).run(edited_job, config)[0]
    assert found["all"]["edits"] == ([], [3, 6]) and found["late"]["edits"] == ([3, 6], [])
    assert everything.sample_ids.isdisjoint(found["all"]["ids"]) and found["late"]["steps"] == [9]
    reference = content(retrain.log_dir)
    assert found["all"]["content"] == reference
    for each in found.values():
        assert each["problems"] == [] and each["books"] == []


def idle_step_job(config: Config) -> dict[str, Any]:
    """Step 1 is not applied, and a correction comes after it; then what it held is taken out of the log. Collective."""
    from lmc_dist.training import Schedule, Trainer, build_dataset

    dataset = build_dataset(config)[0]
    steps = [ids for _, _, ids in Schedule(dataset.ids, 7, 2, config.train.max_steps, config.train.seed)]
    only = next(i for i in steps[1] if i not in steps[4] + steps[5])  # in no other step
    again = next(i for i in steps[1] if i in steps[5] and i not in steps[4])  # and in one after the correction
    trainer = Trainer(config, this_runtime())
    take_step = trainer.shards.step

    def step() -> bool:
        if trainer.logger.step != 1:
            return take_step()
        trainer.shards.clear_gradients()  # as a GradScaler leaves out an overflow
        trainer.logger.skip_step()
        return True

    def ask(step: int) -> None:
        if step == 4:
            Ledger(ledger_folder(config.log_dir)).submit(steps[0][:1])

    trainer.shards.step = step  # type: ignore[method-assign]
    trainer.logger.boundaries.append(ask)
    trainer.run()
    found: dict[str, Any] = {}
    for name, sample in (("only", only), ("again", again)):
        log, request = TrajectoryLog(config.log_dir), Counterfactual("renormalize", frozenset({sample}))
        engine = replay_engine(build_for_replay(config), log)
        wanted = replay(engine, log, DatasetBatches(dataset), request)
        before, done = log.theta(log.num_steps), replayed(config, request)
        new = TrajectoryLog(config.log_dir)
        found[name] = {
            "as replay": checksum(new.theta(new.num_steps)) == checksum(wanted.theta),
            "changed": checksum(before) != checksum(wanted.theta),
            "first": (done.plan.touched, done.plan.first, sorted(new.edits)),
            "gone": sample not in ids_in(config.log_dir),
            "applied": [record.applied for record in new.records()],
            "problems": [p.message for p in verify(config.log_dir).problems],
        }
    return found


def test_a_correction_stays_behind_a_step_that_was_not_applied(ranks: Any, tmp_path: Path) -> None:
    """What such a step held is taken out of its record; only applied steps decide which corrections are passed."""
    config = online_config(tmp_path, "single", {"replay_head": "all"}, max_steps=6)
    found = ranks(1).run(idle_step_job, replace(config, log=LogConfig("update", 2)))[0]
    same = {"as replay": True, "gone": True, "applied": [True, False, True, True, True, True], "problems": []}
    assert found["only"] == {**same, "changed": False, "first": ((1,), 6, [4])}
    assert found["again"] == {**same, "changed": True, "first": ((1, 5), 5, [4])}


def removed_past_corrections_job(config: Config) -> dict[str, Any]:
    """Training forgets a sample and a batch; its log is cut off before both, twice, and trained to its end again. Collective."""
    from lmc_dist.training import Schedule, build_dataset

    dataset = build_dataset(config)[0]
    steps = [ids for _, _, ids in Schedule(dataset.ids, 7, 2, config.train.max_steps, config.train.seed)]
    x, a, b = steps[2][0], steps[3][0], steps[0][0]
    train_with_requests(config, {6: [{"sample_ids": [a]}, {"batches": [4]}]})
    log = TrajectoryLog(config.log_dir)
    everything = Counterfactual("renormalize", frozenset({x, a, b}), frozenset({1, 4}))
    wanted = replay(replay_engine(build_for_replay(config), log), log, DatasetBatches(dataset), everything)
    found: dict[str, Any] = {"told": []}
    for request in (Counterfactual("renormalize", frozenset({x})), Counterfactual("skip", batch_ids=frozenset({1}))):
        remove(config.log_dir, request, salt_at(salt_file(config.log_dir)))
    found["books"] = verify_books(config.log_dir, ledger_folder(config.log_dir))[0]
    for forget in (ForgetConfig(), ForgetConfig(samples=str(x)), ForgetConfig(samples=f"{x},{b}", batches="1")):
        with pytest.raises(LmcError) as caught:
            train_job(replace(config, forget=forget, resume=True))
        found["told"].append(str(caught.value))
    again = replace(config, forget=ForgetConfig(samples=str(x), batches="1"), resume=True)
    trained = train_with_requests(again, {6: [{"sample_ids": [b]}]})  # at the step of the corrections that went
    new = TrajectoryLog(config.log_dir)
    return found | {
        "end": trained["checksum"] == checksum(wanted.theta),
        "requests": [request[:2] for request in trained["requests"]],
        "edits": sorted(new.edits),
        "idle": [record.step for record in new.records() if not record.applied],
        "gone": {x, a}.isdisjoint(ids_in(config.log_dir)),
        "books again": verify_books(config.log_dir, ledger_folder(config.log_dir))[0],
        "audit": [record["event"] for record in AuditChain(ledger_folder(config.log_dir) / CHAIN_FILE).records()],
    }


def test_a_log_that_was_cut_off_past_corrections_is_trained_anew(ranks: Any, tmp_path: Path) -> None:
    """Only what the calls were asked for is given again: what the ledger alone knows is found by its digests."""
    config = online_config(tmp_path, "single", {"replay_head": "all"}, max_steps=8)
    found = ranks(1).run(removed_past_corrections_job, replace(config, log=LogConfig("update", 2)))[0]
    assert found["books"] == found["books again"] == []
    assert all("was rewritten without 2 samples or batches" in told for told in found["told"])
    assert found["requests"] == [("applied", 6)] * 3 and found["audit"] == ["applied"] * 3
    assert found["edits"] == [6] and found["idle"] == [1, 4] and found["gone"] and found["end"]


def test_a_hidden_split_is_known_for_one() -> None:
    """Or a run that was resumed with forget.split could not be resumed once more."""
    forget = asdict(ForgetConfig(split="person-1"))
    assert not is_hidden(forget) and is_hidden(hidden(forget, "rewritten", with_split=True))


def test_companions_to_come_keep_a_log_from_being_cut_off() -> None:
    manifest = cast(TrajectoryManifest, SimpleNamespace(run={"config": {"online": {"relearn_per_step": 2}}}))
    edit = LogEdit(6, Counterfactual("skip", batch_ids=frozenset({2})), "replay", relearn=(4, 9))
    check_companions(manifest, [replace(edit, relearn=())])
    with pytest.raises(LmcError, match=r"step 6 took back whole batches, whose 2 other samples .* use --how replay"):
        check_companions(manifest, [edit])


# --- refused, or only told ---------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_be_done_is_said_and_changes_nothing(
    trained: tuple[Config, Config, Counterfactual], copy: Config, tmp_path: Path
) -> None:
    first = sorted(seen_at(TrajectoryLog(copy.log_dir), 0, 1))[0]
    before = state(tmp_path)
    text = rewritten(copy, dry_run=True)
    assert "nothing done" in text and "steps 3–7" in text and "without --dry_run" in text
    for config, message in (
        (replace(copy, rewrite=RewriteConfig()), "say how"),
        (replace(copy, forget=ForgetConfig()), "say what to forget"),
        (replace(copy, forget=ForgetConfig(samples="99999")), "none of the 1 samples"),
        (replace(copy, forget=ForgetConfig(samples=str(first))), "rewrite it with --how replay, or delete the log"),
        (replace(copy, forget=ForgetConfig(batches="77")), "1 batch ids are not in the log"),
        (replace(copy, log_dir=str(tmp_path / "nowhere")), "no trajectory log"),
        (replace(copy, json=str(tmp_path / "no" / "file.json")), "there is no folder"),
    ):
        with pytest.raises(LmcError, match=message):
            rewritten(config)
    lock = LogLock(Path(copy.log_dir))
    for dry in (False, True):
        with pytest.raises(LmcError, match="is being written by process"):
            rewritten(copy, dry_run=dry)
    lock.release()
    (tmp_path / "log" / "notes.txt").touch()
    with pytest.raises(LmcError, match=r"notes.txt, which is none of a log's"):
        rewritten(copy)
    (tmp_path / "log" / "notes.txt").unlink()
    (tmp_path / "log.rewriting").mkdir()
    (tmp_path / "log.rewriting" / "mine.txt").touch()
    with pytest.raises(LmcError, match="no rewriting left it"):
        rewritten(copy)
    shutil.rmtree(tmp_path / "log.rewriting")
    after = state(tmp_path)
    after.pop("log.requests/salt.key")
    assert after == before
    reference = replace(copy, log_dir=str(shutil.copytree(trained[1].log_dir, tmp_path / "reference")))
    with pytest.raises(LmcError, match="trained without 2 of the samples already"):
        remove(reference.log_dir, Counterfactual("renormalize", trained[2].sample_ids | {first}), SALT)


def test_rows_of_samples_that_leave_are_empty() -> None:
    record = MicroRecord(0, 1, (5, 7, 9), 40.0, digest="0" * 16)
    first = without_samples(record, (True, False, True), 16)
    assert (first.sample_ids, first.blanks, first.width, first.digest) == ((5, 9), (1,), 16, None)
    second = without_samples(first, (False, True), 16)
    assert (second.sample_ids, second.blanks) == ((9,), (0, 1))
    assert without_samples(second, (False,), 16).blanks == (0, 1, 2)


# --- cut off -----------------------------------------------------------------------------------------------------------

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "sqlite3.connect",
    "ctypes.call_function",
)


def die_at(prefix: str, event: int, count_to: str | None, rank: int) -> None:
    """Kills this process at its n-th operation on what begins with `prefix`; with `count_to` counts them into a file."""
    if rank:
        return
    left = event

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        is_within = name in ("os.remove", "os.rmdir") and args[-1] != -1  # rmtree goes by descriptors
        if name in EVENTS and args and (is_within or str(args[0]).startswith(prefix)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if count_to is not None and not str(args[0]).startswith(count_to):
                is_swap = name == "os.rename" and str(args[0]) in (prefix, f"{prefix}.rewriting")
                os.write(descriptor, b"|" if is_swap else b".")

    if count_to is not None:
        descriptor = os.open(count_to, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(hook)


def remove_job(config: Config, with_exchange: bool) -> None:
    from lmc_dist.log_commands.rewrite import rewrite_log
    from lmc_dist.trajectory import swap

    if not with_exchange:
        swap.exchange = lambda one, other: False  # as on a file system that cannot
    rewrite_log(config, ALONE)


def check_after_kill(config: Config, old: str, new: str | None) -> str:
    """Under the log's name is one of two whole logs, or, without an exchange, none for a moment; which one."""
    if not Path(config.log_dir).exists():
        return "between"
    log = TrajectoryLog(config.log_dir)
    assert log.fingerprint == old or (new is None and log.manifest.run["rewritten"]) or log.fingerprint == new
    assert verify(config.log_dir).problems == []
    return "old" if log.fingerprint == old else "new"


@pytest.mark.parametrize("with_exchange", [True, False], ids=["exchange", "two renames"])
def test_killed_at_any_write_either_log_is_whole(
    forks: Forks, copy: Config, tmp_path: Path, with_exchange: bool
) -> None:
    """At every opening, renaming and removal of `--how remove` with LMC_EVERY_KILL=1; at about a dozen otherwise."""
    old = TrajectoryLog(copy.log_dir).fingerprint
    rehearsal = replace(copy, log_dir=str(shutil.copytree(copy.log_dir, tmp_path / "rehearsal" / "log")))
    write_salt(tmp_path / "rehearsal" / "log.requests" / "salt.key", SALT)
    before = partial(die_at, rehearsal.log_dir, -1, str(tmp_path / "count"))
    group = forks.start(tmp_path / "out", 1, remove_job, rehearsal, with_exchange, before=before)
    assert group.wait() == [0], group.output()
    marks, new = (tmp_path / "count").read_text(), TrajectoryLog(rehearsal.log_dir).fingerprint
    step = 1 if os.environ.get("LMC_EVERY_KILL") else max(len(marks) // 5, 1)
    swaps = [place + 1 for place, mark in enumerate(marks) if mark == "|"]
    seen = []
    for event in sorted({*range(1, len(marks) + 1, step), *swaps, *(place + 1 for place in swaps)}):
        folder = tmp_path / str(event)
        config = replace(copy, log_dir=str(shutil.copytree(copy.log_dir, folder / "log", copy_function=os.link)))
        shutil.copytree(tmp_path / "rehearsal" / "log.requests", folder / "log.requests")
        before = partial(die_at, config.log_dir, event, None)
        group = forks.start(folder / "out", 1, remove_job, config, with_exchange, before=before)
        assert group.wait() == [-signal.SIGKILL], group.output()
        seen.append(check_after_kill(config, old, new))
        rewritten(config)  # the same command ends it
        assert check_after_kill(config, old, new) == "new"
        assert sorted(p.name for p in folder.iterdir()) == ["log", "log.requests", "out"]
        shutil.rmtree(folder)
    assert set(seen) == {"old", "new"} | (set() if with_exchange else {"between"}) and seen == sorted(
        seen, key=["old", "between", "new"].index
    )
    print(len(seen), "of", len(marks), "writes:", {place: seen.count(place) for place in ("old", "between", "new")})


def replay_job(config: Config, request: Counterfactual) -> None:
    replayed(config, request)


def kill_at(place: str, rank: int) -> None:
    """Kills the first rank when it renames something to, or removes it from, a path that holds `place`."""

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name == "os.rename" and place in str(args[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(hook)


def test_a_replay_that_was_killed_is_done_anew(forks: Forks, tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path / "old", "ddp", steps=8, save_batch_data=True), resume=False)
    log = finished(forks, config)
    request = Counterfactual("renormalize", seen_at(log, 2, 1))
    reference = without(config, request, "reference")
    finished(forks, reference)
    old, files = log.fingerprint, content(reference.log_dir)
    for i, (place, which) in enumerate(
        {"rewriting/steps/step-00000005": "old", "rewriting/snapshots/step-6": "old", "log.replaced": "new"}.items()
    ):
        folder = tmp_path / str(i)
        each = replace(config, log_dir=str(shutil.copytree(config.log_dir, folder / "log")))
        group = forks.start(folder / "out", 2, replay_job, each, request, before=partial(kill_at, place))
        statuses = group.wait()
        assert statuses[0] == -signal.SIGKILL and statuses[1] != 0, group.output()
        assert check_after_kill(each, old, None) == which
        if which == "old":
            group = forks.start(folder / "again", 2, replay_job, each, request)
            assert group.wait() == [0, 0], group.output()
        assert content(each.log_dir) == files
