"""lmc baseline: losses by hand, steps against a dense model, equal on all engines and ranks, and what a run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_engine_logs import engine_config
from test_zero3 import build_for_replay, small_config, this_runtime, train_job
from torch.nn.functional import cross_entropy

from lmc_dist.baselines.losses import ascent_loss, descent_loss, npo_loss
from lmc_dist.baselines.objective import Plan, objective_of
from lmc_dist.cli import parse
from lmc_dist.config import BaselineConfig, Config, ForgetConfig
from lmc_dist.data import collate
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.model_folder import find_model
from lmc_dist.report.collect import group_runs, read_runs
from lmc_dist.trajectory.store import TrajectoryLog

FORGOTTEN = "3,101,204,303"
METHODS = ("retain", "ga", "graddiff", "npo")


# --- losses -------------------------------------------------------------------------------------------------------------

NLL, REFERENCE = (3.25, 0.5, 7.0), (3.0, 0.75, 2.0)


def test_ascent_and_descent_are_token_means() -> None:
    nll = torch.tensor(NLL, dtype=torch.float64)
    assert float(descent_loss(nll, 8)) == 10.75 / 8 and float(ascent_loss(nll, 8)) == -10.75 / 8
    parts = ascent_loss(nll[:1], 8) + ascent_loss(nll[1:], 8) + ascent_loss(nll[:0], 8)
    assert float(parts) == -10.75 / 8


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_npo_is_equation_3_and_its_gradient_equation_5(beta: float) -> None:
    """The second form of Eq. 3, (2/β) E log(1 + (π_θ/π_ref)^β), and W_θ of Eq. 5, from probabilities."""
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)
    loss = npo_loss(nll, torch.tensor(REFERENCE, dtype=torch.float64), beta, 3)
    p, q = [math.exp(-x) for x in NLL], [math.exp(-x) for x in REFERENCE]
    expected = 2 / beta * sum(math.log(1 + (a / b) ** beta) for a, b in zip(p, q, strict=True)) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    weights = [2 * a**beta / (a**beta + b**beta) for a, b in zip(p, q, strict=True)]
    (gradient,) = torch.autograd.grad(loss, nll)
    assert gradient.tolist() == pytest.approx([-w / 3 for w in weights], rel=1e-12)


def test_npo_becomes_gradient_ascent_at_the_reference_and_as_beta_vanishes() -> None:
    """Proposition 1: gradients equal those of the mean over samples of their summed nll, ascended."""
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)
    (ascent,) = torch.autograd.grad(ascent_loss(nll, 3), nll)
    for reference, beta, tolerance in ((NLL, 0.7, 0.0), (REFERENCE, 1e-9, 1e-8)):
        loss = npo_loss(nll, torch.tensor(reference, dtype=torch.float64), beta, 3)
        (gradient,) = torch.autograd.grad(loss, nll)
        assert torch.allclose(gradient, ascent, rtol=tolerance, atol=0)


# --- which samples ------------------------------------------------------------------------------------------------------


def test_plan_pairs_each_forgotten_sample_with_a_retained_one() -> None:
    forget, retain = list(range(100, 107)), list(range(5))
    config = BaselineConfig(method="npo", batch_size=3, epochs=2)
    steps = list(Plan(objective_of(config), forget, retain, config, seed=4))
    assert [len(s.forget) for s in steps] == [len(s.retain) for s in steps] == [3, 3, 1] * 2
    assert sorted(i for s in steps[:3] for i in s.forget) == forget
    beside = [i for s in steps for i in s.retain]
    assert sorted(beside[:5]) == sorted(beside[5:10]) == retain  # whole passes, one after the other
    alone = replace(config, retain_weight=0.0)
    assert not any(s.retain for s in Plan(objective_of(alone), forget, retain, alone, seed=4))
    tuned = BaselineConfig(method="retain", batch_size=2, epochs=1, max_steps=2)
    steps = list(Plan(objective_of(tuned), forget, retain, tuned, seed=4))
    assert len(steps) == 2 and not any(s.forget for s in steps) and {i for s in steps for i in s.retain} <= set(retain)


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A logged run, whose request takes samples out of several steps."""
    config = small_config(tmp_path_factory.mktemp("baselines"))
    ranks(2).run(train_job, config)
    return replace(config, forget=ForgetConfig(samples=FORGOTTEN))


def settings(method: str, **changes: Any) -> BaselineConfig:
    given = {"batch_size": 3, "micro_batch_size": 1, "epochs": 2, "learning_rate": 0.05, "optimizer": "sgd"}
    return BaselineConfig(method=method, **{**given, "weight_decay": 0.0, "max_grad_norm": 0.0, **changes})  # type: ignore[arg-type]


def asked(config: Config, folder: Path, method: str, engine: str = "zero3", **changes: Any) -> Config:
    """A baseline on a log under an engine."""
    train = engine_config(folder, engine).train
    return replace(
        config, train=train, baseline=settings(method, **changes), output_dir=str(folder / method), progress="none"
    )


def baseline_job(configs: list[Config]) -> list[dict[str, Any]]:
    from lmc_dist.baselines.run import baseline

    return [baseline(config, this_runtime()) for config in configs]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].detach().reshape(-1) for name in sorted(weights)]).double()


def dense_job(config: Config) -> dict[str, torch.Tensor]:
    """One step of plain SGD of a dense float64 model, by method, as the weights' change divided by −η."""
    from lmc_dist.training import build_dataset

    dataset = build_dataset(config)[0]
    log = TrajectoryLog(config.log_dir)
    theta = log.theta(log.num_steps)
    model = build_for_replay(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theta[name].view(parameter.shape))
    forget = [3, 101, 204, 303]
    kept = sorted({i for r in log.records() for i in r.sample_ids} - set(forget))
    found = {}
    for method in METHODS:
        baseline = settings(method, batch_size=4, max_steps=1, beta=0.3, retain_weight=0.5)
        step = next(iter(Plan(objective_of(baseline), forget, kept, baseline, config.train.seed)))

        def nll(ids: list[int]) -> tuple[torch.Tensor, int]:
            batch = collate(dataset.by_id(ids), dataset.pad_token_id)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
            return losses.sum(-1), int((labels != -100).sum())

        loss = torch.zeros((), dtype=torch.float64)
        if method in ("ga", "graddiff"):
            values, count = nll(step.forget)
            loss = loss - values.sum() / count
        if method == "npo":
            values, _ = nll(step.forget)
            log_ratio = -(values - values.detach())
            loss = loss - 2 / 0.3 * torch.log(torch.sigmoid(-0.3 * log_ratio)).mean()
        if method in ("retain", "graddiff", "npo"):
            values, count = nll(step.retain)
            loss = loss + (1.0 if method == "retain" else 0.5) * values.sum() / count
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found[method] = flat(dict(zip(dict(model.named_parameters()), gradients, strict=True)))
    return found


def test_one_step_is_that_of_a_dense_model(ranks: Any, trained: Config, tmp_path: Path) -> None:
    changes = {"batch_size": 4, "max_steps": 1, "beta": 0.3, "retain_weight": 0.5, "schedule": "constant"}
    configs = [asked(trained, tmp_path, method, **changes) for method in METHODS]
    results = ranks(2).run(baseline_job, configs)[0]
    expected = ranks(1).run(dense_job, trained)[0]
    log = TrajectoryLog(trained.log_dir)
    theta = log.theta(log.num_steps)
    start = {name: theta[name].view(slot.spec.shape) for name, slot in log.layout.slots.items()}
    for config, result in zip(configs, results, strict=True):
        method = config.baseline.method
        moved = (flat(weights_of(Path(config.output_dir))) - flat(start)) / -0.05
        # float32 weights, whose change is a hundredth of them
        assert float((moved - expected[method]).norm() / expected[method].norm()) < 1e-4, method
        assert result["baseline"]["steps"] == 1
    # 4 samples of forgetting, 4 beside; NPO looks at its 4 once more
    costs = {c.baseline.method: r["gradients_equivalent"] * 6 for c, r in zip(configs, results, strict=True)}
    assert costs == pytest.approx({"retain": 4, "ga": 4, "graddiff": 8, "npo": 8 + 4 / 3})


PLACES = [("zero3", 1), ("zero2", 2), ("fsdp2", 2), ("ddp", 2), ("single", 1)]


def test_results_do_not_depend_on_engine_and_ranks(ranks: Any, trained: Config, tmp_path: Path) -> None:
    """Float32, momentum-free SGD with clipping and accumulation: weights to 1e-6."""
    changes = {"max_grad_norm": 1.0, "warmup_steps": 1}

    def run(engine: str, world_size: int) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        folder = tmp_path / f"{engine}-{world_size}"
        configs = [asked(trained, folder, method, engine, **changes) for method in METHODS]
        results = ranks(world_size).run(baseline_job, configs)[0]
        return {
            c.baseline.method: (flat(weights_of(Path(c.output_dir))), r) for c, r in zip(configs, results, strict=True)
        }

    expected = run("zero3", 2)
    for engine, world_size in PLACES:
        for method, (weights, result) in run(engine, world_size).items():
            gold, reference = expected[method]
            assert float((weights - gold).norm() / gold.norm()) <= 1e-6, (engine, world_size, method)
            assert result["baseline"]["losses"] == pytest.approx(reference["baseline"]["losses"], rel=1e-4)
            for row, other in zip(result["rows"], reference["rows"], strict=True):
                assert row["loss_forget"] == pytest.approx(other["loss_forget"], rel=1e-5)


def unlearn_job(config: Config) -> dict[str, Any]:
    from lmc_dist.unlearn.run import unlearn

    return unlearn(config, this_runtime())


@pytest.fixture(scope="module")
def retrained(ranks: Any, trained: Config) -> Path:
    """The log of the retrain, made by the training command."""
    folder = Path(trained.log_dir).with_name("retrained")
    ranks(2).run(train_job, replace(trained, log_dir=str(folder)))
    return folder


def test_output_is_that_of_unlearning_and_a_start_adds_up(
    ranks: Any, trained: Config, retrained: Path, tmp_path: Path
) -> None:
    unlearned = replace(trained, output_dir=str(tmp_path / "unlearned"), reference=str(retrained), progress="none")
    first = ranks(2).run(unlearn_job, unlearned)[0]
    replayed = replace(unlearned, output_dir=str(tmp_path / "replayed"), reference="replay")
    again = ranks(2).run(unlearn_job, replayed)[0]
    # a retrain's log, and a replay, are one and the same reference
    assert first["rel_error"] == pytest.approx(again["rel_error"], rel=1e-3)
    assert first["rows"][-1]["method"] == "retrain" and first["rows"][-1]["rel_error"] == 0
    control = replace(asked(trained, tmp_path / "control", "retain", max_steps=3), reference=str(retrained))
    after = replace(
        asked(trained, tmp_path / "after", "retain", max_steps=3, start=unlearned.output_dir), reference=str(retrained)
    )
    alone, tuned = ranks(2).run(baseline_job, [control, after])[0]
    assert [row["method"] for row in alone["rows"]] == ["do_nothing", "retain", "retrain"]
    assert [row["method"] for row in tuned["rows"]] == ["do_nothing", "start", "retain", "retrain"]
    start = tuned["rows"][1]
    assert start["rel_error"] == pytest.approx(first["rel_error"], rel=1e-4)
    assert tuned["gradients_equivalent"] == first["gradients_equivalent"] + alone["gradients_equivalent"]
    assert tuned["rows"][2]["label"] == "retain fine-tuning after LMCleaner, GGN, K=all"
    assert tuned["baseline"]["seconds"] < tuned["seconds_unlearn"]
    folder = Path(after.output_dir)
    assert {p.name for p in folder.iterdir()} == {"model", "correction", "audit", "result.json"}
    assert json.loads((folder / "result.json").read_text())["rows"] == tuned["rows"]
    assert find_model(folder).path == folder / "model"
    # v in the output is the whole way from the end of the log
    log = TrajectoryLog(trained.log_dir)
    from lmc_dist.unlearn.correction import load_correction

    theta = log.theta(log.num_steps)
    moved = theta + load_correction(folder / "correction", log.layout, theta)
    stored = weights_of(folder)
    assert all(torch.allclose(moved[n].view(p.shape), p, rtol=0, atol=1e-6) for n, p in stored.items())
    group = group_runs(read_runs([str(folder)]))[0]
    assert group.main is not None and group.main.label == tuned["rows"][2]["label"]
    # a start that answered another question is none
    other = replace(after, forget=ForgetConfig(samples="3"), reference="none", output_dir=str(tmp_path / "other"))
    assert "forgot something else than is asked for here" in ranks(2).run(error_job, other)[1]
    # the same from the model alone, whose way there is not known
    model = replace(
        after, output_dir=str(tmp_path / "model_only"), baseline=replace(after.baseline, start=str(folder / "model"))
    )
    only = ranks(2).run(baseline_job, [model])[0][0]
    assert only["rows"][1]["seconds"] is None and only["gradients_equivalent"] == alone["gradients_equivalent"]


def test_npo_in_16_bits_starts_at_its_reference(ranks: Any, trained: Config, tmp_path: Path) -> None:
    """Its first loss is (2/β) log 2: π_ref is seen through the same engine. And batches can be what is forgotten."""
    changes = {"retain_weight": 0.0, "max_steps": 1, "beta": 2.0, "learning_rate": 1e-3}
    coarse = asked(trained, tmp_path, "npo", "zero3-bf16", **changes)
    batches = replace(
        asked(trained, tmp_path, "ga", "zero3-bf16", max_steps=1),
        forget=ForgetConfig(batches="1", counterfactual="skip"),
    )
    found, whole = ranks(2).run(baseline_job, [coarse, batches])[0]
    assert found["baseline"]["losses"] == [pytest.approx(math.log(2), rel=1e-3)]
    assert whole["request"]["what"] == "1 batches of 7 samples" and whole["baseline"]["samples"] == 3
    assert len(TrajectoryLog(trained.log_dir).record(1).sample_ids) == 7


def error_job(config: Config) -> str:
    """The error of a baseline on this rank; '' if it had none."""
    try:
        baseline_job([config])
    except LmcError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def changed(**changes: Any) -> Callable[[Config], Config]:
    return lambda config: replace(config, baseline=replace(config.baseline, **changes))


BAD: dict[str, tuple[Callable[[Config], Config], str]] = {
    "beta": (changed(beta=0.0), "baseline.beta must be > 0, got 0.0"),
    "weight": (changed(retain_weight=-1.0), "baseline.retain_weight must be ≥ 0"),
    "epochs": (changed(epochs=0), "baseline.epochs must be at least 1, got 0"),
    "schedule": (changed(schedule="sideways"), "baseline.schedule 'sideways' is unknown"),
    "no request": (lambda c: replace(c, forget=ForgetConfig()), "say what to forget"),
    "unknown split": (lambda c: replace(c, forget=ForgetConfig(split="forget99")), "unknown split 'forget99'"),
    "never trained on": (lambda c: replace(c, forget=ForgetConfig(samples="7")), "not in the dataset"),
    "nothing left": (
        lambda c: replace(c, forget=ForgetConfig(samples="0-5,100-105,200-205,300-305")),
        "all samples are forgotten: nothing is left for the retain term",
    ),
    "no start": (changed(start="/nowhere"), "no model in /nowhere"),
    "not a retrain": (lambda c: replace(c, reference=c.log_dir), "is not the retrain of this request: at step"),
    "no reference": (lambda c: replace(c, reference="/nowhere"), "/nowhere"),
    "single": (lambda c: replace(c, train=replace(c.train, engine="single", deepspeed=None)), "is for one process"),
    "divergence": (
        changed(learning_rate=3e38, retain_weight=1e6),
        "the run has diverged: lower baseline.learning_rate",
    ),
}


def test_bad_input_is_one_error_on_all_ranks_and_leaves_nothing(ranks: Any, trained: Config, tmp_path: Path) -> None:
    for name, (change, message) in BAD.items():
        config = change(asked(trained, tmp_path / name.replace(" ", "-"), "npo"))
        first, second = ranks(2).run(error_job, config)
        assert message in first and first == second, (name, first, second)
        assert not list(Path(config.output_dir).parent.glob("npo*")), name


def test_command_line() -> None:
    options = ["--method", "graddiff", "--start", "runs/x", "--baseline.retain_weight", "2", "--reference", "runs/y"]
    config = parse("baseline", options)
    assert config.baseline == BaselineConfig(method="graddiff", start="runs/x", retain_weight=2.0)
    assert config.reference == "runs/y"
    with pytest.raises(SystemExit):
        parse("baseline", ["--method", "sideways"])
