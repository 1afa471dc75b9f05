"""Runs that are cut off and go on: with other ranks, under another engine; and what is not gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from test_faults import LLAMA, die_in, finished, records_of, tiny_config, train_job

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.store import TrajectoryLog

STEPS = 12


def cut_off(forks: Forks, config: Config, world_size: int, step: int) -> None:
    """Trains until a snapshot is about to be published, which the one before it was then; all ranks are killed."""
    folder = Path(config.log_dir).parent / "cut"
    group = forks.start(folder, world_size, train_job, config, before=partial(die_in, f"snapshots/step-{step}"))
    while not (statuses := group.statuses()):
        pass
    assert -9 in statuses.values(), group.output()
    group.kill(range(world_size))
    group.wait()


def facts_job(log_dir: str, output: str) -> None:
    """Checksums of all θ_s, u_s and g_s at this world size."""
    log = TrajectoryLog(log_dir)
    theta = log.theta(0)
    found: dict[str, Any] = {"theta": [checksum(theta)], "update": [], "gradient": [], "norms": []}
    for step in range(log.num_steps):
        found["update"].append(checksum(log.advance(theta, step)))
        found["theta"].append(checksum(theta))
        found["gradient"].append(checksum(log.gradient(step)))
        found["norms"].append(log.gradient(step).norm())
    if log.layout.rank == 0:
        Path(output).write_text(json.dumps(found))


def distance_job(first: str, second: str, output: str) -> None:
    a, b = TrajectoryLog(first), TrajectoryLog(second)
    theta = a.theta(a.num_steps)
    distance = (theta - b.theta(b.num_steps)).norm() / theta.norm()
    if a.layout.rank == 0:
        Path(output).write_text(json.dumps(distance))


def correction_job(config: Config, whole: str, output: str) -> None:
    """The same deletion by the log that was cut off and by the one that was not: relative distance of the corrections."""
    import torch.distributed as dist

    from lmc_dist.curvature import HVPConfig
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.runtime import Runtime
    from lmc_dist.unlearn.correction import compute_correction

    runtime = Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    found = []
    for log_dir in (config.log_dir, whole):
        run = open_logged_run(replace(config, log_dir=log_dir), runtime)
        request = Counterfactual("renormalize", sample_ids=frozenset(run.log.record(4).sample_ids[:2]))
        found.append(compute_correction(run.log, run.module, run.batches, request, HVPConfig("GGN")).v)
    norm, distance = found[1].norm(), (found[0] - found[1]).norm()
    if runtime.is_main:
        Path(output).write_text(json.dumps({"norm": norm, "distance": distance / norm}))


def replay_job(config: Config, skipped: int | None, output: str) -> None:
    from test_zero3 import build_for_replay

    from lmc_dist.training import build_dataset
    from lmc_dist.trajectory.batches import DatasetBatches
    from lmc_dist.trajectory.replay import replay, replay_engine

    log = TrajectoryLog(config.log_dir)
    request = None if skipped is None else Counterfactual("skip", batch_ids=frozenset({skipped}))
    engine = replay_engine(build_for_replay(config), log)
    result = replay(engine, log, DatasetBatches(build_dataset(config)[0]), request)
    theta = log.theta(log.num_steps)
    found = {"exact": result.exact, "verified": result.verified, "steps": result.steps}
    found["distance"] = (result.theta - theta).norm() / theta.norm()
    if log.layout.rank == 0:
        Path(output).write_text(json.dumps(found))


def ask(forks: Forks, folder: Path, world_size: int, function: Any, *args: Any) -> Any:
    """What rank 0 of a job found."""
    output = folder / "answer.json"
    group = forks.start(folder, world_size, function, *args, str(output))
    assert group.wait(120) == [0] * world_size, group.output()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_engine(forks: Forks, tmp_path: Path) -> None:
    whole = finished(forks, tiny_config(tmp_path / "whole", "ddp", steps=STEPS))
    config = tiny_config(tmp_path / "changed", "deepspeed", steps=STEPS, storage="gradient", compression="zstd")
    cut_off(forks, config, 2, 6)  # goes back to 3
    fsdp2 = replace(config, train=replace(config.train, engine="fsdp2"))
    cut_off(forks, fsdp2, 3, 9)  # goes back to 6
    single = replace(config, train=replace(config.train, engine="single"))
    log = finished(forks, single, 1)

    ways = [(s.first_step, s.world_size, s.engine, s.partition) for s in log.manifest.all_segments]
    assert ways == [(0, 2, "deepspeed-zero3", "zero3"), (3, 3, "fsdp2", "fsdp2"), (6, 1, "single", "zero3")]
    assert [log.record(s).world_size for s in (0, 4, 9)] == [2, 3, 1]
    assert [len(log.kinds(s)["update"]) for s in (0, 4, 9)] == [2, 3, 1]
    assert log.num_steps == STEPS and log.missing() == {}
    assert [r.sample_ids for r in log.records()] == [r.sample_ids for r in whole.records()]

    facts = [ask(forks, tmp_path / f"facts-{w}", w, facts_job, config.log_dir) for w in (1, 2, 3)]
    assert facts[0]["theta"][1:] == [r.checksum for r in log.records()]
    assert all(found[key] == facts[0][key] for found in facts for key in ("theta", "update", "gradient"))
    assert facts[2]["norms"] == pytest.approx([r.grad_norm for r in log.records()], rel=1e-5)
    assert ask(forks, tmp_path / "distance", 2, distance_job, config.log_dir, str(whole.path)) < 1e-5

    answer = ask(forks, tmp_path / "correction", 2, correction_job, single, str(whole.path))
    print(answer)
    assert answer["norm"] > 0 and answer["distance"] < 1e-3, answer

    # The engine of the end repeats its own steps to the bit, and no others.
    late = ask(forks, tmp_path / "late", 1, replay_job, single, 10)
    assert (late["exact"], late["verified"], late["steps"]) == (True, 1, 2) and late["distance"] > 0
    early = ask(forks, tmp_path / "early", 1, replay_job, single, None)
    # one gradient more: nothing it repeats can be compared to the bit, so the first step's norm is, before it begins
    assert (early["exact"], early["verified"], early["steps"]) == (False, 0, STEPS + 1) and early["distance"] < 1e-5
    elsewhere = ask(forks, tmp_path / "elsewhere", 1, replay_job, replace(single, log_dir=str(whole.path)), None)
    assert not elsewhere["exact"] and elsewhere["distance"] < 1e-5


def test_a_finished_run_is_left_as_it_is(forks: Forks, tmp_path: Path) -> None:
    """Rounded updates do not meet the last snapshot; the resumed run follows them at another world size."""
    config = tiny_config(tmp_path, "fsdp2", steps=6, update_dtype="bfloat16", save_interval=4)
    log = finished(forks, config)
    assert log.record(5).log_checksum != log.record(5).checksum
    before = records_of(log)
    again = finished(forks, replace(config, train=replace(config.train, engine="ddp")), 3)
    assert records_of(again) == before and again.snapshots == [0, 4, 6]
    longer = replace(config, train=replace(config.train, max_steps=8))
    group = forks.start(tmp_path / "longer", 2, train_job, longer)
    assert group.wait() == [2, 2] and "was trained with train.max_steps=6, not 8" in group.output()


REFUSED: dict[str, Any] = {
    "train.learning_rate=0.02, not 0.5": lambda c: replace(c, train=replace(c.train, learning_rate=0.5)),
    "train.seed=0, not 1": lambda c: replace(c, train=replace(c.train, seed=1)),
    "is of another run .storage differ.": lambda c: replace(c, log=replace(c.log, storage="full")),
    "is of another run .save_interval differ.": lambda c: replace(c, log=replace(c.log, save_interval=2)),
    "data.people=3, not 4": lambda c: replace(c, data=replace(c.data, people=4)),
    "model.attn_implementation=None, not eager": lambda c: replace(
        c, model=replace(c.model, attn_implementation="eager")
    ),
    "model.config=": lambda c: replace(c, model=replace(c.model, config={**LLAMA, "hidden_size": 16})),
    "resume continues the log in log_dir, overwrite removes it": lambda c: replace(c, overwrite=True),
}


def test_another_run_is_not_gone_on_with(forks: Forks, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=4)
    before = records_of(finished(forks, config, 1))
    for i, (message, change) in enumerate(REFUSED.items()):  # not together: each holds the lock for a moment
        group = forks.start(tmp_path / f"refused-{i}", 1, train_job, change(config))
        assert group.wait() == [2], group.output()
        with pytest.raises(LmcError, match=message):
            raise LmcError(group.output())
        assert group.output().count("error: ") == 1 and "Traceback" not in group.output()
    assert records_of(TrajectoryLog(config.log_dir)) == before

    manifest = Path(config.log_dir) / "manifest.json"
    manifest.rename(tmp_path / "kept.json")
    group = forks.start(tmp_path / "refused", 1, train_job, config)
    assert group.wait() == [2] and "no manifest.json: there is no log to resume" in group.output()
    shutil.move(tmp_path / "kept.json", manifest)
    as_named = replace(config, model=replace(config.model, attn_implementation="sdpa"))  # which null is
    assert records_of(finished(forks, as_named, 1)) == before
