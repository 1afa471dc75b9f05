"""Steps that are replayed before the recursion takes over: a replay to the end is retraining; a shorter one hands over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import KeepDouble
from test_sweep_optimizers import Run, Trained, correct, language_run, train

from lmc_dist.curvature import HVPConfig
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.unlearn.correction import Correction, compute_correction
from lmc_dist.unlearn.head import TRIAL_STEPS, Head

STEPS = Counterfactual("skip", batch_ids=frozenset({1, 9}))


def short_run(max_norm: float = 0.34, steps: int = 11) -> Run:
    run = language_run(max_norm)
    return replace(run, records=run.records[:steps])


def samples(run: Run) -> Counterfactual:
    """One of the first step and one of a later one."""
    return Counterfactual("renormalize", frozenset({run.records[0].sample_ids[0], run.records[8].sample_ids[3]}))


def sgd_run(max_norm: float = 0.0, momentum: float = 0.0) -> Run:
    run = short_run(max_norm)
    groups = ({"momentum": momentum, "weight_decay": 0.1}, {"momentum": momentum, "weight_decay": 0.0})
    records = [replace(r, lr=tuple(20 * lr for lr in r.lr)) for r in run.records]
    return replace(run, kind="SGD", groups=groups, records=records)


def errors_of(name: str, found: Correction, trained: Trained, retrained: Trained) -> dict[str, float]:
    """Distances of (θ + v, σ + dσ) to the retrained run's, those of doing nothing being 1."""
    distance = (trained.theta - retrained.theta).norm()
    errors = {name: (trained.theta + found.v - retrained.theta).norm() / distance}
    for key, vector in trained.state.items():
        change = retrained.state[key] - vector
        errors[f"{name} {key}"] = (found.state[key] - change).norm() / change.norm()
    assert trained.step - found.behind == retrained.step or not trained.step
    return errors


def check_replay() -> dict[str, float]:
    errors = {}
    with KeepDouble():
        for name, run in {"adamw": short_run(), "momentum": sgd_run(0.34, 0.5)}.items():
            trained = train(run)
            for request in (samples(run), STEPS):
                found = correct_with(run, trained, request, HVPConfig("GGN"), len(run.records))
                errors |= errors_of(f"{name} {request.kind}", found, trained, train(run, request))
                assert found.audit[0].replay_head == len(run.records) - found.audit[0].tz
    return errors


def correct_with(
    run: Run, trained: Trained, request: Counterfactual, config: HVPConfig, head: Any, K: int | None = None, **more: Any
) -> Correction:
    ways = {"replay_head": head, "update": "tangent", **more}
    return compute_correction(trained.log, run.module, run.batches, request, config, K, run.loss, **ways)


def test_a_head_to_the_end_is_retraining(ranks: Any) -> None:
    for errors in ranks(2).run(check_replay):
        assert len(errors) == 10 and max(errors.values()) <= 1e-9, errors


def check_secant() -> dict[str, float]:
    errors = {}
    with KeepDouble():
        for name, run in {"plain": sgd_run(), "clipped": sgd_run(0.34)}.items():
            trained = train(run)
            for request in (samples(run), STEPS):
                retrained = train(run, request)
                for mode in ("secant", "exact"):
                    found = correct(run, trained.log, request, HVPConfig(mode))
                    errors |= errors_of(f"{name} {request.kind} {mode}", found, trained, retrained)
                assert found.gradients_equivalent > 0
    return errors


def test_the_secant_is_retraining_where_the_update_rule_is_linear(ranks: Any) -> None:
    for errors in ranks(2).run(check_secant):
        for name, error in errors.items():
            if name.startswith("plain") and name.endswith("secant"):
                assert error <= 1e-10, errors
        for kind in ("renormalize", "skip"):  # clipping is no linear rule: then it is a tangent of that alone
            assert 1e-10 < errors[f"clipped {kind} secant"] < errors[f"clipped {kind} exact"] < 1, errors


def check_handing_over() -> dict[str, Any]:
    with KeepDouble():
        run = short_run(steps=25)
        trained = train(run)
        request = Counterfactual("renormalize", frozenset({run.records[0].sample_ids[0]}))
        retrained = train(run, request)

        def at(head: Any, K: int | None = None, mode: str = "exact", **more: Any) -> tuple[float, Correction]:
            found = correct_with(run, trained, request, HVPConfig(mode), head, K, **more)
            return errors_of("v", found, trained, retrained)["v"], found

        steps = len(run.records)
        facts: dict[str, Any] = {f"head {n}": at(n)[0] for n in (0, 5, 20)}
        facts["auto"], found = at("auto", head_tolerance=0.2)
        facts["audit"] = found.audit[0].replay_head, found.audit[0].head_error, found.audit[0].hvp_calls
        facts["strict"], found = at("auto", head_tolerance=1e-9)
        facts["strict head"] = found.audit[0].replay_head, steps
        # a window that is cut off right behind its head keeps what was replayed, and adds what came from later sources
        facts["K"], found = at(5, K=3)
        facts["K audit"] = [(a.unit, a.tz, a.K_used, a.replay_head, a.stopped_by) for a in found.audit]
        facts["long K"], found = at(5, K=steps)
        facts["joint"] = facts["head 5"]
        return facts


def test_the_recursion_takes_over(ranks: Any) -> None:
    for facts in ranks(2).run(check_handing_over):
        replayed, error, calls = facts["audit"]
        assert facts["head 0"] > 2 * facts["head 20"] > 0, facts
        assert TRIAL_STEPS < replayed < 25 and 0 < error <= 0.2 and calls > 0, facts
        assert facts["auto"] < facts["head 0"] / 2, facts
        assert facts["strict"] <= 1e-9 and facts["strict head"][0] == facts["strict head"][1], facts
        assert facts["K audit"] == [("head-0", 0, 4, 5, "K")], facts
        assert abs(facts["long K"] - facts["joint"]) <= 1e-9, facts


@pytest.mark.parametrize("length", [-1, 2.5, "some", True])
def test_lengths_that_are_none_are_refused(length: Any) -> None:
    with pytest.raises(LmcError, match="replay_head must be a number of steps"):
        Head(length, 0.05)
    with pytest.raises(LmcError, match="head_tolerance"):
        Head(3, 1.0)


def check_finite() -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(errors with the true change of the gradient, errors with the Hessian's: steps as they are, their tangents)."""
    errors, by_curvature = {}, {}
    with KeepDouble():
        runs = {"adamw": short_run(), "momentum": sgd_run(0.34, 0.5), "clipped": sgd_run(0.34), "plain": sgd_run()}
        for name, run in runs.items():
            trained = train(run)
            for request in (samples(run), STEPS):
                retrained, label = train(run, request), f"{name} {request.kind}"
                found = correct_with(run, trained, request, HVPConfig("secant"), 0, update="finite")
                errors |= errors_of(label, found, trained, retrained)
                assert (found.audit[0].mode, found.audit[0].update) == ("secant", "finite")
                finite, tangent = (
                    errors_of(
                        label,
                        correct_with(run, trained, request, HVPConfig("exact"), 0, update=update),
                        trained,
                        retrained,
                    )
                    for update in ("finite", "tangent")
                )
                by_curvature[label] = finite[label], tangent[label]
    return errors, by_curvature


def test_steps_as_they_are_with_the_true_gradient_are_retraining(ranks: Any) -> None:
    for errors, by_curvature in ranks(2).run(check_finite):
        assert len(errors) == 14 and max(errors.values()) <= 1e-9, errors
        print(by_curvature)
        assert all(finite <= tangent * (1 + 1e-9) for finite, tangent in by_curvature.values()), by_curvature
        assert max(finite for finite, _ in by_curvature.values()) < 0.2


def test_steps_as_they_are_are_for_one_vector(ranks: Any) -> None:
    run = short_run()
    with KeepDouble(), pytest.raises(LmcError, match="not linear in what is forgotten"):
        correct_with(run, train(run), samples(run), HVPConfig("GGN"), 0, K=3, update="finite")
