"""Deletion while the Hugging Face Trainer trains: to the bit what a run without the samples would have reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pool import Pool
from test_trainer import make_trainer
from test_zero3 import GPT2, build_for_replay, small_config

from lmc_dist.config import OnlineSettings
from lmc_dist.errors import LmcError
from lmc_dist.online.ledger import Ledger
from lmc_dist.online.verify import verify_books
from lmc_dist.shards.checksum import checksum
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import ledger_folder
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

FORGOTTEN = frozenset({3, 101, 204, 305})


def online_job(folder: Path, engine_name: str, settings: dict[str, Any], asked_at: int) -> dict[str, Any]:
    from lmc_dist.online.hf import unlearn_online
    from lmc_dist.shards.engines import engine_shards
    from lmc_dist.trajectory.callback import TrainingLoggerCallback

    trainer, dataset, logger = make_trainer(folder, configured=True, engine=engine_name)
    trainer.remove_callback(TrainingLoggerCallback)
    callback = unlearn_online(trainer, logger, OnlineSettings(relearn_per_step=0, **settings))

    def file(step: int) -> None:
        if step == asked_at and dist.get_rank() == 0:
            Ledger(ledger_folder(logger.log_dir)).submit(FORGOTTEN)

    logger.boundaries.append(file)
    trainer.train()
    log = TrajectoryLog(folder / "log")
    engine = replay_engine(build_for_replay(small_config(folder, GPT2)), log)
    batches, request = DatasetBatches(dataset), Counterfactual("renormalize", FORGOTTEN)
    without = replay(engine, log, batches, request)
    found = {"end": checksum(log.theta(log.num_steps)), "without": checksum(without.theta), "exact": without.exact}
    as_it_was = replay(engine, log, batches)
    found |= {"again": checksum(as_it_was.theta), "verified": as_it_was.verified, "steps": log.num_steps}
    live = engine_shards(trainer.model_wrapped, trainer.optimizer)
    found |= {"live": checksum(live.read()), "answered": callback.online.answered, "edits": sorted(log.edits)}
    found["ids"] = [log.record(s).sample_ids for s in range(log.num_steps)]
    return found


@pytest.mark.parametrize("engine", ["deepspeed-zero3", "ddp"])
def test_requests_during_a_trainer_run(tmp_path: Path, engine: str) -> None:
    pool = Pool(2)
    try:
        found = pool.run(online_job, tmp_path, engine, {"replay_head": "all"}, 2)[0]
    finally:
        pool.close()
    assert found["edits"] == [2] and found["answered"] == 1
    assert found["exact"] and found["end"] == found["without"] == found["live"]
    assert found["again"] == found["end"] and found["verified"] == found["steps"] == 4
    assert FORGOTTEN & {i for ids in found["ids"][:2] for i in ids} == FORGOTTEN
    assert FORGOTTEN.isdisjoint(i for ids in found["ids"][2:] for i in ids)
    problems, _ = verify_books(tmp_path / "log", ledger_folder(tmp_path / "log"))
    assert problems == []


def job_without_step_1(folder: Path, engine_name: str, asked_at: int) -> dict[str, Any]:
    """A run that is asked to forget all samples of step 1."""
    from lmc_dist.online.hf import unlearn_online
    from lmc_dist.shards.engines import engine_shards
    from lmc_dist.trajectory.callback import TrainingLoggerCallback

    trainer, dataset, logger = make_trainer(folder, True, "adamw_torch", engine_name)
    trainer.remove_callback(TrainingLoggerCallback)
    unlearn_online(trainer, logger, OnlineSettings(relearn_per_step=0))

    def file(step: int) -> None:
        if step == asked_at:
            logger.flush()
            if dist.get_rank() == 0:  # the epoch has two steps
                forgotten = set(dataset.ids) - set(TrajectoryLog(logger.log_dir).record(0).sample_ids)
                Ledger(ledger_folder(logger.log_dir)).submit(forgotten)

    logger.boundaries.append(file)
    trainer.train()
    log = TrajectoryLog(logger.log_dir)
    found = {"end": checksum(engine_shards(trainer.model_wrapped, trainer.optimizer).read())}
    found |= {name: [getattr(r, name) for r in log.records()] for name in ("applied", "lr", "u_norm")}
    return found | {"seen": [len(record.sample_ids) for record in log.records()], "edits": sorted(log.edits)}


@pytest.mark.parametrize("engine", ["deepspeed-zero3", "ddp"])
def test_a_step_of_which_nothing_is_left_does_not_happen(tmp_path: Path, engine: str) -> None:
    """Momentum would move the weights without a gradient; the run without the samples has no such step."""
    found = {}
    for asked_at in (1, 4):
        pool = Pool(2)
        try:
            found[asked_at] = pool.run(job_without_step_1, tmp_path / str(asked_at), engine, asked_at)[0]
        finally:
            pool.close()
    early, late = found[1], found[4]
    assert early["applied"] == [True, False, True, True] and early["u_norm"][1] == 0 < late["u_norm"][1]
    assert early["seen"][:2] == [12, 0] and late["seen"] == [12] * 4 and early["lr"] == late["lr"]
    assert (early["edits"], late["edits"]) == ([], [4])
    assert early["end"] == late["end"]  # to the bit


def test_companions_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import Trainer

    from lmc_dist.online.hf import unlearn_online

    trainer = Trainer.__new__(Trainer)
    with pytest.raises(LmcError, match="relearn_per_step=0"):
        unlearn_online(trainer, str(tmp_path / "log"), OnlineSettings())
    with pytest.raises(LmcError, match="poll_every must be at least 1"):
        unlearn_online(trainer, str(tmp_path / "log"), OnlineSettings(relearn_per_step=0, poll_every=0))
