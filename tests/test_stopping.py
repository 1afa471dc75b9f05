"""Jobs that are asked to stop, and jobs that lose a rank."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Group
from test_faults import finished, records_of, tiny_config

from lmc_dist.config import Config, ForgetConfig, UnlearnConfig
from lmc_dist.runtime import STOPPED
from lmc_dist.shards.checksum import checksum
from lmc_dist.stopping import STOP_FILE
from lmc_dist.trajectory.files import read_json
from lmc_dist.trajectory.store import TrajectoryLog

STEPS = 27  # all nine epochs


def work_job(config: Config, what: str, patience: float = 40.0) -> None:
    """A command as the launcher's ranks run it."""
    import torch.distributed as dist

    from lmc_dist import watchdog
    from lmc_dist.commands.run import train_work, unlearn_work
    from lmc_dist.runtime import Runtime

    os.environ[watchdog.PATIENCE] = str(patience)
    watchdog.start(dist.get_rank(), dist.get_world_size())
    runtime = Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    {"train": train_work, "unlearn": unlearn_work}[what](config, runtime)


def slowly(seconds: float, rank: int) -> None:
    """Makes every step of this process take a little longer, so that a signal arrives in the middle."""
    import lmc_dist.stopping

    asked = lmc_dist.stopping.stop_asked

    def wait(group: Any = None) -> str | None:
        time.sleep(seconds)
        return asked(group)

    for module in ("lmc_dist.training", "lmc_dist.unlearn.sweep", "lmc_dist.trajectory.replay_marks"):
        __import__(module, fromlist=["stop_asked"]).stop_asked = wait


def with_stop_file(path: str, rank: int) -> None:
    os.environ[STOP_FILE] = path


def wait_for(group: Group, found: Any) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert not group.statuses() and time.monotonic() < deadline, group.output()
        time.sleep(0.02)


def test_training_stops_after_a_step_and_goes_on_to_the_bit(forks: Forks, tmp_path: Path) -> None:
    whole = finished(forks, tiny_config(tmp_path / "whole", steps=STEPS))
    config = tiny_config(tmp_path, steps=STEPS)
    log = Path(config.log_dir)
    group = forks.start(tmp_path / "out", 2, work_job, config, "train", before=partial(slowly, 0.05))
    wait_for(group, lambda: (log / "snapshots" / "step-6").is_dir())
    os.kill(group.pids[1], signal.SIGUSR1)  # one of them is enough
    assert group.wait() == [STOPPED, STOPPED], group.output()
    assert "the same command with --resume true goes on), as SIGUSR1 asked" in group.output()
    stopped = TrajectoryLog(log).num_steps
    assert 6 <= stopped < STEPS and (log / "snapshots" / f"step-{stopped}").is_dir()  # no step is done twice

    file = tmp_path / "stop"
    file.touch()
    group = forks.start(tmp_path / "out", 2, work_job, config, "train", before=partial(with_stop_file, str(file)))
    assert group.wait() == [STOPPED, STOPPED], group.output()
    assert file.read_text() == "stopped\n" and TrajectoryLog(log).num_steps == stopped + 1

    group = forks.start(tmp_path / "out", 2, work_job, config, "train")
    assert group.wait() == [0, 0], group.output()
    found = TrajectoryLog(log)
    assert records_of(found) == records_of(whole)
    assert checksum(found.theta(STEPS)) == checksum(whole.theta(STEPS))


@pytest.mark.parametrize("head", [0, 20, "auto", "all"])
def test_unlearning_stops_at_a_mark_and_goes_on_to_the_bit(forks: Forks, tmp_path: Path, head: Any) -> None:
    """By the recursion, within a replayed head of one length or another, and within exact replay."""
    config = tiny_config(tmp_path, steps=STEPS)
    log = finished(forks, config)
    asked = ForgetConfig(samples=str(log.record(1).sample_ids[0]))
    how = UnlearnConfig(mark_every=10, replay_head=head, head_tolerance=1e-6)
    config = replace(config, forget=asked, unlearn=how, progress="none", resume=False)
    whole, stopped = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "stopped"))
    group = forks.start(tmp_path / "out", 2, work_job, whole, "unlearn")
    assert group.wait() == [0, 0], group.output()
    group = forks.start(tmp_path / "out", 2, work_job, stopped, "unlearn", before=partial(slowly, 0.05))
    wait_for(group, lambda: [*(tmp_path / "stopped.work").glob("**/mark-*")])
    os.kill(group.pids[0], signal.SIGTERM)
    assert group.wait() == [STOPPED, STOPPED], group.output()
    assert "(the same command goes on), as SIGTERM asked" in group.output()
    assert not (tmp_path / "stopped").exists()
    if head == "all":  # the same mark, gone on from by another number of ranks
        shutil.copytree(tmp_path / "stopped.work", tmp_path / "alone.work")
        group = forks.start(
            tmp_path / "out", 1, work_job, replace(config, output_dir=str(tmp_path / "alone")), "unlearn"
        )
        assert group.wait() == [0], group.output()
    group = forks.start(tmp_path / "out", 2, work_job, stopped, "unlearn")
    assert group.wait() == [0, 0], group.output()
    assert not (tmp_path / "stopped.work").exists() and not (tmp_path / "whole.work").exists()
    from safetensors.torch import load_file

    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole/correction").glob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        one, two = load_file(tmp_path / "whole" / file), load_file(tmp_path / "stopped" / file)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    results = [read_json(tmp_path / name / "result.json") for name in ("whole", "stopped")]
    assert results[0]["v_norm"] == results[1]["v_norm"] > 0
    assert results[0]["gradients_equivalent"] == results[1]["gradients_equivalent"]
    if head == "all":
        alone, (two, again) = read_json(tmp_path / "alone/result.json"), (found["replay"] for found in results)
        assert two == again and two["bit_exact_world_size"] and not alone["replay"]["bit_exact_world_size"]
        assert alone["v_norm"] == pytest.approx(results[0]["v_norm"], rel=1e-4)
        assert alone["gradients_equivalent"] == results[0]["gradients_equivalent"]
    else:
        audits = [read_json(tmp_path / name / "audit/audit_records.json") for name in ("whole", "stopped")]
        for audit in audits:
            audit[0].pop("seconds")
        assert audits[0] == audits[1] and (head == 0) == (audits[0][0]["replay_head"] == 0)


def test_a_rank_that_dies_ends_the_job_with_its_name(forks: Forks, tmp_path: Path) -> None:
    for name, how, patience in (("killed", signal.SIGKILL, 40.0), ("frozen", signal.SIGSTOP, 3.0)):
        config = tiny_config(tmp_path / name, steps=4000)
        group = forks.start(tmp_path / f"{name}-out", 3, work_job, config, "train", patience)
        wait_for(group, lambda: (Path(config.log_dir) / "snapshots" / "step-3").is_dir())  # noqa: B023
        began, victim = time.monotonic(), 1
        os.kill(group.pids[victim], how)
        while {0, 2} - set(group.statuses()):
            assert time.monotonic() - began < 60, group.output()
            time.sleep(0.05)
        print(f"{name}: {time.monotonic() - began:.1f} s")
        assert group.statuses()[0] == group.statuses()[2] == 1
        assert f"rank {victim} (process {group.pids[victim]} on " in group.output(), group.output()
        group.kill([victim])
        group.wait()
