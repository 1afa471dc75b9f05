"""Units by way of `lmc unlearn`: split, stored, taken out, put back; and the planner's choice carried out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_engine_logs import engine_config, this_runtime, train_job

from lmc_dist.errors import LmcError

FORGET = ["--forget.samples", "3,101,204,301"]


def command(config: str, output: str, *more: str) -> str:
    from lmc_dist.cli import COMMANDS, parse

    settings = parse("unlearn", ["--config", config, "--output_dir", output, "--progress", "none", *more])
    try:
        done = COMMANDS["unlearn"].work(settings, this_runtime())
    except LmcError as error:
        return f"error: {error}"
    assert isinstance(done, str)
    return done


@pytest.fixture(scope="module")
def config(ranks: Any, tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("log")
    settings = engine_config(folder, "zero3", "update", epochs=2)
    ranks(2).run(train_job, settings)
    path = folder / "config.json"
    path.write_text(json.dumps(asdict(settings)))
    return str(path)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_units_are_stored_taken_out_and_put_back(ranks: Any, config: str, tmp_path: Path) -> None:
    run, joint = tmp_path / "units", tmp_path / "joint"
    asked = [*FORGET, "--unlearn.units", "sample", "--unlearn.store_units", "true", "--unlearn.unit_groups", "auto"]
    for text in ranks(2).run(command, config, str(run), *asked, "--reference", "replay"):
        assert "by 4 units" in text, text
    ranks(2).run(command, config, str(joint), *FORGET, "--reference", "replay")
    first, whole = result(run), result(joint)
    assert first["n_units"] == 4 and len(first["units"]["included"]) == 4 and not run.with_name("units.work").exists()
    assert first["rel_error"] == pytest.approx(whole["rel_error"], rel=1e-4)
    assert first["v_norm"] == pytest.approx(whole["v_norm"], rel=1e-5)
    stored = sorted(path.name for path in (run / "correction" / "units").iterdir())
    assert stored == first["units"]["included"] == [f"sample-{i}" for i in (101, 204, 3, 301)]

    (text,) = ranks(1).run(command, config, str(run), "--undo", "sample-3,sample-204")
    assert "2 units in, without sample-204, sample-3" in text, text
    assert (
        result(run)["v_norm"] < first["v_norm"] and len(json.loads((run / "audit/audit_records.json").read_text())) == 2
    )
    for text, said in (
        (["--undo", "sample-3"], "sample-3 is already so"),
        (["--add", "sample-9"], "sample-9 is no unit of it"),
        (["--undo", "sample-101,sample-301"], "no unit is left in"),
    ):
        for found in ranks(2).run(command, config, str(run), *text):
            assert said in found, found
    ranks(2).run(command, config, str(run), "--add", "sample-3,sample-204")
    again = result(run)
    assert again["model_checksum"] == first["model_checksum"] and again["units"]["undone"] == []
    for found in ranks(2).run(command, config, str(joint), "--undo", "sample-3"):
        assert "keeps no units" in found, found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--unlearn.units", "batch"], "sample ids are forgotten"),
        (["--unlearn.units", "nowhere.json"], "joint, sample, batch, or a JSON file"),
        (["--unlearn.units", "sample", "--unlearn.replay_head", "2"], "not linear in what is forgotten"),
        (["--unlearn.units", "sample", "--unlearn.hessian_mode", "secant"], "not linear in what is forgotten"),
        (["--unlearn.units", "sample", "--unlearn.unit_groups", "3"], "does not divide 2 ranks"),
        (["--unlearn.block", "0"], "unlearn.block must be at least 1"),
        (["--unlearn.tol", "-1"], "unlearn.tol must be above 0"),
        (["--unlearn.mark_every", "0"], "unlearn.mark_every"),
        (["--unlearn.store_units", "true"], "are for units"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    ranks: Any, config: str, tmp_path: Path, settings: list[str], said: str
) -> None:
    for text in ranks(2).run(command, config, str(tmp_path / "out"), *FORGET, *settings):
        assert text.startswith("error: ") and said in text, text
    assert not (tmp_path / "out").exists()


def test_the_planned_strategy_is_carried_out(ranks: Any, config: str, tmp_path: Path) -> None:
    asked = [*FORGET, "--strategy", "auto", "--plan_unlearn.calibrate", "1"]
    for text in ranks(1).run(command, config, str(tmp_path / "out"), *asked):
        assert "exact replay" in text, text  # the only one whose error is known
    assert result(tmp_path / "out")["config"]["unlearn"]["replay_head"] == "all"


def short_of_memory(config: str, folder: Path) -> tuple[float, list[int], str]:
    """(distance of the units' sum to that with memory enough, vectors at once, what is said where nothing fits)."""
    import lmc_dist.unlearn.memory_guard as guard
    from lmc_dist.cli import parse
    from lmc_dist.config import UnlearnConfig
    from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.planner.facts import model_facts
    from lmc_dist.planner.reading import log_facts, request_facts
    from lmc_dist.trajectory.counterfactual import Counterfactual
    from lmc_dist.unlearn.problem import Problem
    from lmc_dist.unlearn.unit_run import sizes
    from lmc_dist.unlearn.unit_sweeps import correct_units
    from lmc_dist.unlearn.units import split_request

    run = open_logged_run(parse("unlearn", ["--config", config]), this_runtime())
    request = Counterfactual("renormalize", sample_ids=frozenset({3, 101, 204, 301}))
    problem = Problem(run.log, run.module, TokenCrossEntropy(), run.batches, request, HVPConfig("GGN"))
    units = split_request(request)
    whole = correct_units(problem, units, folder / "whole")
    model, found = model_facts(run.module.module), []
    allow, free, needed = guard.MemoryGuard.allow, guard.free_memory, guard.product_bytes
    try:
        # A byte a vector: two of them fit on one rank, the other has plenty.
        def noted(self: Any, mode: str, wanted: int, micros: Any) -> int:
            found.append(allow(self, mode, wanted, micros))
            return found[-1]

        rank = this_runtime().rank
        guard.product_bytes = lambda model, mode, m, passes, world_size: m  # type: ignore[assignment]
        guard.free_memory = lambda device: (2.5 / guard.USABLE if rank else 1e12, None)  # type: ignore[assignment]
        guard.MemoryGuard.allow = noted  # type: ignore[method-assign]
        short = correct_units(problem, units, folder / "short")
    finally:
        guard.free_memory, guard.product_bytes = free, needed
        guard.MemoryGuard.allow = allow  # type: ignore[method-assign]
    wanted = request_facts(run.log, request, run.batches, run.dataset)
    facts = log_facts(run.log, model, run.dataset, wanted.first)
    with pytest.raises(LmcError) as refused:
        sizes(facts, wanted, UnlearnConfig(), 4, 2, 1e4, None)
    assert sizes(facts, wanted, UnlearnConfig(unit_groups="auto"), 4, 2, 1e12, None) == (2, 4)
    return (short.v - whole.v).norm() / whole.v.norm(), found, str(refused.value)


def test_fewer_vectors_where_memory_is_short(ranks: Any, config: str, tmp_path: Path) -> None:
    for distance, at_once, said in ranks(2).run(short_of_memory, config, tmp_path):
        assert distance <= 1e-6 and at_once and max(at_once) <= 2, (distance, at_once)
        assert "a sweep of one vector takes" in said and "unit_groups" in said
