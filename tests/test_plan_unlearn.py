"""lmc plan unlearn: costs against sums written out, against what corrections report and against live tensors."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import model_config
from conftest import REPO
from measure import live_peak
from test_zero3 import small_config, this_runtime, train_job

from lmc_dist.config import Config, ForgetConfig, PlanUnlearnConfig
from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.planner.facts import Edit, LogFacts, ModelFacts, Pass, RequestFacts, busiest, model_facts
from lmc_dist.planner.hardware import HARDWARE
from lmc_dist.planner.machine import Measured, Projected
from lmc_dist.planner.memory import fits_in, largest_block, largest_step, sweep_peak
from lmc_dist.planner.recommendation import recommend
from lmc_dist.planner.strategies import Measurement, Options, Strategy, plan
from lmc_dist.planner.work import gradient_work, product_work, training_work
from lmc_dist.shards.fingerprint import parameter_table
from lmc_dist.shards.gather import count_traffic
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.record import MicroRecord, StepLog, StepRecord, TrajectoryManifest
from lmc_dist.unlearn.correction import compute_correction
from lmc_dist.unlearn.plan import gradients_per_step

# --- costs, pure -------------------------------------------------------------------------------------------------------

STEPS, TOKENS = 10, 40  # two passes of two samples of 10 tokens
PASSES = (Pass(2, 10), Pass(2, 10))
MACHINE = Measured(
    world_size=1,
    tokens=TOKENS,
    gradient_seconds=1.0,
    products={"GGN": (2.0, 1.5), "exact": (4.0, 3.0)},
    step_seconds=0.8,
    step_tokens=TOKENS,
    start_seconds=5.0,
    follow_seconds=0.1,
    tangent_seconds=0.01,
    snapshot_seconds=0.3,
    read_bandwidth=None,
    memory=1e12,
)


def a_model() -> ModelFacts:
    return model_facts(build_skeleton(model_config("llama-untied")))


def a_log(**changes: Any) -> LogFacts:
    given = {
        "engine": "deepspeed-zero3",
        "passes": (PASSES,) * STEPS,
        "applied": (True,) * STEPS,
        "snapshots": (0, 4, 10),
    }
    return LogFacts(a_model(), **{**given, "step_bytes": 100, "snapshot_bytes": 7, **changes})


def edit(*units: int, skipped: bool = False) -> Edit:
    return Edit(skipped, (PASSES[0], Pass(1, 10)), (Pass(1, 10),), units)


def by_name(strategies: list[Strategy]) -> dict[str, Strategy]:
    return {s.name: s for s in strategies}


def test_costs_are_the_sums_that_the_document_writes_out() -> None:
    request = RequestFacts("renormalize", 3, {5: edit(1), 7: edit(2, 3)})  # a sample in step 5, two in step 7
    options = Options(head=3, K=1, block=2)
    found = by_name(plan(request, a_log(), MACHINE, options))
    follow, sources = 6 * 0.1 + 0.3, 2 * 0.25  # from snapshot 4; a source has 10 of 40 tokens
    ggn = found["ggn"]  # products at 6, 7, 8, 9, of which 7 has 30 tokens left
    assert ggn.seconds == pytest.approx(follow + sources + 2.0 * 3.75 + 0.01 * 4)
    assert ggn.gradients == pytest.approx(2 * 0.25 + 2.1 * 3.75)
    assert ggn.bytes_read == 6 * 100 + 7 and ggn.rel_error is None and ggn.basis == "unknown"
    assert found["fd"].seconds == pytest.approx(follow + sources + 2 * 3.75 + 0.01 * 4)
    assert found["secant"].gradients == pytest.approx(0.5 + 3.75)
    assert found["tim"].seconds == pytest.approx(follow + sources + 0.01 * 4)
    assert found["3+ggn"].seconds == pytest.approx(follow + sources + 1.75 + 2.0 * 2 + 0.01 * 4)  # 5 to 7 replayed
    assert found["ggn K=1"].seconds == pytest.approx(follow + sources + 2.0 * 2 + 0.01 * 2)  # at 6 and at 8
    # Per sample, two at once: {1, 2} walks from snapshot 4, {3} too; at 8 and 9 the first block has two vectors.
    units = found["ggn per sample"]
    first = follow + sources + 2.0 * 1.75 + 3.5 * 2 + 0.01 * (2 + 4)
    assert units.seconds == pytest.approx(first + follow + sources + 2.0 * 2 + 0.01 * 2)
    assert units.settings["block"] == 2 and units.bytes_read == 2 * 607
    assert found["replay"].seconds == pytest.approx(5.0 + 0.3 + 6 * 0.8)
    assert found["retrain"].seconds == pytest.approx(5.0 + 10 * 0.8)
    assert found["replay"].rel_error == found["retrain"].rel_error == 0
    names = [s.name for s in plan(request, a_log(), MACHINE, options)]
    assert names.index("tim") < names.index("ggn") < names.index("exact")  # by seconds


def test_optimizers_with_state_and_skipped_steps() -> None:
    request = RequestFacts("skip", 1, {4: edit(4, skipped=True)})
    adam = a_log(state=("exp_avg", "exp_avg_sq"))
    found = by_name(plan(request, adam, MACHINE))
    assert found["tim"].gradients == 6 and found["tim"].parts["gradients of the path"] == 6.0  # no source
    assert found["replay"].gradients == 9  # from snapshot 0: step 4 itself certifies nothing
    logged = by_name(plan(request, replace(adam, logs_gradients=True, gradient_bytes=50), MACHINE))
    assert logged["tim"].gradients == 0 and logged["tim"].bytes_read == 6 * 150 + 7
    coarse = by_name(plan(request, a_log(is_coarse=True), MACHINE))
    assert coarse["secant"].gradients == 2 * 5  # ∇L(θ) as well, at each of the steps 5 to 9


def test_groups_of_ranks_share_units() -> None:
    request = RequestFacts("renormalize", 4, {5: edit(1, 2), 7: edit(3, 4)})
    log, hardware = a_log(passes=((Pass(1, 10),) * 8,) * STEPS), HARDWARE["h100"]
    # Eight passes a step leave 56 of 64 ranks idle; groups of a node each have them all busy, and keep to its links.
    alone = by_name(plan(request, log, Projected(64, log, 10, hardware), Options(block=1)))["ggn per sample"]
    shared = by_name(plan(request, log, Projected(64, log, 10, hardware), Options(block=1, groups=8)))["ggn per sample"]
    assert shared.gradients == alone.gradients and shared.parts["products"] < 0.5 * alone.parts["products"]
    assert shared.settings["unit_groups"] == 8 and (shared.host_bytes or 0) > (alone.host_bytes or 0)


def test_passes_are_dealt_out_and_never_cut() -> None:
    passes = (Pass(2, 10), Pass(1, 8), Pass(2, 6))
    assert [busiest(passes, ranks) for ranks in (1, 2, 3, 64)] == [40, 32, 20, 20]
    assert gradients_per_step(HVPConfig("secant"), 3) == 3.0
    assert gradients_per_step(HVPConfig("GGN"), 1) == 2.1
    assert gradients_per_step(HVPConfig("GGN"), 8) == pytest.approx(8 * 1.5)
    assert gradients_per_step(HVPConfig("GGN"), 0) == 0


def test_recommendation() -> None:
    request = RequestFacts("renormalize", 1, {8: edit(1)})
    machine = replace(MACHINE, start_seconds=50.0)
    unknown = plan(request, a_log(), machine)
    chosen, text = recommend(unknown, None)
    assert chosen is not None and chosen.name == "replay"
    assert "the only one with known error 0" in text and "the cheapest is tim" in text and text.count(".") >= 1
    known = {"ggn": Measurement((0.2, 0.4)), "exact": Measurement((0.02, 0.02))}
    measured = plan(request, a_log(), machine, Options(max_error=0.1), known)
    assert by_name(measured)["ggn"].rel_error == pytest.approx(0.3)
    assert by_name(measured)["exact"].basis == "measured on 2 control deletions of this log"
    names = {limit: recommend(measured, limit)[0].name for limit in (0.5, 0.1, 0.01)}  # type: ignore[union-attr]
    assert names == {0.5: "ggn", 0.1: "exact", 0.01: "replay"}
    stuck = plan(request, a_log(no_sweep="storage 'replay'"), machine)
    assert by_name(stuck)["ggn"].obstacle == "storage 'replay'" and recommend(stuck, 0.5)[0].name == "replay"  # type: ignore[union-attr]
    small = plan(request, a_log(), replace(machine, memory=1.0))
    assert recommend(small, None)[0] is None and "GiB" in recommend(small, None)[1]


# --- work and memory against the engine --------------------------------------------------------------------------------


def test_work_is_what_the_passes_do() -> None:
    skeleton = build_skeleton(model_config("llama-tied"))
    facts, layout = model_facts(skeleton), ShardLayout.of_module(skeleton)
    module, theta = ShardedModule(skeleton, layout), ShardedVector.zeros(layout)
    ids = torch.randint(0, 29, (2, 8))
    micros = [MicroBatch({"input_ids": ids}, ids, torch.ones(2))]
    for mode in ("gradient", "GGN", "exact", "fd"):
        for m in (1, 3) if mode != "gradient" else (0,):
            v = [theta + theta.like(torch.ones_like(theta.flat)) for _ in range(m)]
            with count_traffic() as traffic:
                if m:
                    hvp_apply(v, HVPConfig(mode), module, TokenCrossEntropy(), theta, micros)
                else:
                    weighted_gradient(module, TokenCrossEntropy(), theta, micros)
            work = product_work(facts, mode, m, 8) if m else gradient_work(facts, 8)
            assert (traffic.gathered, traffic.reduced) == (work.gathered, work.reduced)
    gradient = training_work(facts, 8).flops
    assert product_work(facts, "GGN", 1, 8).flops / gradient == pytest.approx(2.0)
    assert product_work(facts, "GGN", 1000, 8).flops / 1000 / gradient == pytest.approx(8 / 6, rel=1e-3)
    assert product_work(facts, "exact", 1, 8).flops / gradient == pytest.approx(22 / 6)


SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SAMPLES, LENGTH = 4, 64  # of a rank


def memory_job() -> list[tuple[str, int, float, float]]:
    """(mode, deviations, measured, predicted) peaks of whole sweeps over three steps in memory, on this rank."""
    from transformers import LlamaConfig

    skeleton = build_skeleton(LlamaConfig(**SHAPE))
    layout, ranks = ShardLayout.of_module(skeleton), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 1024, (8 * ranks, LENGTH), generator=generator).tolist()
    items = [{"index": i, "input_ids": row, "labels": row} for i, row in enumerate(tokens)]
    batches, module = DatasetBatches(SampleDataset(items, 0)), ShardedModule(skeleton, layout)
    group = {"lr": 0.01, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    table = [{**row, "group": 0} for row in parameter_table(skeleton)]
    manifest = TrajectoryManifest(
        {}, "", table, {"class": "SGD", "groups": [group]}, "global_token_mean", 0.0, None, ranks, "single", "update", None, None
    )  # fmt: skip
    theta = ShardedVector.zeros(layout)
    for _, shard in theta.items():
        shard.normal_(std=0.02, generator=generator)
    log, denominator = StepLog(manifest, theta), float(SAMPLES * ranks * (LENGTH - 1))
    for step in range(4):  # sample 1 is in steps 0 and 2: at step 3 there are two deviations with K
        first = (step % 2) * SAMPLES * ranks
        micros = tuple(
            MicroRecord(rank, 0, tuple(range(first + rank * SAMPLES, first + (rank + 1) * SAMPLES)), denominator)
            for rank in range(ranks)
        )
        log.append(StepRecord(step, step, micros, (0.01,), denominator), log.theta(step) * 1.0001)
    facts = LogFacts(model_facts(skeleton), "single", ((Pass(SAMPLES, LENGTH),) * ranks,) * 4, (True,) * 4, (0,))
    found = []
    for mode, K in (("none", None), ("GGN", None), ("exact", 9), ("secant", None)):
        request, m = Counterfactual("renormalize", sample_ids=frozenset([1])), 1 if K is None else 2
        measured = live_peak(lambda: compute_correction(log, module, batches, request, HVPConfig(mode), K))  # noqa: B023
        passes = largest_step(facts, ranks)
        predicted = sweep_peak(facts, mode, m, passes, ranks, Options(), 2, K is not None).together
        found.append((mode, m, float(measured), predicted))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_predicted_peaks_are_those_of_live_tensors(ranks: Any, world_size: int) -> None:
    for mode, m, measured, predicted in ranks(world_size).run(memory_job)[0]:
        assert predicted == pytest.approx(measured, rel=0.2), f"{mode}, {m} deviations: {predicted / measured:.2f}"


def test_largest_block_is_the_last_that_fits() -> None:
    log, passes = a_log(), largest_step(a_log(), 2)
    one = sweep_peak(log, "GGN", 1, passes, 2, Options())
    assert largest_block(log, "GGN", 2, Options(), one.together - 1) == 0
    for memory, host in ((20 * one.together, None), (20 * one.work, 9 * one.host)):
        m = largest_block(log, "GGN", 2, Options(), memory, host)
        assert m > 1
        assert fits_in(sweep_peak(log, "GGN", m, passes, 2, Options()), memory, host)
        assert not fits_in(sweep_peak(log, "GGN", m + 1, passes, 2, Options()), memory, host)


# --- the command -------------------------------------------------------------------------------------------------------


def plan_job(config: Config) -> tuple[dict[str, Any], str]:
    from lmc_dist.log_commands.plan_unlearn import plan_unlearn

    text = plan_unlearn(config, this_runtime())
    dist.barrier()
    return json.loads(Path(str(config.json)).read_text()), text


def reported_job(config: Config) -> dict[str, float]:
    """Gradients that corrections report, by strategy."""
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.training import read_request

    run = open_logged_run(config, this_runtime())
    request = read_request(config, run.dataset)
    assert request is not None
    found = {}
    for name, mode, head in (("tim", "none", 0), ("ggn", "GGN", 0), ("secant", "secant", 0), ("2+ggn", "GGN", 2)):
        config_of = HVPConfig(mode)
        correction = compute_correction(run.log, run.module, run.batches, request, config_of, replay_head=head)
        found[name] = correction.gradients_equivalent
    return found


def refusal_job(config: Config) -> str:
    with pytest.raises(LmcError) as caught:
        plan_job(config)
    return str(caught.value)


@pytest.fixture(scope="module")
def logged(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("planned")
    config = replace(small_config(folder, learning_rate=0.05), json=str(folder / "plan.json"))
    ranks(2).run(train_job, config)
    asked = PlanUnlearnConfig(calibrate=1.0, head=2, candidates="ggn,exact,2+ggn")
    return replace(config, plan_unlearn=asked)


@pytest.mark.slow
def test_plan_of_a_log_and_what_controls_add(ranks: Any, logged: Config) -> None:
    config = replace(logged, forget=ForgetConfig(samples="1,103"))
    pool = ranks(2)
    found, text = pool.run(plan_job, config)[0]
    assert found["machine"]["kind"] == "measured" and found["machine"]["world_size"] == 2
    planned = {row["name"]: row for row in found["strategies"]}
    assert {"tim", "ggn", "exact", "fd", "secant", "fisher", "diag", "low_rank", "2+ggn", "replay", "retrain"} <= set(
        planned
    )
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in planned.values())
    assert planned["ggn"]["basis"] == "unknown" and "replay" in text.splitlines()[-1]
    for name, gradients in pool.run(reported_job, config)[0].items():
        assert planned[name]["gradients"] == pytest.approx(gradients, rel=0.1), name  # tokens stand for samples

    asked = replace(config.plan_unlearn, controls=2, max_error=0.9)
    found, text = pool.run(plan_job, replace(config, plan_unlearn=asked))[0]
    kept = json.loads((Path(config.log_dir) / "controls.json").read_text())
    assert len(kept["rows"]) == 2 and all(row["size"] == 2 for row in kept["rows"])
    assert not {i for row in kept["rows"] for i in row["forgotten"]} & {1, 103}
    errors = [row["strategies"]["exact"]["rel_error"] for row in kept["rows"]]
    later, text = pool.run(plan_job, config)[0]  # without measuring again
    exact = next(row for row in later["strategies"] if row["name"] == "exact")
    assert exact["rel_error"] == pytest.approx(sum(errors) / 2) and 0 < exact["rel_error"] < 1
    assert "measured on 2 control deletions of this log" in text

    batch, _ = pool.run(plan_job, replace(config, forget=ForgetConfig(batches="3")))[0]
    assert all(row["rel_error"] in (0, None) for row in batch["strategies"])  # controls were of another kind
    kept["log_fingerprint"] = "0" * 32
    from lmc_dist.trajectory.sealed import write_sealed

    write_sealed(Path(config.log_dir) / "controls.json", {k: v for k, v in kept.items() if k != "digest"})
    other, _ = pool.run(plan_job, config)[0]
    assert all(row["rel_error"] in (0, None) for row in other["strategies"])


@pytest.mark.slow
def test_projection_and_what_is_refused(ranks: Any, logged: Config) -> None:
    config, pool = replace(logged, forget=ForgetConfig(samples="1")), ranks(2)
    asked = PlanUnlearnConfig(hardware="h100", world_size=64)
    found, text = pool.run(plan_job, replace(config, plan_unlearn=asked))[0]
    assert found["machine"]["hardware"] == HARDWARE["h100"].to_json() and "projected to 64 ranks of h100" in text
    refused = {
        "name plan_unlearn.hardware": PlanUnlearnConfig(world_size=64),
        "is not in the table": PlanUnlearnConfig(hardware="abacus"),
        "does not divide": PlanUnlearnConfig(hardware="h100", groups=3),
        "max_error must be": PlanUnlearnConfig(max_error=-1.0),
        "unknown method 'newton'": PlanUnlearnConfig(controls=1, candidates="newton"),
    }
    for message, settings in refused.items():
        assert message in pool.run(refusal_job, replace(config, plan_unlearn=settings))[1]
    assert "say what to forget" in pool.run(refusal_job, logged)[0]


@pytest.mark.parametrize(("shape", "parameters"), [("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496)])
def test_large_shapes_are_planned_without_a_log(shape: str, parameters: int, tmp_path: Path) -> None:
    from lmc_dist.cli import parse
    from lmc_dist.log_commands.plan_unlearn import meta_model, plan_unlearn
    from lmc_dist.runtime import Runtime

    runtime, found = Runtime(0, 1, torch.device("cpu")), {}
    for world in (8, 64):
        file = str(tmp_path / f"{world}.json")
        options = [
            "--config",
            str(REPO / f"configs/shapes/{shape}.yaml"),
            "--plan_unlearn.steps",
            "1000",
            "--json",
            file,
        ]
        config = parse(
            "plan unlearn", [*options, "--world", str(world), "--hardware=h200", "--plan_unlearn.forgotten", "20"]
        )
        assert config.plan_unlearn.world_size == world and config.plan_unlearn.hardware == "h200"
        meta_model(config)  # imports the architecture
        began = time.process_time()
        assert "nothing was run" in plan_unlearn(config, runtime)
        assert time.process_time() - began < 5
        found[world] = json.loads(Path(file).read_text())
    for world, plan_found in found.items():
        assert plan_found["model"]["parameters"] == parameters
        assert plan_found["model"]["shard"] == pytest.approx(parameters / world, rel=1e-3)
    few, many = ({row["name"]: row for row in found[world]["strategies"]} for world in (8, 64))
    for name in ("ggn", "exact", "tim"):
        assert many[name]["host_bytes"] < 0.2 * few[name]["host_bytes"]
        assert many[name]["peak_bytes"] < few[name]["peak_bytes"]
