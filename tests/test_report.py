"""lmc report: pages of made-up finished runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lmc_dist.cli import parse
from lmc_dist.config import Config, ForgetConfig, ReportConfig, TrainConfig
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.layers import layer_distances
from lmc_dist.report.collect import group_runs, read_runs
from lmc_dist.report.render import report
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.snapshot_files import OFFSETS, SHARDING_INFO, snapshot_file
from lmc_dist.unlearn.correction import Correction

BIN = Path(sys.executable).parent
HOSTILE = '<script>alert("x")</script> $\\frac_| `a` https://example.org/x.png </svg>\ud800'
# Elements without an end tag; in an SVG every element has one, or ends itself.
VOID = {"meta", "link", "br", "hr", "img", "input"}


def result_of(seed: int = 0, shift: float = 0.0) -> dict[str, Any]:
    """What result.json holds."""
    config = Config(
        train=TrainConfig(seed=seed),
        forget=ForgetConfig(samples="3,203-206"),
        log_dir=f"runs/log-{seed}",
        output_dir=f"runs/unlearn-{seed}",
        reference="retrain",
    )

    def row(method: str, label: str, error: float | None, forget: float, retain: float, *cost: float) -> dict[str, Any]:
        names = ("method", "label", "rel_error", "loss_forget", "loss_retain", "gradients", "seconds")
        return dict(zip(names, (method, label, error, forget, retain, *cost), strict=True))

    return {
        "status": "done",
        "rel_error": 0.25 + shift,
        "seconds_unlearn": 3.5 + shift,
        "seconds_retrain": 12.0,
        "gradients_equivalent": 41.5,
        "v_norm": 0.125,
        "n_units": 1,
        "units": None,
        "world_size": 2,
        "engine": "deepspeed",
        "config": asdict(config),
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.1"},
        "log_fingerprint": f"{seed:032x}",
        "model_checksum": "0123456789abcdef",
        "request": {
            "what": "5 samples of 2 people",
            "samples": 5,
            "steps": 4,
            "num_steps": 60,
            "counterfactual": "renormalize",
        },
        "replay": None,
        "rows": [
            row("do_nothing", "do nothing", 1.0, 0.5, 0.6, 0.0, 0.0),
            row("tim", "first-order rollback (TIM)", 1.25, 1.1, 0.8, 4.0, 0.5),
            row("ggn", "LMCleaner, GGN, K=all", 0.25 + shift, 0.9 + shift, 0.65, 41.5, 3.5 + shift),
            row("replay", "exact replay", 0.0, 0.95, 0.61, 55.0, 9.0),
            row("retrain", "retrain from scratch", 0.0, 0.95, 0.61, 60.0, 12.0),
        ],
    }


def audit_of(units: int = 1) -> list[dict[str, Any]]:
    """What audit_records.json holds."""
    common = {"tz": 5, "tau": 60, "K_used": 54, "hvp_calls": 54, "mode": "GGN", "damping": 0.0, "replay_head": 0}
    common |= {"counterfactual": "renormalize", "stopped_by": "end", "seconds": 3.0, "missed": None, "head_error": None}
    return [
        {"unit": f"sample-{i}" if units > 1 else "joint", "v0_norm": 0.05, "v_norm": 0.1 + 0.01 * i, "growth_max": 1.5}
        | common
        for i in range(units)
    ]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """`make(name, result, audit, **files)`: a run folder; returns its path."""

    def write(name: str, result: Any = None, audit: Any = None, **files: Any) -> str:
        folder = tmp_path / "runs" / name
        (folder / "audit").mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result_of() if result is None else result))
        (folder / "audit" / "audit_records.json").write_text(json.dumps(audit_of() if audit is None else audit))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return str(folder)

    return write


def reported(folder: Path, *runs: str) -> tuple[str, str, list[dict[str, str]]]:
    """(page, Markdown, rows of the CSV) of a report."""
    report(Config(report=ReportConfig(runs=",".join(runs), output=str(folder))))
    page, text, table = ((folder / f"report.{kind}").read_text() for kind in ("html", "md", "csv"))
    return page, text, list(csv.DictReader(io.StringIO(table)))


class Walk(HTMLParser):
    """Checks that elements are balanced, ids are used once, references stay inside, and nothing is loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.counts: dict[str, int] = {}
        self.alts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        assert set(self.references) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]], is_closed: bool = False) -> None:
        if tag not in VOID and not is_closed:
            self.open.append(tag)
        assert tag not in ("script", "img", "link", "iframe", "object", "embed", "base", "image", "form", "a"), tag
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), "an attribute twice"
        for name, value in values.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href"), name
            if name == "href":
                assert value.startswith("#")
                self.references.append(value[1:])
            if name in ("style", "clip-path", "fill", "stroke"):
                found = re.findall(r"url\((.*?)\)", value)
                assert all(target.startswith("#") for target in found)
                self.references += [target[1:] for target in found]
        if "aria-labelledby" in values:
            self.references.append(values["aria-labelledby"])
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "svg":
            assert values["role"] == "img"
            self.alts.append(values["aria-label"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs, True)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_run_is_told_in_full(make: Callable[..., str], tmp_path: Path) -> None:
    evaluation = {"models": {"unlearned": {"truth_ratio": {"value": 0.51, "low": 0.4, "high": 0.6}}}}
    layers = {
        "reference": None,
        "rel_error": 0.25,
        "layers": [
            {"name": f"layers.{i}.weight", "numel": 64, "v_norm": 0.1, "weight_norm": 4.0, "distance": 0.2 + i}
            for i in range(3)
        ],
    }
    run = make("a", audit=audit_of(30), evaluation=evaluation, layers=layers)
    page, text, rows = reported(tmp_path / "report", run)
    walk = Walk(page)
    told = (
        "Forgot 5 samples of 2 people", "4 of 60", "renormalize", "3,203-206",  # what was asked
        "LMCleaner, GGN, K=all", "all steps", "deepspeed", "joint: one vector for all", "retrain",  # what was done
        "0.250", "1.250", "0.9000", "41.5", "12.0",  # the methods
        "sample-29", "× 7.8", "The 20 of 30 records",  # audit
        "truth_ratio", "0.51 [0.4, 0.6]", "layers.2.weight", "2.200",  # evaluation, parameters
        "2.13.0", "0123456789abcdef", f"{0:032x}",  # environment
    )  # fmt: skip
    plain = text.replace("\\", "")
    for words in told:
        assert words in walk.text and words in plain, words
    assert "sample-9 " not in plain  # its ‖v‖ is not among the largest
    assert walk.counts["svg"] == 4 and "rel_error 0.25 at 41.5" in walk.alts[0]
    assert [row["method"] for row in rows] == ["do_nothing", "tim", "ggn", "replay", "retrain"]
    assert float(rows[2]["rel_error"]) == 0.25 and rows[2]["run"] == run and rows[2]["world_size"] == "2"
    # Nothing of it depends on when or how often it is written.
    config = Config(report=ReportConfig(runs=run, output=str(tmp_path / "report")))
    with pytest.raises(LmcError, match="not empty"):
        report(config)
    assert "1 run in 1 group" in report(replace(config, overwrite=True))
    assert (tmp_path / "report" / "report.html").read_text() == page
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.csv", "report.html", "report.md"]


def test_runs_of_other_seeds_are_put_together(make: Callable[..., str], tmp_path: Path) -> None:
    other = result_of(7)
    other["config"]["unlearn"]["hessian_mode"] = "exact"
    seeds = [make(f"seed-{seed}", result_of(seed, 0.1 * seed)) for seed in range(3)]
    runs = [*seeds, make("exact", other)]
    page, text, rows = reported(tmp_path / "report", *runs)
    walk = Walk(page)
    for found in (walk.text, text.replace("\\", "")):
        assert "0.350 ± 0.100" in found and "mean ± s.d. over 3 runs" in found
        assert "Overview" in found and "seed-2 (seed 2, data seed 0)" in found
    assert [row["group"] for row in rows] == ["1"] * 15 + ["2"] * 5
    # Logs of the same seeds differ in something else.
    again = result_of(1)
    again["log_fingerprint"] = "f" * 32
    groups = group_runs(read_runs([*seeds, make("again", again)]))
    assert [len(group.runs) for group in groups] == [1, 1, 1, 1]


def test_numbers_may_be_missing(make: Callable[..., str], tmp_path: Path) -> None:
    result, audit = result_of(), audit_of(2)
    result["rows"] = [dict.fromkeys(row, None) | {"method": row["method"]} for row in result["rows"]]
    result["rows"][1] |= {"rel_error": math.nan, "loss_forget": math.inf, "gradients": 10**400, "seconds": 1e300}
    result |= {"rel_error": math.nan, "seconds_unlearn": None, "v_norm": math.inf, "versions": None, "replay": {}}
    audit[0] |= {"v_norm": math.nan, "v0_norm": None, "growth_max": math.inf, "K_used": None}
    audit[1] = {"unit": None}
    bare = {"rows": [], "units": {"undone": ["sample-3"]}}  # as after --undo, or nearly nothing
    layers = {"layers": [{"name": "w", "v_norm": math.nan, "distance": None}, {}]}
    runs = [make("gaps", result, audit, layers=layers, evaluation={"models": None}), make("bare", bare, [])]
    page, text, rows = reported(tmp_path / "report", *runs)
    walk = Walk(page)
    assert "without sample-3 there is no reference" in walk.text and "sample-3" in text
    assert rows[1]["rel_error"] == rows[1]["gradients"] == rows[1]["seconds"] == ""
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(walk.words))


def test_what_files_say_is_only_text(make: Callable[..., str], tmp_path: Path) -> None:
    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoilt(part) for key, part in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [spoilt(part) for part in value]
        return HOSTILE if isinstance(value, str) else value

    result = spoilt(deepcopy(result_of()))
    for i, row in enumerate(result["rows"]):
        row |= {"method": f"=m{i}\u0000|", "label": f"{HOSTILE}\n{i}"}
    evaluation = {"models": {HOSTILE: {HOSTILE: {"value": 1.0, "low": None, "high": None}}}}
    layers = {"layers": [{"name": HOSTILE, "v_norm": 0.5, "distance": 0.5}] * 2}
    page, text, rows = reported(
        tmp_path / "r", make("a", result, spoilt(audit_of(3)), evaluation=evaluation, layers=layers)
    )
    walk = Walk(page)  # no script, no link, balanced
    assert walk.text.count("<script>") > 10 and walk.counts["svg"] == 4
    assert "<script>" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    for lines in tables:  # no cell opens another
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert rows[0]["method"].startswith("'=m0")


def test_broken_runs_are_named(make: Callable[..., str], tmp_path: Path) -> None:
    def refused(runs: list[str], match: str) -> None:
        config = Config(report=ReportConfig(runs=",".join(runs), output=str(tmp_path / "report")))
        with pytest.raises(LmcError, match=match) as found:
            report(config)
        assert not runs or runs[-1] in str(found.value)
        assert not (tmp_path / "report").exists()

    good = make("good")
    refused([], "say which runs")
    (tmp_path / "file").write_text("")
    with pytest.raises(LmcError, match="is a file"):
        report(Config(report=ReportConfig(runs=good, output=str(tmp_path / "file"))))
    refused([good, good], "twice")
    refused([good, str(tmp_path)], "no finished unlearning run")
    refused([good, make("list", [])], "lacks the rows")
    refused([good, make("rows", {"rows": [3]})], "lacks the rows")
    refused([good, make("nameless", {"rows": [{"label": "x"}]})], "does not name its method")
    refused([good, make("audit", audit={})], "audit_records.json is damaged")
    refused([good, make("layers", layers=[])], "layers.json is damaged")
    cut = make("cut")
    (Path(cut) / "result.json").write_text('{"rows": [')
    refused([good, cut], "is damaged")
    (Path(cut) / "result.json").write_bytes(b"\xff\xfe")
    refused([good, cut], "is damaged")
    (Path(cut) / "result.json").write_text("[" * 10**5)
    refused([good, cut], "cannot be read")
    (Path(cut) / "result.json").write_text("1" * 5000)  # more digits than Python takes
    refused([good, cut], "cannot be read")
    bare = make("no-audit")
    (Path(bare) / "audit" / "audit_records.json").unlink()
    refused([good, bare], "is missing")


def test_the_command(make: Callable[..., str], tmp_path: Path) -> None:
    runs = [make("a"), make("b", result_of(1))]
    config = parse("report", [*runs, "--output", str(tmp_path / "out"), "--overwrite", "true"])
    assert config.report == ReportConfig(",".join(runs), str(tmp_path / "out")) and config.overwrite
    command = [str(BIN / "lmc"), "report"]
    done = subprocess.run(
        [*command, *runs, "--output", "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and "2 runs in 1 group: out/report.html" in done.stdout
    loaded = "import sys, lmc_dist.cli; print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- sweeps ------------------------------------------------------------------------------------------------------------------


def cell_of(method: str, seed: int, error: float | None, split: str = "forget01", **changes: Any) -> dict[str, Any]:
    """A row of sweep.json."""
    shift = 0.01 * seed
    metric = {"value": 0.3 + shift, "retrain": 0.25, "distance": 0.05 + shift}
    names = ("forget.probability", "auc.loss", "forget_quality.ks_statistic", "retain.probability")
    row: dict[str, Any] = {
        "name": f"{split}-seed{seed}-{method}",
        "method": method,
        "label": {"lmcleaner": "LMCleaner, GGN, K=all", "do_nothing": "do nothing"}.get(method, method),
        "split": split,
        "seed": seed,
        "data_seed": 0,
        "model": "model",
        "hessian_mode": "GGN" if method == "lmcleaner" else None,
        "replay_head": 0 if method == "lmcleaner" else None,
        "rel_error": None if error is None else error + shift,
        "loss_forget": 3.0 + shift,
        "loss_retain": 2.5,
        "gradients": 60.0,
        "seconds": 4.0,
        "v_norm": 0.1,
        "growth_max": 1.01,
        "metrics": dict.fromkeys(names, metric),
        "failure": None,
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
        "request": {"samples": 40, "steps": 30, "num_steps": 60, "counterfactual": "renormalize"},
        "settings": {"data": {"source": "tofu", "rows": "0:400"}, "train": {"optimizer": "sgd", "engine": "ddp"}},
    }
    return row | changes


def sweep_of() -> list[dict[str, Any]]:
    errors = {"do_nothing": 1.0, "npo": 1.2, "tim": 0.8, "lmcleaner": 0.3, "replay": 0.0, "retrain": 0.0}
    rows = [cell_of(method, seed, error) for seed in range(3) for method, error in errors.items()]
    head = {"label": "LMCleaner, GGN, K=all, head 10", "replay_head": 10}
    rows += [cell_of("lmcleaner", seed, 0.2, **head) for seed in range(3)]
    failure = {"failure": {"reason": "the correction diverged", "log": "output.txt"}}
    return [*rows, cell_of("lmcleaner", 0, None, "forget10", **failure), cell_of("do_nothing", 0, 1.0, "forget10")]


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Any = None, name: str = "sweep", **more: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        content = {
            "cells": sweep_of() if rows is None else rows,
            "files": [{"path": "a.yaml", "content": {"method": "grid"}}],
        }
        (folder / "sweep.json").write_text(json.dumps(content | more))
        return str(folder)

    return write


def test_a_sweep_is_told(make: Callable[..., str], make_sweep: Callable[..., str], tmp_path: Path) -> None:
    folder = make_sweep(dropped=[{"parameters": {"unlearn.K": 5}, "same_as": "forget01-seed0-replay"}])
    page, text, rows = reported(tmp_path / "report", folder, make("a"))
    walk = Walk(page)
    told = (
        "Sweep: forgot forget01", "Sweep: forgot forget10", "Forgot 5 samples of 2 people",  # and a run beside it
        "LMCleaner, GGN, K=all, head 10, rel_error 0.210 ± 0.010 at 60.0 gradients",  # the closest
        "1 of 4 did harm", "0.310 ± 0.010", "mean ± s.d. over seeds: 0 is the aim", "0.060 ± 0.010",
        "30 of 60", "sgd", "Cells that failed", "the correction diverged", "Cells left out", "2.13.0",
    )  # fmt: skip
    plain = text.replace("\\", "")
    for words in told:
        assert words in walk.text and words in plain, words
    assert "lower is better" not in walk.text.replace("lower and further left is better", "")
    assert walk.counts["svg"] == 2 + 2 and "GGN, K=all: 0.31 at 60" in walk.alts[0]
    assert sum(row["group"].endswith(": forget01") for row in rows) == 21 and rows[-1]["method"] == "do_nothing"


def test_a_sweep_may_hold_anything(make_sweep: Callable[..., str], tmp_path: Path) -> None:
    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoilt(part) if key != "method" else part for key, part in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [spoilt(part) for part in value]
        return HOSTILE if isinstance(value, str) else value

    bad = {"rel_error": 10**400, "seconds": math.nan, "metrics": [3], "seed": "x", "versions": 3, "request": None}
    rows = [
        *spoilt(sweep_of()),
        cell_of("ga", 0, 0.5) | bad,
        cell_of("npo", 1, None, metrics={"auc.loss": {"value": []}}),
    ]
    page, text, _ = reported(tmp_path / "report", make_sweep(rows, dropped=[3, {}], files=3))
    walk = Walk(page)
    assert walk.text.count("<script>") > 5 and "<script>" not in text
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(walk.words))
    for i, content in enumerate(([], [3], [{"method": "ga"}], [cell_of("nonsense", 0, 0.1)])):
        config = Config(report=ReportConfig(runs=make_sweep(content, f"bad-{i}"), output=str(tmp_path / "none")))
        with pytest.raises(LmcError, match=r"sweep\.json is not of a sweep"):
            report(config)


def test_distances_by_parameter(tmp_path: Path) -> None:
    """From shards of two ranks, against whole vectors."""
    params = (ParamSpec("a.weight", (5, 3)), ParamSpec("b.bias", (7,)), ParamSpec("still", (2,)))
    torch.manual_seed(0)
    whole = {kind: {p.name: torch.randn(p.shape) for p in params} for kind in ("v", "theta", "reference")}
    whole["v"]["still"].zero_()
    whole["reference"]["still"] = whole["theta"]["still"].clone()
    for rank in range(2):
        layout = ShardLayout(params, rank, 2)
        shards = {kind: ShardedVector.from_full(layout, full.__getitem__) for kind, full in whole.items()}
        Correction(shards["v"], (), 0.0).save(tmp_path / "correction")
        for kind in ("theta", "reference"):
            write_snapshot(tmp_path / kind, shards[kind])
    rows, error = layer_distances(params, tmp_path / "correction", tmp_path / "theta", tmp_path / "reference")
    for row in rows:
        v, theta, reference = (whole[kind][row["name"]] for kind in ("v", "theta", "reference"))
        assert row["v_norm"] == pytest.approx(float(v.norm()), rel=1e-6)
        assert row["weight_norm"] == pytest.approx(float(theta.norm()), rel=1e-6)
        moved = float((theta - reference).norm())
        expected = float((theta + v - reference).norm()) / moved if moved else None
        assert row["distance"] == (None if expected is None else pytest.approx(expected, rel=1e-6))
    v, theta, reference = (torch.cat([x.flatten() for x in whole[k].values()]) for k in ("v", "theta", "reference"))
    assert error == pytest.approx(float((theta + v - reference).norm() / (theta - reference).norm()), rel=1e-6)
    rows, error = layer_distances(params, tmp_path / "correction", tmp_path / "theta", None)
    assert error is None and [row["distance"] for row in rows] == [None, None, None]


def write_snapshot(folder: Path, vector: ShardedVector) -> None:
    """One rank's file, as a snapshot has it."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {f"theta/{name}": shard.clone() for name, shard in vector.items() if shard.numel()}
    places = {key: {OFFSETS: [vector.layout.slots[key.split("/", 1)[1]].start]} for key in tensors}
    save_file(tensors, folder / snapshot_file(vector.layout.rank), metadata={SHARDING_INFO: json.dumps(places)})
