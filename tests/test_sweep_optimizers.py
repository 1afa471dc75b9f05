"""Corrections of runs by momentum and Adam: equal to retraining where that is linear, else the derivative of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import VOCAB, KeepDouble, model_config
from test_sweep import REQUESTS, Regression, linear_module, manifest, schedule
from torch import nn

from lmc_dist.curvature import HVPConfig, Loss, SquaredError, TokenCrossEntropy
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedMicro, EditedStep, edit_step
from lmc_dist.trajectory.passes import clip_coefficient
from lmc_dist.trajectory.record import MicroRecord, StepLog, StepRecord
from lmc_dist.unlearn.correction import Correction, apply_correction, compute_correction, load_full_correction
from lmc_dist.unlearn.log_curvature import average_curvature


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    module: ShardedModule
    loss: Loss
    batches: BatchSource
    records: list[StepRecord]
    kind: str
    groups: tuple[dict[str, Any], dict[str, Any]]
    max_norm: float = 0.0
    scale: float = 1.0  # of the first weights
    keeps: str = "update"  # storage tier
    max_steps: int | None = None
    state_every: int = 0

    def described(self) -> Any:
        optimizer = {"class": self.kind, "groups": [dict(group) for group in self.groups]}
        return replace(
            manifest(self.module.layout), optimizer=optimizer, max_grad_norm=self.max_norm, storage=self.keeps
        )


@dataclass
class Trained:
    log: StepLog
    theta: ShardedVector
    state: dict[str, ShardedVector]
    step: int


def train(run: Run, counterfactual: Counterfactual | None = None) -> Trained:
    """Training by torch's own optimizer, whose parameters are this rank's shards."""
    layout, described = run.module.layout, run.described()
    generator = torch.Generator().manual_seed(9)
    start = {s.spec.name: torch.randn(s.spec.shape, generator=generator, dtype=torch.float64) for s in layout}
    theta = ShardedVector.from_full(layout, lambda name: run.scale * start[name])
    parameters = {name: nn.Parameter(shard.clone()) for name, shard in theta.items()}
    group_of = {row["name"]: row["group"] for row in described.parameters}
    groups = [
        {"params": [p for name, p in parameters.items() if group_of[name] == i], **settings}
        for i, settings in enumerate(run.groups)
    ]
    optimizer: Any = getattr(torch.optim, run.kind)(groups, lr=1.0)
    log = StepLog(described, theta, max_steps=run.max_steps)

    def state() -> tuple[dict[str, ShardedVector], dict[str, float]]:
        kinds = {k for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and k != "step"}
        vectors = {
            kind: ShardedVector.from_shards(layout, {n: optimizer.state[p][kind] for n, p in parameters.items()})
            for kind in sorted(kinds)
        }
        steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
        return vectors, {"step": steps[0]} if steps else {}

    for record in run.records:
        edited = edit_step(record, counterfactual, "global_token_mean", run.batches.num_targets)
        gradient = None
        if not edited.skipped:
            micros = micros_of(run, edited)
            gradient = weighted_gradient(run.module, run.loss, theta, micros)
            norm = gradient.norm()
            coefficient = clip_coefficient(norm, run.max_norm)
            record = replace(record, grad_norm=norm, clip_coef=coefficient)
            for name, p in parameters.items():
                p.grad = gradient[name] * coefficient
            for group, lr in zip(optimizer.param_groups, record.lr, strict=True):
                group["lr"] = lr
            optimizer.step()
            theta = ShardedVector.from_shards(layout, {name: p.detach() for name, p in parameters.items()})
        kept = run.state_every and (record.step + 1) % run.state_every == 0
        log.append(record, theta, gradient if run.keeps == "gradient" else None, state() if kept else None)
    vectors, scalars = state()
    return Trained(log, theta, vectors, int(scalars.get("step", 0)))


def micros_of(run: Run, edited: EditedStep) -> Any:
    from lmc_dist.unlearn.source import micro_batches

    return micro_batches(edited, run.batches, run.module, "kept")


def correct(run: Run, log: StepLog, request: Counterfactual, config: HVPConfig, K: int | None = None) -> Correction:
    """By the tangents of the optimizer's steps, which the oracles here are of."""
    ways = {"K": K, "loss": run.loss, "update": "tangent"}
    return compute_correction(log, run.module, run.batches, request, config, **ways)


# --- linear: the correction is retraining ----------------------------------------------------------------------------

HUGE = 1e12  # an eps beside which √v is nothing: Adam is then a momentum with bias correction, linear in g

LINEAR: dict[str, tuple[str, float, dict[str, Any]]] = {  # class, what learning rates are multiplied by, settings
    "momentum": ("SGD", 0.2, {"momentum": 0.8}),
    "nesterov": ("SGD", 0.2, {"momentum": 0.8, "nesterov": True}),
    "dampening": ("SGD", 0.6, {"momentum": 0.8, "dampening": 0.6}),
    "adam": ("Adam", 0.3 * HUGE, {"betas": [0.8, 0.9], "eps": HUGE, "weight_decay": 0.05}),
    "adamw": ("AdamW", 0.3 * HUGE, {"betas": [0.8, 0.9], "eps": HUGE, "weight_decay": 0.05 / HUGE}),
}


def linear_run(name: str, **changes: Any) -> Run:
    kind, factor, settings = LINEAR[name]
    weight_decay = settings.get("weight_decay", 0.05)
    records = [replace(r, lr=tuple(factor * lr for lr in r.lr)) for r in schedule()]
    groups = ({**settings, "weight_decay": weight_decay}, {**settings, "weight_decay": 0.0})
    return Run(linear_module(), SquaredError(), Regression(), records, kind, groups, **changes)


def check_linear(name: str, K: int | None) -> dict[str, float]:
    run = linear_run(name)
    trained, errors = train(run), {}
    for request_name, request in REQUESTS.items():
        found, retrained = correct(run, trained.log, request, HVPConfig("GGN"), K), train(run, request)
        v, distance = found.v, (trained.theta - retrained.theta).norm()
        errors[request_name] = (trained.theta + v - retrained.theta).norm() / distance
        for key, actual in trained.state.items():
            if key == "exp_avg_sq":  # not linear, and without influence here
                continue
            difference = retrained.state[key] - actual
            errors[f"{request_name}, {key}"] = (found.state[key] - difference).norm() / difference.norm()
        edits = [edit_step(r, request, "global_token_mean", run.batches.num_targets) for r in run.records]
        skipped = sum(edited.skipped for edited in edits)  # also where no sample remains
        if run.kind != "SGD":
            assert (found.step, found.step - found.behind) == (trained.step, retrained.step)
        assert found.behind == skipped
        assert found.gradients_equivalent > len(run.records) - 10  # the gradients that follow the optimizer count
    return errors


@pytest.mark.parametrize("world_size", [1, 3])
def test_correction_equals_retraining_where_the_optimizer_is_linear(ranks: Any, world_size: int) -> None:
    for name in LINEAR:
        for errors in ranks(world_size).run(check_linear, name, None if world_size == 3 else 10_000):
            assert max(errors.values()) <= 1e-10, (name, errors)


def check_without_the_counter() -> float:
    """What is left if the counters of skipped steps are forgotten: the test above would notice."""
    from lmc_dist.update_rules import UpdateRule

    run = linear_run("adam")
    trained, request = train(run), REQUESTS["one batch"]
    original = UpdateRule.clock_gap
    UpdateRule.clock_gap = lambda self, at, behind, before=0: None  # type: ignore[method-assign]
    try:
        v = correct(run, trained.log, request, HVPConfig("GGN")).v
    finally:
        UpdateRule.clock_gap = original  # type: ignore[method-assign]
    retrained = train(run, request)
    return (trained.theta + v - retrained.theta).norm() / (trained.theta - retrained.theta).norm()


def test_counters_of_skipped_steps_matter(ranks: Any) -> None:
    assert min(ranks(3).run(check_without_the_counter)) > 0.01


def check_modes() -> dict[str, float]:
    run = linear_run("momentum")
    trained, request = train(run), REQUESTS["20 %, renormalize"]
    retrained, errors = train(run, request), {}
    for mode in ("none", "fisher", "diag", "GGN", "exact", "fd", "low_rank"):
        config = HVPConfig(mode, probes=64, rank=15, refresh=1)
        v = correct(run, trained.log, request, config).v
        errors[mode] = (trained.theta + v - retrained.theta).norm() / (trained.theta - retrained.theta).norm()
    return errors


def test_all_modes_run_with_momentum(ranks: Any) -> None:
    for errors in ranks(2).run(check_modes):
        assert max(errors["GGN"], errors["exact"], errors["low_rank"]) <= 1e-10 and errors["fd"] <= 1e-7, errors
        assert errors["GGN"] < errors["diag"] < errors["none"] and errors["fisher"] > 0.05, errors


# --- Adam: the correction is the derivative of training ----------------------------------------------------------------

TOKENS = 100


class Tokens:
    """A BatchSource of random sequences of a small language model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(2, VOCAB - 4, (TOKENS, 8), generator=generator)  # four tokens never occur
        self.labels = self.ids.clone()
        for i in range(TOKENS):
            self.labels[i, : 2 + i % 3] = -100

    def inputs(self, ids: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"input_ids": self.ids[list(ids)]}, self.labels[list(ids)]

    def num_targets(self, ids: Any) -> list[int]:
        return [int((self.labels[i, 1:] != -100).sum()) for i in ids]

    def unknown(self, ids: Any) -> list[int]:
        return sorted(i for i in ids if not 0 <= i < TOKENS)


@dataclass(frozen=True)
class ScaledMicro(EditedMicro):
    by: float = 1.0

    @property
    def weights(self) -> list[float]:
        return [(1.0 if keep else self.by) / self.denominator for keep in self.kept]


@dataclass(frozen=True)
class Scaled(Counterfactual):
    """The samples stay with a weight of `by`."""

    by: float = 1.0

    def edit(self, record: StepRecord, normalization: Any, num_targets: Any) -> EditedStep:
        edited = super().edit(record, normalization, num_targets)
        micros = tuple(ScaledMicro(m.record, m.kept, m.denominator, self.by) for m in edited.micro_batches)
        return EditedStep(record, False, micros)


def language_run(max_norm: float, **changes: Any) -> Run:
    """50 steps of AdamW, two epochs in different orders, of a tiny Llama in float64."""
    skeleton = build_skeleton(model_config("llama-untied")).double()
    module, tokens = ShardedModule(skeleton, ShardLayout.of_module(skeleton)), Tokens()
    records: list[StepRecord] = []
    for epoch in range(2):
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(epoch)).tolist()
        for i in range(0, TOKENS, 4):
            ids, step = order[i : i + 4], len(records)
            count = float(sum(tokens.num_targets(ids)))
            micros = tuple(MicroRecord(m, 0, tuple(ids[2 * m : 2 * m + 2]), count) for m in range(2))
            lr = 0.01 * min(1.0, (step + 1) / 5)
            records.append(StepRecord(step, step, micros, (lr, lr), count))
    settings = {"betas": [0.9, 0.95], "eps": 1e-6}
    groups = ({**settings, "weight_decay": 0.1}, {**settings, "weight_decay": 0.0})
    return Run(module, TokenCrossEntropy(), tokens, records, "AdamW", groups, max_norm, scale=0.2, **changes)


FORGOTTEN = 41


def check_derivative(max_norm: float) -> dict[str, float]:
    with KeepDouble():
        run = language_run(max_norm)
        trained = train(run)
        clipped = sum(record.clip_coef < 1 for record in trained.log.records())
        assert (10 < clipped < 45) == bool(max_norm), clipped
        touched = [r.step for r in run.records if FORGOTTEN in r.sample_ids]
        assert len(touched) == 2 and touched[0] < 25 <= touched[1]
        h = 2e-6
        scaled = partial(Scaled, "zero", frozenset({FORGOTTEN}))
        high, low = train(run, scaled(by=1 - h)), train(run, scaled(by=1 + h))
        slope = (high.theta - low.theta) * (0.5 / h)
        slopes = {key: (vector - low.state[key]) * (0.5 / h) for key, vector in high.state.items()}
        errors = {}
        for epsilon in (1e-8,) if max_norm else (1e-3, 1e-8):
            found = correct(run, trained.log, scaled(by=1 - epsilon), HVPConfig("exact"))
            errors[f"{epsilon}"] = (found.v * (1 / epsilon) - slope).norm() / slope.norm()
            for key, expected in slopes.items():
                errors[f"{epsilon} {key}"] = (found.state[key] * (1 / epsilon) - expected).norm() / expected.norm()
    return errors


@pytest.mark.parametrize("max_norm", [0.0, 0.34])
def test_correction_is_the_derivative_of_training_by_adamw(ranks: Any, max_norm: float) -> None:
    for errors in ranks(2).run(check_derivative, max_norm):
        last = [error for name, error in errors.items() if name.startswith("1e-08")]
        assert len(last) == 3 and max(last) <= 1e-5, errors
        assert max_norm or errors["1e-08"] < errors["0.001"] < 1e-3, errors


# --- what the sweep needs of the log -----------------------------------------------------------------------------------


def adamw_run(**changes: Any) -> Run:
    """AdamW as it is, on the regression."""
    run = linear_run("adamw", max_norm=6.0, **changes)
    groups = tuple({**group, "eps": 1e-8, "weight_decay": 0.05} for group in run.groups)
    return replace(run, groups=groups, records=[replace(r, lr=(0.02, 0.01)) for r in run.records])  # type: ignore[arg-type]


def check_logs() -> None:
    """However the optimizer is followed, the correction is the same; only the cost differs."""
    request, config = REQUESTS["one sample, renormalize"], HVPConfig("GGN")
    runs = {
        "computed": adamw_run(),
        "logged": adamw_run(keeps="gradient"),
        "snapshots": adamw_run(state_every=2),
    }
    logs = {name: train(run).log for name, run in runs.items()}
    steps, first = len(runs["computed"].records), min(r.step for r in runs["computed"].records if 7 in r.sample_ids)
    assert 2 < first < 5 and 0 < sum(r.clip_coef < 1 for r in logs["computed"].records()) < steps
    found = {name: correct(runs[name], log, request, config) for name, log in logs.items()}
    for other in ("logged", "snapshots"):
        assert (found[other].v - found["computed"].v).norm() <= 1e-10 * found["computed"].v.norm()
    costs = {name: correction.gradients_equivalent for name, correction in found.items()}
    assert costs["computed"] - costs["logged"] == pytest.approx(steps)
    assert costs["computed"] - costs["snapshots"] == pytest.approx(first // 2 * 2)
    lost = replace(runs["computed"], max_steps=steps - first)
    with pytest.raises(LmcError, match=rf"the optimizer's state at or before step {first} left the ring"):
        correct(lost, train(lost).log, request, config)

    # windows as long as the run add up to the joint vector, and short ones keep the actual optimizer state
    run, log = runs["logged"], logs["logged"]
    twice = Counterfactual("skip", batch_ids=frozenset({3, 6}))
    joint, windows = (correct(run, log, twice, config, K) for K in (None, 100))
    assert (joint.behind, joint.step, windows.behind) == (2, steps, 2)
    assert (windows.v - joint.v).norm() <= 1e-12 * joint.v.norm()
    for key, vector in joint.state.items():
        assert (windows.state[key] - vector).norm() <= 1e-12 * vector.norm()
    short = correct(run, log, twice, config, K=2)
    assert short.behind == 0 and all(vector.norm() == 0 for vector in short.state.values())
    assert [a.K_used for a in short.audit] == [2, 2]

    # gradients that are logged and curvature that is kept: no model, no data
    kept = average_curvature(log, run.module, run.batches, "c", rank=4, steps=1, loss=run.loss)
    low_rank = HVPConfig("low_rank")
    with_model = compute_correction(log, run.module, run.batches, twice, low_rank, kept=kept, loss=run.loss)
    without = compute_correction(log, None, None, twice, low_rank, kept=kept)
    assert (without.v - with_model.v).norm() == 0 and without.gradients_equivalent == 0
    assert without.audit[0].mode == "low_rank:c"
    with pytest.raises(LmcError, match="following AdamW takes the gradient of every step, and storage 'update' keeps"):
        compute_correction(logs["computed"], None, None, twice, low_rank, kept=kept)


def test_optimizers_are_followed_from_gradients_and_snapshots(ranks: Any) -> None:
    ranks(2).run(check_logs)


class Shifted:
    """Other data under the same ids."""

    def __init__(self, batches: BatchSource) -> None:
        self.batches, self.num_targets, self.unknown = batches, batches.num_targets, batches.unknown

    def inputs(self, ids: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return self.batches.inputs([i - 1 for i in ids])


def check_what_does_not_fit() -> None:
    """Each step is compared with the logged one."""
    run = linear_run("momentum", keeps="gradient")
    request, config = REQUESTS["one batch"], HVPConfig("none")
    changes: dict[str, Callable[[StepLog], None]] = {
        "settings": lambda log: log.manifest.optimizer["groups"][0].update(momentum=0.81),
        "rate": lambda log: object.__setattr__(log.record(4), "lr", (0.01, 0.01)),
        "gradient": lambda log: log.gradient(4).scale_(1.001) and None,
    }
    for change in changes.values():
        log = train(run).log
        correct(run, log, request, config)
        change(log)
        with pytest.raises(
            LmcError, match=r"step \d: the update rule of SGD does not give the logged step: off by"
        ) as e:
            correct(run, log, request, config)
        assert "gradient has norm" in str(e.value) and "replay_head=all" in str(e.value)
    # a gradient that is not training's, by its norm: no advice that would hide it
    run = adamw_run()
    log = train(run).log
    with pytest.raises(LmcError, match=r"step \d.*its gradient has norm .*, the logged one .* is not training's") as e:
        correct(replace(run, batches=Shifted(run.batches)), log, request, HVPConfig("GGN"))
    assert "lmc log doctor" in str(e.value) and "replay_head" not in str(e.value) and "storage" not in str(e.value)


def test_steps_that_the_rule_does_not_give_are_refused(ranks: Any) -> None:
    ranks(2).run(check_what_does_not_fit)


def check_divergence() -> str:
    run = linear_run("momentum")
    log = train(run).log
    for i in range(5, log.num_steps):  # rates far beyond 2 (1 + momentum) / λ_max, which no longer fit the log either
        object.__setattr__(log.record(i), "lr", (500.0, 500.0))
    from lmc_dist.unlearn.path import TrainingPath

    original = TrainingPath._check
    TrainingPath._check = lambda *args: None  # type: ignore[method-assign]
    try:
        with pytest.raises(LmcError, match=r"unit joint: the correction diverged at step \d") as error:
            correct(run, log, REQUESTS["one batch"], HVPConfig("GGN"))
    finally:
        TrainingPath._check = original  # type: ignore[method-assign]
    return str(error.value)


def test_divergence_names_growth_and_limit(ranks: Any) -> None:
    for message in ranks(2).run(check_divergence):
        assert "‖d momentum_buffer‖ =" in message and "stable up to 3.6" in message and "smaller K" in message, message


def check_live_optimizer(folder: str) -> None:
    """The engine's optimizer is set with the weights; what is saved can be read at any world size."""
    from lmc_dist.shards.engines import engine_shards
    from lmc_dist.shards.vector import dots

    run = adamw_run()
    trained = train(run)
    found = correct(run, trained.log, REQUESTS["three batches, the first among them"], HVPConfig("GGN"))
    found.save(folder)
    model = nn.Module()
    model.hidden = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shards = engine_shards(model, optimizer)
    shards.write(trained.theta)
    fresh = shards.read()
    apply_correction(shards, found)  # an optimizer that has not trained is left alone
    assert shards.read_state() == ({}, {}) and (shards.read() - (fresh + found.v)).norm() == 0

    shards.write(trained.theta)
    shards.write_state(trained.state, {"step": float(trained.step)})
    apply_correction(shards, found)
    state, scalars = shards.read_state()
    assert scalars == {"step": trained.step - 3.0} and found.behind == 3
    assert (state["exp_avg"] - (trained.state["exp_avg"] + found.state["exp_avg"])).norm() == 0
    expected = trained.state["exp_avg_sq"] + found.state["exp_avg_sq"]
    assert bool((state["exp_avg_sq"].flat > 0).all())
    holds = expected.flat > 0
    assert torch.equal(state["exp_avg_sq"].flat[holds], expected.flat[holds])
    assert torch.equal(state["exp_avg_sq"].flat[~holds], trained.state["exp_avg_sq"].flat[~holds])
    with pytest.raises(LmcError, match="optimizer has taken 7 steps, the logged one 10"):
        apply_correction(shards, found)
    again = load_full_correction(folder, trained.log.layout, trained.theta)
    assert (again.behind, again.step) == (3, 10)
    pairs = [(again.v - found.v,) * 2, *((again.state[key] - x,) * 2 for key, x in found.state.items())]
    assert not any(dots(pairs))


def test_a_live_optimizer_is_corrected_as_well(ranks: Any, tmp_path: Any) -> None:
    ranks(1).run(check_live_optimizer, str(tmp_path))
