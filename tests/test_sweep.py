"""The recursion where it is exact: a linear-Gaussian model has a constant Hessian, so correction = retraining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lmc_dist.curvature import HVPConfig, SquaredError
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step
from lmc_dist.trajectory.record import MicroRecord, StepLog, StepRecord, TrajectoryManifest
from lmc_dist.unlearn.correction import compute_correction
from lmc_dist.unlearn.source import micro_batches
from lmc_dist.update_rules import Deviation, Point, UpdateRule

SAMPLES, BATCH, EPOCHS, PASSES = 25, 6, 2, 3  # the last batch of an epoch holds one sample


class LinearModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 3, dtype=torch.float64, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x)


class Regression:
    """A BatchSource of 25 samples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)

    def inputs(self, ids: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"x": self.x[list(ids)]}, self.y[list(ids)]

    def num_targets(self, ids: Any) -> list[int]:
        return [1] * len(ids)

    def unknown(self, ids: Any) -> list[int]:
        return sorted(i for i in ids if not 0 <= i < SAMPLES)


def schedule() -> list[StepRecord]:
    """Two epochs in different orders, a learning-rate schedule, passes of uneven size."""
    records = []
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, SAMPLES, BATCH):
            ids = order[start : start + BATCH]
            micros = tuple(MicroRecord(0, m, tuple(ids[m::PASSES]), float(len(ids))) for m in range(PASSES))
            step = len(records)
            records.append(StepRecord(step, step, micros, lr=(0.2 / (1 + 0.1 * step), 0.1), denominator=len(ids)))
    return records


def manifest(layout: ShardLayout) -> TrajectoryManifest:
    table = [{"name": s.spec.name, "shape": list(s.spec.shape), "group": int(len(s.spec.shape) < 2)} for s in layout]
    return TrajectoryManifest(
        model_config={},
        model_fingerprint="",
        parameters=table,
        optimizer={"class": "SGD", "groups": [{"weight_decay": 0.05}, {"weight_decay": 0.0}]},
        loss_normalization="global_token_mean",
        max_grad_norm=0.0,
        dataset_fingerprint=None,
        world_size=layout.world_size,
        engine="test",
        storage="update",
        save_interval=None,
        max_steps=None,
        dtype="float64",
    )


def train(
    module: ShardedModule, counterfactual: Counterfactual | None, max_steps: int | None = None
) -> tuple[StepLog, ShardedVector]:
    """SGD by its definition on the sharded model, with or without the forgotten data."""
    layout = module.layout
    generator = torch.Generator().manual_seed(9)
    start = {s.spec.name: torch.randn(s.spec.shape, generator=generator, dtype=torch.float64) for s in layout}
    theta = ShardedVector.from_full(layout, start.__getitem__)
    log, batches, groups = StepLog(manifest(layout), theta, max_steps=max_steps), Regression(), manifest(layout)
    for record in schedule():
        edited = edit_step(record, counterfactual, "global_token_mean", batches.num_targets)
        if not edited.skipped:
            g = weighted_gradient(module, SquaredError(), theta, micro_batches(edited, batches, module, "kept"))
            for row in groups.parameters:
                name, lr = row["name"], record.lr[row["group"]]
                decay = groups.optimizer["groups"][row["group"]]["weight_decay"]
                theta[name].sub_(lr * (g[name] + decay * theta[name]))
        log.append(record, theta)
    return log, theta


def linear_module() -> ShardedModule:
    model = LinearModel()
    return ShardedModule(model, ShardLayout.of_module(model))


REQUESTS = {
    "one batch": Counterfactual("skip", batch_ids=frozenset({4})),
    "three batches, the first among them": Counterfactual("skip", batch_ids=frozenset({0, 5, 6})),
    "one sample, zero": Counterfactual("zero", sample_ids=frozenset({7})),
    "one sample, renormalize": Counterfactual("renormalize", sample_ids=frozenset({7})),
    "20 %, zero": Counterfactual("zero", sample_ids=frozenset({1, 5, 8, 13, 21})),
    "20 %, renormalize": Counterfactual("renormalize", sample_ids=frozenset({1, 5, 8, 13, 21})),
}


def check_requests(K: int | None) -> dict[str, float]:
    module = linear_module()
    log, trained = train(module, None)
    errors = {}
    for name, request in REQUESTS.items():
        correction = compute_correction(log, module, Regression(), request, HVPConfig("GGN"), K=K, loss=SquaredError())
        _, retrained = train(module, request)
        errors[name] = (trained + correction.v - retrained).norm() / (trained - retrained).norm()
        assert sum(a.hvp_calls for a in correction.audit) > 0
        touched = sum(request.touches(record) for record in log.records())
        assert len(correction.audit) == (1 if K is None else touched)
    return errors


@pytest.mark.parametrize("world_size", [1, 3])
def test_correction_equals_retraining_on_a_quadratic(ranks: Any, world_size: int) -> None:
    for errors in ranks(world_size).run(check_requests, None):
        assert max(errors.values()) <= 1e-10, errors


def test_windows_as_long_as_the_run_equal_the_joint_sweep(ranks: Any) -> None:
    for errors in ranks(3).run(check_requests, 10_000):
        assert max(errors.values()) <= 1e-10, errors


def check_modes() -> dict[str, float]:
    """rel_error of every mode on a quadratic: the Hessian is the GGN there, and the rank-one Fisher is neither."""
    module = linear_module()
    log, trained = train(module, None)
    request = REQUESTS["20 %, renormalize"]
    _, retrained = train(module, request)
    errors = {}
    for mode in ("none", "fisher", "diag", "GGN", "exact", "fd"):
        config = HVPConfig(mode, probes=64)
        v = compute_correction(log, module, Regression(), request, config, loss=SquaredError()).v
        errors[mode] = (trained + v - retrained).norm() / (trained - retrained).norm()
    return errors


def test_modes_on_a_quadratic(ranks: Any) -> None:
    for errors in ranks(2).run(check_modes):
        assert errors["GGN"] <= 1e-10 and errors["exact"] <= 1e-10 and errors["fd"] <= 1e-8, errors
        assert errors["GGN"] < errors["diag"] < errors["none"], errors
        assert errors["none"] > 0.05 and 0.05 < errors["fisher"] < 10, errors


def check_truncation() -> None:
    module = linear_module()
    log, _ = train(module, None)
    request = REQUESTS["one batch"]
    u = log.update(4)
    for K in (0, 1, 3):
        result = compute_correction(log, module, Regression(), request, HVPConfig("GGN"), K=K, loss=SquaredError())
        assert [a.K_used for a in result.audit] == [K]
        assert [a.stopped_by for a in result.audit] == ["K"]
        assert result.audit[0].v0_norm == pytest.approx(u.norm(), rel=1e-12)
        expected = u * -1.0
        for step in range(5, 5 + K):  # the recursion with the dense operator of one sample batch at a time
            edited = edit_step(log.record(step), None, "global_token_mean", Regression().num_targets)
            micros = micro_batches(edited, Regression(), module, "kept")
            from lmc_dist.curvature import hvp_apply

            dg = hvp_apply(expected, HVPConfig("GGN"), module, SquaredError(), log.theta(step), micros)
            rule = UpdateRule(log.layout, log.manifest.parameters, log.manifest.optimizer)
            point = Point(log.theta(step), log.record(step).lr)
            expected = rule.tangents(point, [(Deviation(expected), dg)])[0].v
        assert (result.v - expected).norm() <= 1e-14 * expected.norm()


def test_K_truncates_each_source(ranks: Any) -> None:
    ranks(2).run(check_truncation)


def check_tim() -> None:
    """Mode `none` without weight decay just takes the updates back; a wrong sign would double them."""
    module = linear_module()
    log, _ = train(module, None)
    for group in log.manifest.optimizer["groups"]:
        group["weight_decay"] = 0.0
    result = compute_correction(
        log, module, Regression(), REQUESTS["one batch"], HVPConfig("none"), loss=SquaredError()
    )
    assert (result.v + log.update(4)).norm() == 0
    assert result.gradients_equivalent == 0


def test_first_order_rollback_takes_the_update_back(ranks: Any) -> None:
    ranks(2).run(check_tim)


def check_refusals() -> None:
    module = linear_module()
    log, _ = train(module, None)

    def correct(request: Counterfactual, **settings: Any) -> None:
        compute_correction(log, module, Regression(), request, loss=SquaredError(), **settings)

    with pytest.raises(LmcError, match="K must be ≥ 0"):
        correct(REQUESTS["one batch"], K=-1)
    with pytest.raises(LmcError, match="not in the dataset: 25, 99"):
        correct(Counterfactual("zero", sample_ids=frozenset({3, 25, 99})))
    with pytest.raises(LmcError, match=r"not in the log: 77 \(it holds 0 to 9\)"):
        correct(Counterfactual("skip", batch_ids=frozenset({77})))
    log.manifest.optimizer["class"] = "Muon"
    with pytest.raises(LmcError, match="trained with Muon; corrections know the update rules of SGD, Adam, AdamW,"):
        correct(REQUESTS["one batch"])
    log.manifest.optimizer["class"] = "FusedAdam"
    with pytest.raises(LmcError, match=r"FusedAdam and weight_decay=0\.05, and does not say .*adam_w_mode"):
        correct(REQUESTS["one batch"])
    log.manifest.optimizer["class"] = "SGD"
    log.manifest.optimizer["groups"][1]["momentum"] = 0.9  # training had none: the first step, 0 → 1, is still the same
    with pytest.raises(LmcError, match="step 1: the update rule of SGD does not give the logged step: off by"):
        correct(REQUESTS["one batch"])
    del log.manifest.optimizer["groups"][1]["momentum"]
    ring, _ = train(module, None, max_steps=4)
    with pytest.raises(LmcError, match=r"step 4 fell out of the ring: steps 6 to 9 remain"):
        compute_correction(ring, module, Regression(), REQUESTS["one batch"], loss=SquaredError())


def test_bad_requests_are_refused_on_every_rank(ranks: Any) -> None:
    ranks(2).run(check_refusals)


def check_divergence() -> None:
    module = linear_module()
    log, _ = train(module, None)
    for i in range(5, log.num_steps):  # learning rates far beyond 2/λ_max
        object.__setattr__(log.record(i), "lr", (50.0, 50.0))
    with pytest.raises(LmcError, match="diverged at step"):
        compute_correction(log, module, Regression(), REQUESTS["one batch"], loss=SquaredError())


def test_divergence_stops_with_step_and_growth(ranks: Any) -> None:
    ranks(2).run(check_divergence)


def test_counterfactual_needs_fitting_targets() -> None:
    with pytest.raises(LmcError, match="forgets whole batches"):
        Counterfactual("skip", sample_ids=frozenset({1}))
    with pytest.raises(LmcError, match="forgets samples"):
        Counterfactual("zero", batch_ids=frozenset({1}))
