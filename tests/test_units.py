"""Forget units: whatever carries them, in whatever company, each has the same correction, and together they are the joint one."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Group
from safetensors.torch import load_file
from test_engine_logs import engine_config, this_runtime, train_job
from test_faults import LLAMA

from lmc_dist.config import Config
from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
from lmc_dist.errors import LmcError
from lmc_dist.logged_run import open_logged_run
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import read_json
from lmc_dist.trajectory.record import MicroRecord, StepRecord
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import compute_correction, load_full_correction
from lmc_dist.unlearn.problem import Problem
from lmc_dist.unlearn.unit_sweeps import Status, correct_units
from lmc_dist.unlearn.units import Unit, joint_unit, kept_gain, own_loss, passes_of, split_request, step_shares

# --- splitting -------------------------------------------------------------------------------------------------------


def record(step: int, passes: list[list[int]], denominator: float) -> StepRecord:
    micros = tuple(MicroRecord(k, 0, tuple(ids), denominator) for k, ids in enumerate(passes))
    return StepRecord(step, step, micros, (0.1,), denominator)


def counts(ids: Any) -> list[int]:
    return [1 + i % 4 for i in ids]


@pytest.mark.parametrize("kind", ["zero", "renormalize"])
@pytest.mark.parametrize("normalization", ["global_token_mean", "micro_batch_token_mean"])
def test_shares_of_a_step_add_up_to_its_source(kind: Any, normalization: Any) -> None:
    passes = [[0, 1, 2, 3], [4, 5], [6, 7]]
    total = float(sum(counts(range(8))))
    whole = record(0, passes, total)
    if normalization != "global_token_mean":
        micros = tuple(replace(m, denominator=3.0 * sum(counts(m.sample_ids))) for m in whole.micro_batches)
        whole = replace(whole, micro_batches=micros)
    request = Counterfactual(kind, sample_ids=frozenset({1, 2, 4, 5, 7}))
    units = split_request(request, {"a": [1, 4], "b": [2, 7], "c": [5]})
    edited = request.edit(whole, normalization, counts)
    shares = step_shares(edited, units, normalization, counts)
    joint = [w for m in edited.micro_batches for w in m.source_weights]
    parts = [[w for m in s.edited.micro_batches for w in m.source_weights] for s in shares if s.edited is not None]
    assert len(parts) == 3 and math.isclose(sum(s.of_kept for s in shares), 1.0)
    for got, want in zip([sum(column) for column in zip(*parts, strict=True)], joint, strict=True):
        assert math.isclose(got, want, abs_tol=1e-15)
    if normalization == "global_token_mean":  # what the kept samples gain is one gradient for all units
        gain = [w for m in kept_gain(edited).micro_batches for w in m.source_weights]
        for share, part in zip(shares, parts, strict=True):
            own = [w for m in own_loss(share).micro_batches for w in m.source_weights]
            assert all(math.isclose(p, o + share.of_kept * g) for p, o, g in zip(part, own, gain, strict=True))
    one = step_shares(edited, [joint_unit(request)], normalization, counts)
    assert [(s.of_kept, s.edited is edited) for s in one] == [(1.0, True)]


def test_a_step_of_which_nothing_remains_is_shared_by_tokens() -> None:
    request = Counterfactual("renormalize", sample_ids=frozenset({0, 1, 2}))
    edited = request.edit(record(0, [[0, 1], [2]], 6.0), "global_token_mean", counts)
    assert edited.skipped
    shares = step_shares(edited, split_request(request, {"a": [0, 2], "b": [1]}), "global_token_mean", counts)
    assert [(s.unit.name, s.of_kept) for s in shares] == [("a", 4 / 6), ("b", 2 / 6)]


def test_units_are_the_request() -> None:
    request = Counterfactual("renormalize", sample_ids=frozenset({1, 2, 3}))
    assert [unit.name for unit in split_request(request)] == ["sample-1", "sample-2", "sample-3"]
    skip = Counterfactual("skip", batch_ids=frozenset({10, 9}))
    assert [(u.name, u.batch_ids) for u in split_request(skip)] == [("batch-10", {10}), ("batch-9", {9})]
    for named, said in {
        "overlap": ({"a": [1, 2], "b": [2, 3]}, "sample 2 is in unit 'a' and in unit 'b'"),
        "missing": ({"a": [1, 2]}, "1 sample ids of the request are in no unit: 3"),
        "foreign": ({"a": [1, 2, 3, 4]}, "sample 4 of unit 'a' is not part of the request"),
        "empty": ({"a": [1, 2, 3], "b": []}, "unit 'b' is empty"),
        "name": ({"../a": [1, 2, 3]}, "'../a' is no name for a unit"),
    }.values():
        with pytest.raises(LmcError, match=said):
            split_request(request, named)


def test_passes_never_carry_more_than_fits() -> None:
    records = [record(step, [[2 * step, 2 * step + 1]], 2.0) for step in range(40)]
    records += [record(40 + step, [[2 * step]], 1.0) for step in range(3)]  # samples 0, 2, 4 again
    units = [Unit(f"u{i:02}", frozenset({i})) for i in range(80)]
    for K, width in ((None, 8), (3, 8), (3, 9), (0, 2)):
        passes = passes_of(units, records, K, 43, width)
        assert sorted(u.name for members in passes for u in members) == [u.name for u in units]
        most = 0
        for members in passes:
            for step in range(43):
                load = 0
                for unit in members:
                    steps = [r.step for r in records if unit.touches(r)]
                    last = 43 if K is None else K + 1
                    vectors = sum(s <= step < s + last for s in steps) if K is not None else steps[0] <= step
                    is_summed = K is not None and len(steps) > 1 and steps[0] <= step < steps[-1] + last
                    load += vectors + is_summed
                most = max(most, load)
        assert 1 <= most <= width, (K, width, most)
        assert K is not None or len(passes) == 10


# --- corrections -------------------------------------------------------------------------------------------------------

SAMPLES = Counterfactual("renormalize", sample_ids=frozenset({3, 5, 101, 102, 204, 301}))
BATCHES = Counterfactual("skip", batch_ids=frozenset({0, 2, 3}))


def job_config(folder: Path, optimizer: str) -> Config:
    """24 samples: in 2 epochs of 2 steps under SGD, in 6 steps under AdamW; two passes a step, so that ranks share it."""
    settings = {"optimizer": optimizer, "epochs": 2, "max_grad_norm": 0.8, "batch_size": 12, "micro_batch_size": 6}
    if optimizer == "adamw":
        settings |= {"learning_rate": 0.01, "epochs": 1, "batch_size": 4, "micro_batch_size": 2}
    return engine_config(folder / optimizer, "single", "gradient", LLAMA, **settings)


def curvature(mode: str, damping: float = 0.0) -> HVPConfig:
    return HVPConfig(mode, damping, rank=2, refresh=2)


def problem_of(
    config: Config, request: Counterfactual, mode: str = "GGN", damping: float = 0.0, **more: Any
) -> tuple[Problem, Any]:
    opened, hvp = open_logged_run(config, this_runtime()), curvature(mode, damping)
    problem = Problem(opened.log, opened.module, TokenCrossEntropy(), opened.batches, request, hvp, **more)

    def make(layout: Any) -> ShardedModule:
        return ShardedModule(build_skeleton(opened.model_config, torch.device("cpu")), layout, torch.device("cpu"))

    return problem, make


def units_job(config: Config, request: Counterfactual, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    how = dict(given)
    named = how.pop("named", None)
    more = {key: how.pop(key) for key in ("K", "tol", "block", "mode", "damping") if key in how}
    stop_at = how.pop("stop_at", None)
    problem, make = problem_of(config, request, **more)
    seen: list[Status] = []

    def progress(status: Status) -> None:
        seen.append(status)
        if stop_at is not None and len(seen) == stop_at:
            raise LmcError("stopped here")

    found = correct_units(problem, split_request(request, named), folder, make, progress=progress, **how)
    return {"v": found.v.norm(), "audit": len(found.audit), "cost": found.gradients_equivalent, "seen": len(seen)}


def joint_job(config: Config, request: Counterfactual, folder: Path, K: int | None, mode: str = "GGN") -> int:
    problem, _ = problem_of(config, request)
    found = compute_correction(
        problem.trajectory, problem.module, problem.batches, request, curvature(mode), K, problem.loss, update="tangent"
    )
    found.save(folder)
    return found.behind


def distances(config: Config, folder: Path, joint: Path, other: Path | None = None) -> dict[str, float]:
    """How far the units' sum is from the joint correction, and each unit from that of another run. One rank."""
    log = open_logged_run(config, this_runtime()).log
    like = ShardedVector.zeros(log.layout)
    want = load_full_correction(joint, log.layout, like)
    kinds = ["v", *want.state]

    def vectors(found: Any) -> dict[str, ShardedVector]:
        return {"v": found.v, **found.state}

    total = {kind: like.clone() for kind in kinds}
    behind, worst = 0, 0.0
    for path in sorted((folder / "units").iterdir()):
        unit = load_full_correction(path, log.layout, like)
        behind += unit.behind
        for kind in kinds:
            total[kind].add_(vectors(unit)[kind])
        if other is not None:
            again = load_full_correction(other / "units" / path.name, log.layout, like)
            worst = max(
                worst, *((vectors(unit)[k] - vectors(again)[k]).norm() / vectors(unit)["v"].norm() for k in ["v"])
            )
    assert behind == want.behind
    errors = {kind: (total[kind] - vectors(want)[kind]).norm() / vectors(want)[kind].norm() for kind in kinds}
    return {**errors, "unit": worst}


@pytest.fixture(scope="module")
def logs(ranks: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("units")
    for optimizer in ("sgd", "adamw"):
        ranks(1).run(train_job, job_config(folder, optimizer))
    return folder


CARRIED: list[tuple[int, dict[str, Any]]] = [  # ranks, how
    (1, {"num_groups": 1, "width": 8}),
    (1, {"num_groups": 1, "width": 2}),
    (2, {"num_groups": 2, "width": 3}),
    (4, {"num_groups": 2, "width": 3, "block": 2}),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_units_do_not_depend_on_what_carries_them(ranks: Any, logs: Path, tmp_path: Path, optimizer: str) -> None:
    config, samples, batches = job_config(logs, optimizer), SAMPLES, BATCHES
    if optimizer == "adamw":
        # Not its first steps: there the tangent is a small difference of large terms, and float32 leaves few digits of it.
        late = [r for r in TrajectoryLog(config.log_dir).records() if r.step >= 3]
        samples = replace(SAMPLES, sample_ids=frozenset(i for r in late for i in r.sample_ids[:2]))
        batches = replace(BATCHES, batch_ids=frozenset({3, 4}))
    for name, request, K in (("samples", samples, None), ("short", samples, 1), ("batches", batches, None)):
        ranks(1).run(joint_job, config, request, tmp_path / f"{name}-joint", K)
        first = tmp_path / f"{name}-0"
        for i, (world_size, how) in enumerate(CARRIED):
            folder = tmp_path / f"{name}-{i}"
            results = ranks(world_size).run(units_job, config, request, folder, {"K": K, **how})
            assert len({(r["v"], r["audit"], r["cost"]) for r in results}) == 1
            (errors,) = ranks(1).run(distances, config, folder, tmp_path / f"{name}-joint", first)
            assert max(errors.values()) <= 1e-6, (name, how, errors)


def test_low_rank_does_not_depend_on_what_carries_it(ranks: Any, logs: Path, tmp_path: Path) -> None:
    """Bases are taken at steps that the request decides, also where a pass begins between two of them."""
    config, how = job_config(logs, "adamw"), {"K": 2, "mode": "low_rank"}
    ranks(1).run(joint_job, config, SAMPLES, tmp_path / "joint", 2, "low_rank")
    ranks(1).run(units_job, config, SAMPLES, tmp_path / "one by one", {"width": 1, **how})
    ranks(2).run(units_job, config, SAMPLES, tmp_path / "together", {"width": 30, **how})
    (errors,) = ranks(1).run(distances, config, tmp_path / "one by one", tmp_path / "joint", tmp_path / "together")
    assert max(errors.values()) <= 1e-6, errors


def test_users_are_units_too(ranks: Any, logs: Path, tmp_path: Path) -> None:
    config, named = job_config(logs, "sgd"), {"ann": [3, 101], "bob": [5, 102, 204], "cy": [301]}
    (result,) = ranks(1).run(units_job, config, SAMPLES, tmp_path / "units", {"named": named})
    ranks(1).run(joint_job, config, SAMPLES, tmp_path / "joint", None)
    (errors,) = ranks(1).run(distances, config, tmp_path / "units", tmp_path / "joint")
    assert result["audit"] == 3 and max(errors.values()) <= 1e-6, errors


# --- stopped ---------------------------------------------------------------------------------------------------------


def die_at(folder: str, place: str, event: int, delay: float, victim: int, rank: int) -> None:
    """Kills this process `delay` seconds after its n-th operation on files of the folder with `place` in their names."""
    left = event if rank == victim else 0

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if not left or name not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        path = (
            os.path.realpath(f"/proc/self/fd/{args[1]}/{args[0]}") if name == "os.remove" and args[1] > 0 else args[0]
        )
        if not str(path).startswith(folder) or place not in str(path):
            return
        left -= 1
        if left == 0:
            what = f"{name} {str(path).removeprefix(folder)}" + (" and a while" if delay else "")
            os.write(2, f"dies at {what}\n".encode())
            if delay:
                threading.Thread(target=die, daemon=True).start()
            else:
                die()

    sys.addaudithook(hook)


def finished_units(folder: Path) -> dict[str, int]:
    """When the files of each were written: that of a finished unit never changes."""
    found = (folder / "units").glob("*/correction.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found if path.parent.suffix != ".part"}


def same_units(a: Path, b: Path) -> bool:
    """v and dσ to the bit, and the audits but for their time."""
    names = sorted(path.name for path in (a / "units").iterdir())
    assert names == sorted(path.name for path in (b / "units").iterdir())
    for name in names:
        mine, other = a / "units" / name, b / "units" / name
        audits = [[row | {"seconds": 0} for row in read_json(unit / "audit.json")] for unit in (mine, other)]
        assert audits[0] == audits[1] and read_json(mine / "correction.json") == read_json(other / "correction.json")
        files = sorted(path.name for path in mine.glob("*.safetensors"))
        assert files == sorted(path.name for path in other.glob("*.safetensors")) and len(files) >= 2
        for file in files:
            one, two = load_file(mine / file), load_file(other / file)
            if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
                return False
    return True


STOPPED: dict[str, tuple[int, dict[str, Any]]] = {  # kills, how
    "all steps": (3, {}),
    "K=2": (3, {"K": 2}),
    "two groups": (3, {"K": 2, "num_groups": 2, "width": 1}),
    "low_rank": (2, {"K": 2, "mode": "low_rank"}),
}
# Where a rank dies: name, which of such operations at most, and whether at once or up to so many seconds later.
PLACES = (("mark.part", 50, 0.0), ("/mark-", 12, 0.0), ("units/", 25, 0.0), ("", 100, 0.05))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(ranks: Any, forks: Forks, logs: Path, tmp_path: Path) -> None:
    """Ranks are killed while vectors are carried, marks and units are written; whoever goes on comes to the same bits."""
    config, chance, told = job_config(logs, "adamw"), random.Random(5), []

    def start(folder: Path, how: dict[str, Any], before: Any = None) -> Group:
        return forks.start(tmp_path / "out", 2, units_job, config, SAMPLES, folder, how, before=before)

    for name, (kills, settings) in STOPPED.items():
        how = {"width": 3, "mark_every": 1, **settings}
        group = start(tmp_path / f"{name}, whole", how)
        assert group.wait() == [0, 0], group.output()
        folder, kept, done, tries = tmp_path / name, dict[str, int](), 0, 0
        while done < kills:
            place, most, delay = PLACES[len(told) % len(PLACES)]
            victim, event, tries = 0 if place == "/mark-" else chance.randrange(2), chance.randrange(1, most), tries + 1
            if is_alone := "num_groups" in how and tries == 1:  # a group is gone, the other does all that is left
                place, event, delay, victim = "units/", 1, 0.0, 1
            before = partial(die_at, f"{folder}/", place, event, chance.uniform(0, delay), victim)
            group = start(folder, how, before)
            statuses = group.wait()
            now = finished_units(folder)
            assert kept.items() <= now.items(), "finished units were lost, or written again"
            if statuses[1 - victim] == 0:  # it was through before it was to die
                assert same_units(folder, tmp_path / f"{name}, whole") and tries < 3 * kills, told
                shutil.rmtree(folder)
                kept = {}
                continue
            assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] in (1, 2), group.output()
            assert now or not is_alone, group.output()
            kept, done = now, done + 1
            where = next(line for line in group.output().splitlines() if "dies at" in line)
            told.append(f"{name}: {len(kept)} units, {where}")
            if len(told) == 1:
                shutil.copytree(folder, tmp_path / "for one rank")
        group = start(folder, how)
        assert group.wait() == [0, 0], group.output()
        assert same_units(folder, tmp_path / f"{name}, whole"), told
        assert kept.items() <= finished_units(folder).items()
        assert not list((folder / "passes").iterdir()), told
    print(*told, sep="\n")
    assert all(any(place in each for each in told) for place, _, _ in PLACES), told
    # a run of two ranks goes on with one
    ranks(1).run(units_job, config, SAMPLES, tmp_path / "for one rank", {"width": 3, "mark_every": 1})
    ranks(1).run(joint_job, config, SAMPLES, tmp_path / "joint", None)
    whole = tmp_path / "all steps, whole"
    (errors,) = ranks(1).run(distances, config, tmp_path / "for one rank", tmp_path / "joint", whole)
    assert errors["unit"] <= 1e-6, errors


def diverging_job(config: Config, request: Counterfactual, folder: Path, how: dict[str, Any]) -> str:
    """The first pass goes on from its first step only when another is through."""
    problem, make = problem_of(config, request, damping=1e6)
    first = min(r.step for r in problem.trajectory.records() if request.touches(r))

    def progress(status: Status) -> None:
        deadline = time.monotonic() + 60
        while status.step == first and not finished_units(folder) and time.monotonic() < deadline:
            time.sleep(0.01)

    with pytest.raises(LmcError) as caught:
        correct_units(problem, split_request(request), folder, make, progress=progress, **how)
    return str(caught.value)


def test_a_unit_that_diverges_is_named_and_harms_no_other(ranks: Any, logs: Path, tmp_path: Path) -> None:
    config = job_config(logs, "adamw")
    records = {record.step: record for record in TrajectoryLog(config.log_dir).records()}
    early, late = records[1].sample_ids[0], records[5].sample_ids[0]
    request = Counterfactual("renormalize", sample_ids=frozenset({early, late}))
    for said in ranks(4).run(diverging_job, config, request, tmp_path, {"num_groups": 2, "width": 1}):
        assert f"unit sample-{early}: the correction diverged at step" in said, said
    assert list(finished_units(tmp_path)) == [f"sample-{late}"]
    assert [path.name for path in (tmp_path / "units").iterdir()] == [f"sample-{late}"]


def refused_job(config: Config, folder: Path, request: Counterfactual, how: dict[str, Any]) -> str:
    with pytest.raises(LmcError) as caught:
        units_job(config, request, folder, how)
    return str(caught.value)


def test_what_does_not_fit_is_refused_on_every_rank(ranks: Any, logs: Path, tmp_path: Path) -> None:
    config = job_config(logs, "sgd")
    ranks(2).run(units_job, config, BATCHES, tmp_path / "a", {})
    for said in ranks(2).run(refused_job, config, tmp_path / "a", SAMPLES, {}):
        assert "holds the work of another request" in said
    for said in ranks(2).run(refused_job, config, tmp_path / "b", SAMPLES, {"num_groups": 3}):
        assert "unit_groups=3 does not divide 2 ranks" in said


def test_units_that_have_come_to_rest_stop(ranks: Any, logs: Path, tmp_path: Path) -> None:
    config = job_config(logs, "sgd")
    (whole,) = ranks(1).run(units_job, config, SAMPLES, tmp_path / "whole", {})
    (early,) = ranks(1).run(units_job, config, SAMPLES, tmp_path / "early", {"tol": 1e9})
    assert early["cost"] <= whole["cost"]
