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
