"""Noise on real corrections: what a run writes and says, and what the best distinguisher can make of what it releases."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from scipy import stats
from test_faults import LLAMA
from test_zero3 import this_runtime, train_job

from lmc_dist.config import (
    Config,
    CurvatureConfig,
    DataConfig,
    ForgetConfig,
    LogConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
    UnlearnConfig,
)
from lmc_dist.curvature import HVPConfig
from lmc_dist.errors import LmcError
from lmc_dist.privacy.certificate import CERTIFIED, COVERED, HEURISTIC, ON_WORD, UNPROVEN
from lmc_dist.privacy.composition import Release, compose
from lmc_dist.privacy.controls import control_residuals, disjoint_requests, group_requests, read_groups
from lmc_dist.privacy.covariance import Isotropic
from lmc_dist.privacy.gaussian import delta_of, mu_of
from lmc_dist.privacy.noise import BLOCK, derive_key, normal_block
from lmc_dist.privacy.run import noise_context, release, told_controls
from lmc_dist.privacy.seeds import read_seed
from lmc_dist.shards.vector import local_dot
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import compute_correction
from lmc_dist.unlearn.run import UnlearningRun, unlearn

SECRET = "3f" * 31 + "a1"


@pytest.fixture(scope="module")
def logged(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """24 samples in 8 steps of 6, plain SGD; sample 101 is in two steps."""
    folder = tmp_path_factory.mktemp("private")
    config = Config(
        data=DataConfig(people=3, facts_per_person=8, max_length=96),
        model=ModelConfig(config=LLAMA, vocab_size=280),
        train=TrainConfig(epochs=2, batch_size=6, micro_batch_size=2, learning_rate=0.2, engine="ddp"),
        log=LogConfig(save_interval=4),
        forget=ForgetConfig(samples="101"),
        log_dir=str(folder / "log"),
        output_dir=str(folder / "clean"),
        reference="replay",
        progress="none",
    )
    ranks(2).run(train_job, replace(config, forget=ForgetConfig()))
    ranks(2).run(unlearn_job, config)
    (folder / "seed").write_text(SECRET)
    return config


def private(config: Config, name: str, unlearning: UnlearnConfig | None = None, **privacy: Any) -> Config:
    folder = Path(config.log_dir).parent
    settings = PrivacyConfig(**{"draws": 1, "seed_file": str(folder / "seed"), **privacy})
    return replace(config, output_dir=str(folder / name), privacy=settings, unlearn=unlearning or config.unlearn)


def unlearn_job(config: Config) -> tuple[dict[str, Any], str]:
    """(result, what was printed)."""
    text = io.StringIO()
    with redirect_stdout(text):
        result = unlearn(config, this_runtime())
    dist.barrier()
    return result, text.getvalue()


def refusal_job(config: Config) -> tuple[str, str]:
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(LmcError) as caught:
        unlearn(config, this_runtime())
    return str(caught.value), text.getvalue()


def context_job(config: Config) -> dict[str, Any]:
    return noise_context(UnlearningRun(replace(config, output_dir=config.output_dir + "-not-written"), this_runtime()))


def released(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


@pytest.mark.slow
def test_what_is_written_is_the_correction_and_the_noise(ranks: Any, logged: Config) -> None:
    config, pool = private(logged, "assumed", basis="assumed", bound=0.1, epsilon=2.0, delta=1e-4), ranks(2)
    (result, text), (_, silent) = pool.run(unlearn_job, config)
    found = result["privacy"]
    assert found["certified"] == ON_WORD and found["basis"] == "assumed" and found["bound"] == 0.1
    assert found["sigma"] == pytest.approx(0.1 / mu_of(2.0, 1e-4), rel=2e-6)
    assert found["epsilon"] <= 2 and found["epsilon"] == pytest.approx(2) and found["delta_total"] == 1e-4
    assert found["residual"] == pytest.approx(result["rel_error"] * distance(logged), rel=1e-4)
    assert json.loads((Path(config.output_dir) / "result.json").read_text())["privacy"] == found
    assert json.loads((Path(config.output_dir) / "audit" / "privacy.json").read_text()) == found
    assert not silent and text.startswith(f"noise: σ = {found['sigma']:.4g}, isotropic; loss on retained")
    assert "predicted from 2 other draws" in text
    utility = found["utility"]
    assert utility["before"] == pytest.approx(result["rows"][1]["loss_retain"])
    assert utility["change"] == pytest.approx(utility["predicted"] - utility["before"])

    # θ̂ + σ z, with z put together here, block by block, without any layout.
    key = derive_key(bytes.fromhex(SECRET), "noise", pool.run(context_job, config)[0])
    clean, noisy = released(logged), released(config)
    assert set(noisy) == set(clean)
    for name, weights in noisy.items():
        blocks = range(-(-weights.numel() // BLOCK))
        z = torch.cat([normal_block(key, name, i) for i in blocks])[: weights.numel()].view(weights.shape)
        assert torch.equal(weights, (clean[name].double() + found["sigma"] * z).float()), name

    # What was released can be applied and resharded; the seed and the optimizer's state are nowhere.
    assert json.loads((Path(config.output_dir) / "correction" / "correction.json").read_text())["state"] == []
    for file in Path(config.output_dir).rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert SECRET.encode() not in content and bytes.fromhex(SECRET) not in content, file
    assert found["seed"]["source"] == "file" and set(found["seed"]) == {"source", "salt", "digest"}

    # The same settings on another number of ranks: the same noise, on a correction that rounds otherwise.
    alone = replace(config, output_dir=config.output_dir + "-alone")
    ranks(1).run(unlearn_job, alone)
    other = released(alone)
    assert max(float((other[name] - noisy[name]).abs().max()) for name in noisy) < 1e-6

    # Another request, or another size, has other noise.
    for changed in (
        replace(config, forget=ForgetConfig(samples="102")),
        private(config, "x", basis="heuristic", sigma=1.0),
    ):
        assert derive_key(bytes.fromhex(SECRET), "noise", pool.run(context_job, changed)[0]) != key


def distance(config: Config) -> float:
    """‖θ − θ_retrain‖: v_norm of a replay."""
    return json.loads((Path(config.output_dir).parent / "exact" / "result.json").read_text())["v_norm"]


@pytest.fixture(scope="module", autouse=True)
def exact(ranks: Any, logged: Config) -> dict[str, Any]:
    """The privacy object of an exact replay on the logged number of ranks."""
    config = private(logged, "exact", UnlearnConfig(replay_head="all"), basis="exact")
    result, text = ranks(2).run(unlearn_job, config)[0]
    assert not text
    return result["privacy"]


@pytest.mark.slow
def test_replay_is_certified_where_it_is_exact_and_nowhere_else(ranks: Any, logged: Config, exact: Any) -> None:
    assert (exact["certified"], exact["epsilon"], exact["delta"], exact["sigma"]) == (CERTIFIED, 0.0, 0.0, 0.0)
    assert exact["residual"] == 0 and exact["utility"] is None and exact["seed"] is None
    assert Release.of_result(exact) == Release(0.0)
    elsewhere = private(logged, "elsewhere", UnlearnConfig(replay_head="all"), basis="exact")
    found = ranks(1).run(unlearn_job, elsewhere)[0][0]["privacy"]
    assert found["certified"] == UNPROVEN and found["epsilon"] is None and "number of ranks" in found["statement"]


def control_job(config: Config) -> tuple[list[float], list[list[int]], list[int]]:
    """(residuals of the first three, controls, request) as the run has them, computed by the library's other door."""
    from lmc_dist.logged_run import starting_model
    from lmc_dist.trajectory.replay import replay, replay_engine

    run = UnlearningRun(replace(config, output_dir=config.output_dir + "-not-written"), this_runtime())
    drawn = derive_key(read_seed(str(config.privacy.seed_file)), "controls", noise_context(run))
    requests = disjoint_requests(run.log, run.request, config.privacy.controls, int.from_bytes(drawn[:7], "little"))
    engine = replay_engine(starting_model(config, run.model_config, run.log), run.log)
    theta, found = run.log.theta(run.log.num_steps), []
    for request in requests[:3]:
        retrained = replay(engine, run.log, run.batches, request).theta
        correction = compute_correction(run.log, run.module, run.batches, request, HVPConfig("GGN"), K=3)
        found.append((theta + correction.v - retrained).norm())
    engine.destroy()
    return found, [sorted(r.sample_ids) for r in requests], sorted(run.request.sample_ids)


@pytest.mark.slow
def test_controls_are_the_same_method_on_other_data(ranks: Any, logged: Config) -> None:
    settings = {"basis": "controls", "controls": 9, "epsilon": 4.0}
    config, pool = private(logged, "controls", UnlearnConfig(K=3), **settings), ranks(2)
    result, _ = pool.run(unlearn_job, config)[0]
    found = result["privacy"]
    norms, controls, request = pool.run(control_job, config)[0]
    assert found["controls"]["norms"][:3] == pytest.approx(norms, rel=1e-5) and found["controls"]["replay_exact"]
    together = [i for ids in [*controls, request] for i in ids]
    assert len(set(together)) == len(together) == 10
    assert found["bound"] == found["distance"] == max(found["controls"]["norms"])
    assert found["coverage"]["rank"] == 9 and found["coverage"]["level"] == 0.9 and found["certified"] == COVERED
    assert found["delta_total"] == pytest.approx(0.1 + 1e-5) and found["epsilon"] == pytest.approx(4.0)
    epsilon, delta = compose([Release.of_result(found)] * 2, 1e-5)
    assert epsilon > 4 and delta == pytest.approx(0.2 + 1e-5)
    too_many = replace(private(logged, "never", **{**settings, "controls": 24}), forget=config.forget)
    message, text = pool.run(refusal_job, too_many)[0]
    assert "none in two of them, take 24, and the log holds 23" in message and not text


@pytest.mark.slow
def test_a_loss_that_would_be_too_large_ends_the_run_before_there_is_noise(ranks: Any, logged: Config) -> None:
    config = private(logged, "too-much", basis="assumed", bound=5.0, max_loss_change=0.1)
    message, text = ranks(2).run(refusal_job, config)[0]
    assert "would change the loss on retained samples by" in message and text.startswith("noise: σ = ")
    assert not Path(config.output_dir).exists()
    wrong = private(logged, "wrong-word", basis="assumed", bound=1e-7)
    found = ranks(2).run(unlearn_job, wrong)[0][0]["privacy"]
    assert found["residual"] > 1e-7 and found["certified"] == HEURISTIC and found["epsilon"] is None
    assert "the residual against the reference" in found["statement"]
    found = ranks(2).run(unlearn_job, private(logged, "plain-noise", basis="heuristic", sigma=1e-3))[0][0]["privacy"]
    assert found["certified"] == HEURISTIC and "certified" not in found["statement"]
    # The prediction is of pairs ±n, which have no first-order term; what one draw n does has: nᵀ∇L, of deviation σ‖∇L‖.
    deviation = 1e-3 * max(record.grad_norm for record in TrajectoryLog(logged.log_dir).records())
    assert deviation < 1e-3
    assert found["utility"]["released"] == pytest.approx(found["utility"]["predicted"], abs=5 * deviation)


@pytest.mark.slow
def test_a_bound_from_constants_runs_along_the_logged_steps(ranks: Any, logged: Config) -> None:
    constants = {"smoothness": 3.0, "convexity": -0.5, "lipschitz": 2.0, "curvature_error": 2.5, "source": 2.0}
    config = private(logged, "constants", basis="assumed", **constants)
    found = ranks(2).run(unlearn_job, config)[0][0]["privacy"]
    log = TrajectoryLog(logged.log_dir)
    held = [record.step for record in log.records() if 101 in record.sample_ids]
    assert len(held) == 2
    w = r = 0.0
    for record in log.records():
        if record.step >= held[0]:
            (lr,) = set(record.lr)
            c = max(abs(1 + 0.5 * lr), abs(1 - 3.0 * lr))
            r, w = c * r + lr * (2.5 * w + w * w), c * w + (2.0 * lr if record.step in held else 0.0)
    assert found["bound"] == pytest.approx(r, rel=1e-12) and found["constants"] == constants
    assert found["certified"] == ON_WORD and "was not checked" in found["statement"]
    windowed = private(logged, "never", UnlearnConfig(K=3), basis="assumed", **constants)
    message, _ = ranks(2).run(refusal_job, windowed)[0]
    assert "propagated to the end, and unlearn.K" in message and "privacy.bound" in message


def curvature_job(config: Config) -> None:
    from lmc_dist.log_commands.curvature import keep_curvature

    keep_curvature(config, this_runtime())


@pytest.mark.slow
def test_noise_shaped_by_curvature_says_whether_its_shape_gives_anything_away(ranks: Any, logged: Config) -> None:
    pool = ranks(2)
    pool.run(curvature_job, replace(logged, curvature=CurvatureConfig(name="early", rank=3, windows=2, steps=2)))
    shaped = {"basis": "assumed", "bound": 0.1, "subspace": "early", "outside": 0.5, "epsilon": 2.0}
    late = replace(private(logged, "late", **shaped), forget=ForgetConfig(batches="6"))
    found = pool.run(unlearn_job, late)[0][0]["privacy"]
    assert found["covariance"]["kind"] == "subspace" and found["covariance"]["rank"] == 3
    assert found["certified"] == ON_WORD and found["distance"] == pytest.approx(0.2)  # wherever the residual lies
    assert found["sigma"] == pytest.approx(0.2 / mu_of(2.0, 1e-5), rel=2e-6)
    again = replace(late, output_dir=late.output_dir + "-alone")
    ranks(1).run(unlearn_job, again)
    assert max(float((released(again)[n] - x).abs().max()) for n, x in released(late).items()) < 1e-6
    first = replace(private(logged, "first", **shaped), forget=ForgetConfig(batches="0"))
    found = pool.run(unlearn_job, first)[0][0]["privacy"]
    assert found["certified"] == HEURISTIC and "depends on what is forgotten" in found["statement"]
    assert found["epsilon"] is None


# --- a membership attack whose truth is known --------------------------------------------------------------------------

EPSILON, DELTA, DRAWS = 1.0, 0.05, 2500


def attack_job(config: Config) -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
    """The run's own statement, and the best test's statistic on many releases and many noised retrains, by σ."""
    run = UnlearningRun(replace(config, output_dir=config.output_dir + "-not-written"), this_runtime())
    theta = run.log.theta(run.log.num_steps)
    main = run.compute(run.methods()[0], theta)
    clean = main.correction.corrected(theta)
    retrained = run.replay(theta, lambda step: None)[0].corrected(theta)
    residual = clean - retrained
    size = residual.norm()
    told = replace(config.privacy, basis="assumed", bound=size, epsilon=EPSILON, delta=DELTA)
    run.config = replace(config, privacy=told)
    with redirect_stdout(io.StringIO()):
        _, found = release(run, main, theta)
    context, direction = noise_context(run), residual * (1 / size)
    scores = {}
    for name, sigma in (("as told", found["sigma"]), ("a third", found["sigma"] / 3)):
        rows = []
        for what, weights in (("released", clean), ("retrained", retrained)):
            # log p(x | released) − log p(x | retrained) is, up to constants, the part of x − θ_retrain along the residual.
            draws = [
                Isotropic().noisy(weights, derive_key(bytes(f"{what} {i}".ljust(32), "ascii"), "noise", context), sigma)
                for i in range(DRAWS)
            ]
            rows.append([local_dot((x - retrained).flat, direction.flat) / sigma for x in draws])
        together = torch.tensor(rows, dtype=torch.float64)
        dist.all_reduce(together)
        scores[name] = together.tolist()
    return found, scores


def surely(hits: int, high: bool) -> float:
    """Clopper and Pearson's bound on a probability, wrong once in 20 000."""
    interval = stats.binomtest(hits, DRAWS).proportion_ci(1 - 1e-4, method="exact")
    return interval.high if high else interval.low


def worst_excess(scores: list[list[float]], mu: float) -> float:
    """max over thresholds and directions of what P_1(T) is surely above e^ε P_0(T); at most δ where (ε, δ) holds."""
    out, reference = (np.array(row) for row in scores)
    found = []
    for threshold in EPSILON / mu + mu / 2 + np.linspace(-2, 2, 9):
        for one, zero in ((out > threshold, reference > threshold), (reference < mu - threshold, out < mu - threshold)):
            found.append(surely(int(one.sum()), high=False) - math.exp(EPSILON) * surely(int(zero.sum()), high=True))
    return max(found)


@pytest.mark.slow
def test_the_best_distinguisher_gains_what_epsilon_and_delta_allow(ranks: Any, logged: Config) -> None:
    found, scores = ranks(2).run(attack_job, private(logged, "attacked"))[0]
    mu = found["mu"]
    assert found["epsilon"] == pytest.approx(EPSILON) and mu == pytest.approx(mu_of(EPSILON, DELTA), rel=1e-5)
    out, reference = (np.array(row) for row in scores["as told"])
    assert stats.kstest(reference, "norm").pvalue > 1e-3 and stats.kstest(out, "norm", (mu, 1)).pvalue > 1e-3
    assert worst_excess(scores["as told"], mu) <= DELTA
    # The bound is the residual, so the attack gets all of δ at its best threshold: nothing is given away for safety.
    threshold = EPSILON / mu + mu / 2
    gained = float((out > threshold).mean() - math.exp(EPSILON) * (reference > threshold).mean())
    spread = math.sqrt((delta_of(0, mu) + math.e**2 * (reference > threshold).mean()) / DRAWS)
    assert gained == pytest.approx(DELTA, abs=4 * spread)
    # And it is an attack: with a third of the noise it is caught.
    assert worst_excess(scores["a third"], 3 * mu) > DELTA


class Ring(TrajectoryLog):
    """The log as if all before step 4 were gone."""

    first_step = 4  # type: ignore[assignment]


def test_controls_of_a_ring_are_drawn_from_what_can_be_replayed(logged: Config) -> None:
    batches = disjoint_requests(
        TrajectoryLog(logged.log_dir), Counterfactual("skip", batch_ids=frozenset({2})), 7, seed=5
    )
    assert sorted(i for r in batches for i in r.batch_ids) == [0, 1, 3, 4, 5, 6, 7]
    log = Ring(logged.log_dir)
    with pytest.raises(LmcError, match="the log holds 3 besides"):
        disjoint_requests(log, Counterfactual("skip", batch_ids=frozenset({5})), 4, seed=5)
    with pytest.raises(LmcError, match="the log holds 0 besides"):  # each sample was also seen before
        disjoint_requests(log, Counterfactual("zero", sample_ids=frozenset({101})), 1, seed=5)


def test_controls_of_a_user_are_other_users(logged: Config, tmp_path: Path) -> None:
    log = TrajectoryLog(logged.log_dir)
    people = {f"person {i}": [100 * i + fact for fact in range(8)] for i in range(3)}
    request = Counterfactual("renormalize", sample_ids=frozenset(people["person 1"]))
    found = group_requests(log, request, people, 2, seed=1)
    assert {r.sample_ids for r in found} == {frozenset(people["person 0"]), frozenset(people["person 2"])}
    part = Counterfactual("renormalize", sample_ids=frozenset([100, 101]))
    for groups, asked, count, message in (
        (people, request, 3, "has 2 others"),
        (people, part, 1, "none of the groups as a whole"),
        ({**people, "both": [0, 100]}, request, 1, "is in two groups"),
    ):
        with pytest.raises(LmcError, match=message):
            group_requests(log, asked, groups, count, seed=1)
    with pytest.raises(LmcError, match="has 0 others that can be replayed"):
        group_requests(Ring(logged.log_dir), request, people, 1, seed=1)
    file = tmp_path / "groups.json"
    for text in ("{", '["a"]', '{"a": [1, true]}'):
        file.write_text(text)
        with pytest.raises(LmcError, match=r"privacy\.groups"):
            read_groups(file)
    file.write_text(json.dumps(people))
    assert read_groups(file) == people


def failing_job(config: Config) -> list[Any]:
    run = UnlearningRun(replace(config, output_dir=config.output_dir + "-not-written"), this_runtime())
    method = replace(run.methods()[0], damping=1e6)
    theta = run.log.theta(run.log.num_steps)
    return control_residuals(run, method, [run.request], theta, Isotropic().distance)


@pytest.mark.slow
def test_a_control_that_the_method_fails_on_is_infinitely_far_off(ranks: Any, logged: Config) -> None:
    for (found,) in ranks(2).run(failing_job, private(logged, "never")):
        assert math.isinf(found.norm) and math.isinf(found.distance) and found.why is not None
        assert told_controls([found])["norms"] == [None]  # type: ignore[index]
