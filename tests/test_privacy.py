"""The arithmetic of releases: bounds, noise, composition; against numerical integration, simulation and dp-accounting."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from scipy import integrate, special, stats

from lmc_dist.config import Config, ForgetConfig, PrivacyConfig, UnlearnConfig
from lmc_dist.errors import LmcError
from lmc_dist.privacy.certificate import CERTIFIED, COVERED, HEURISTIC, ON_WORD, UNPROVEN, Bound, certificate, sigma_of
from lmc_dist.privacy.checks import check_privacy, check_private_run
from lmc_dist.privacy.composition import Release, compose, weakest
from lmc_dist.privacy.conformal import beta_quantile, conformal_bound, needed_controls, rank_of
from lmc_dist.privacy.covariance import Isotropic, Shape, Subspace
from lmc_dist.privacy.gaussian import delta_of, epsilon_of, mu_of
from lmc_dist.privacy.noise import BLOCK, add_normal_, derive_key, normal_block
from lmc_dist.privacy.seeds import read_seed, seed_digest
from lmc_dist.privacy.theorem import Constants, Passage, recursion_bound
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import ShardedVector

ROUND = Isotropic().describe()

# --- the Gaussian mechanism --------------------------------------------------------------------------------------------


def integrated_delta(epsilon: float, mu: float) -> float:
    """∫ max(φ(x − μ) − e^ε φ(x), 0) dx: the definition, without a closed form."""

    def excess(x: float) -> float:
        return max(float(stats.norm.pdf(x, mu) - math.exp(epsilon + stats.norm.logpdf(x))), 0.0)

    start = epsilon / mu + mu / 2  # where the densities' ratio is e^ε
    return sum(
        integrate.quad(excess, start + low, start + high, epsabs=0, epsrel=1e-12, limit=200)[0]
        for low, high in ((0, 1), (1, 4), (4, 30))
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 3.0, 8.0])
def test_delta_is_that_of_numerical_integration(epsilon: float, mu: float) -> None:
    wanted = integrated_delta(epsilon, mu)
    assert delta_of(epsilon, mu) == pytest.approx(wanted, rel=1e-9, abs=1e-290)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.05, 0.9])
def test_calibration_is_tight_and_on_the_safe_side(epsilon: float, delta: float) -> None:
    mu = mu_of(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta < delta_of(epsilon, mu * (1 + 1e-9))
    found = epsilon_of(mu, delta)
    assert found == pytest.approx(epsilon, rel=1e-9, abs=1e-9) and delta_of(found, mu) <= delta
    if 0 < epsilon < 1:  # the classical choice is more noise than needed
        assert 1 / mu < math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def test_calibration_of_noise_against_dp_accounting() -> None:
    accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: make peers")
    for epsilon in (0.1, 1.0, 8.0):
        for delta in (1e-9, 1e-5, 1e-2):
            assert 1 / mu_of(epsilon, delta) == pytest.approx(accounting.get_sigma_gaussian(epsilon, delta), rel=1e-9)


def test_what_the_mechanism_refuses() -> None:
    for call in (partial(delta_of, -1.0, 1.0), partial(delta_of, 1.0, math.nan), partial(epsilon_of, math.inf, 1e-5)):
        with pytest.raises(LmcError):
            call()
    with pytest.raises(LmcError, match=r"privacy\.delta must be between 0 and 1"):
        mu_of(1.0, 0.0)
    with pytest.raises(LmcError, match=r"privacy\.epsilon must be"):
        mu_of(-0.1, 1e-5)
    assert delta_of(0.0, 0.0) == 0 and epsilon_of(0.0, 1e-5) == 0 and delta_of(3.0, math.inf) == 1


# --- composition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mus", [[0.7], [0.3, 0.5, 0.2], [1.0] * 5, [0.05] * 30, [0.0, 2.0, 0.01]])
def test_composition_against_dp_accounting(mus: list[float]) -> None:
    accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: make peers")
    from dp_accounting import rdp
    from dp_accounting.pld import pld_privacy_accountant

    exact = pld_privacy_accountant.PLDAccountant(value_discretization_interval=5e-5)
    orders = np.linspace(1.01, 200, 500)
    moments = rdp.RdpAccountant(orders)
    for mu in mus:
        if mu > 0:
            for accountant in (exact, moments):
                accountant.compose(accounting.GaussianDpEvent(1 / mu))
    for delta in (1e-6, 1e-3):
        epsilon, total = compose([Release(mu) for mu in mus], delta)
        assert total == delta
        assert epsilon == pytest.approx(exact.get_epsilon(delta), abs=1e-6)
        # Rényi's order α of the composition is α μ²/2; turned into (ε, δ) it is an upper bound.
        assert epsilon <= moments.get_epsilon(delta)


def test_failures_of_bounds_add_up_and_what_has_no_bound_composes_with_nothing() -> None:
    covered, word = Release(0.5, 0.1, "controls"), Release(0.2, 0.0, "assumed")
    epsilon, delta = compose([covered, word, Release(0.0)], 1e-5)
    assert delta == pytest.approx(0.10001)
    assert epsilon == pytest.approx(epsilon_of(math.hypot(0.5, 0.2), 1e-5), rel=1e-12)
    assert weakest([covered, Release(0.0)]) == "controls" and weakest([word, covered]) == "assumed"
    assert compose([], 1e-5) == (0.0, 1e-5) and weakest([]) == "exact"
    with pytest.raises(LmcError, match="of 10 releases fail"):
        compose([covered] * 10, 1e-5)
    with pytest.raises(LmcError, match="without a residual bound"):
        Release.of_result(certificate(PrivacyConfig(), Bound("heuristic"), 0.1, ROUND))
    found = certificate(PrivacyConfig(), Bound("assumed", 1.0, 1.0, constants={"bound": 1.0}), 4.0, ROUND)
    assert Release.of_result(found) == Release(found["mu"], 0.0, "assumed")
    for mu, failure, basis in ((math.inf, 0.0, "exact"), (1.0, 1.5, "exact"), (1.0, 0.0, "heuristic")):
        with pytest.raises(LmcError):
            Release(mu, failure, basis)  # type: ignore[arg-type]


# --- bounds ------------------------------------------------------------------------------------------------------------


def test_rank_and_number_of_controls_are_those_of_exact_arithmetic() -> None:
    assert [needed_controls(c) for c in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]
    assert [rank_of(m, 0.9) for m in (9, 19, 20, 29, 99)] == [9, 18, 19, 27, 90]
    assert rank_of(199, 0.95) == 190  # 200 · 0.95 is above 190 in floating point
    with pytest.raises(LmcError, match="at least 9"):
        conformal_bound([1.0] * 8, 0.9)
    bound, coverage = conformal_bound([*range(18, 0, -1), math.inf], 0.9)
    assert bound == 18 and coverage.level == 0.9 and coverage.rank == 18
    assert math.isinf(conformal_bound([1.0] * 8 + [math.inf], 0.9)[0])


def test_coverage_does_not_depend_on_how_residuals_are_distributed() -> None:
    rng = np.random.default_rng(0)
    for draw in (rng.standard_cauchy, rng.standard_normal, lambda size: rng.pareto(0.5, size)):
        residuals = np.abs(draw((4000, 20)))
        held = [row[0] <= conformal_bound(row[1:].tolist(), 0.9)[0] for row in residuals]
        low, high = stats.binomtest(sum(held), len(held)).proportion_ci(0.999)
        assert low <= 0.9 <= high  # and not more: the bound is no wider than it must be
        empirical = [row[0] <= np.quantile(row[1:], 0.9, method="inverted_cdf") for row in residuals]
        assert sum(empirical) <= sum(held)


def test_coverage_given_the_controls_is_beta_distributed() -> None:
    for a, b, share in ((18, 2, 0.05), (9, 1, 0.05), (90, 10, 0.5)):
        assert beta_quantile(a, b, share) == pytest.approx(stats.beta.ppf(share, a, b), abs=1e-9)
    rng = np.random.default_rng(1)
    given = [
        conformal_bound(rng.random(19).tolist(), 0.9)[0] for _ in range(4000)
    ]  # uniform: the bound is the coverage
    _, coverage = conformal_bound(rng.random(19).tolist(), 0.9)
    assert np.mean(np.array(given) >= coverage.low) == pytest.approx(0.95, abs=0.015)


def logistic_runs(seed: int, mode: str) -> tuple[float, float, list[Passage], Constants]:
    """(‖v − w‖, ‖w‖, steps, constants) of logistic regression with weight decay in its loss, in float64."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((60, 4)), rng.integers(0, 2, 60)
    ridge, steps, forgotten = 0.1, 30, {3, 17, 40}
    order = [rng.permutation(60)[:12] for _ in range(steps)]
    theta, other, v = (np.zeros(4) for _ in range(3))
    norms = np.linalg.norm(x, axis=1)
    passages = []
    source = 0.0

    def gradient(at: np.ndarray, ids: np.ndarray) -> np.ndarray:
        p = special.expit(x[ids] @ at)
        return x[ids].T @ (p - y[ids]) / 12 + ridge * at

    def hessian(at: np.ndarray, ids: np.ndarray) -> np.ndarray:
        p = special.expit(x[ids] @ at)
        return x[ids].T @ (x[ids] * (p * (1 - p))[:, None]) / 12 + ridge * np.eye(4)

    worst = 0.0
    for step, ids in enumerate(order):
        lr = 0.4 / (1 + 0.05 * step)
        kept = np.array([i for i in ids if i not in forgotten])
        b = gradient(theta, kept) - gradient(theta, ids)
        curvature = hessian(theta, kept)
        used = curvature if mode == "exact" else np.diag(np.diag(curvature))
        worst = max(worst, np.linalg.norm(used - curvature, 2))
        source = max(source, float(np.linalg.norm(b)))
        theta, other, v = (
            theta - lr * gradient(theta, ids),
            other - lr * gradient(other, kept),
            v - lr * (b + used @ v),
        )
        passages.append(Passage(lr, "source" if len(kept) < 12 else "plain"))
    # p(1 − p) ≤ 1/4 with derivative ≤ 1/(6√3); the largest sums over any batch of 12
    most = ridge + np.sort(norms**2)[-12:].sum() / 48
    lipschitz = np.sort(norms**3)[-12:].sum() / 12 / (6 * math.sqrt(3))
    constants = Constants(most, ridge, lipschitz, 0.0 if mode == "exact" else worst, source)
    return float(np.linalg.norm(v - (other - theta))), float(np.linalg.norm(other - theta)), passages, constants


@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_the_bound_from_constants_holds_on_a_problem_whose_constants_are_known(mode: str) -> None:
    for seed in range(20):
        residual, deviation, passages, constants = logistic_runs(seed, mode)
        bound, moved = recursion_bound(passages, constants)
        assert 0 < residual <= bound and deviation <= moved


def test_the_bound_from_constants_is_attained_and_follows_skipped_steps() -> None:
    # One parameter, L = h x²/2 and a curvature that is off by E: |1 − ηh| = c, nothing is lost in any inequality.
    h, error, lr, source = 2.0, 0.5, 0.1, 3.0
    w = r = 0.0
    passages = []
    for step in range(9):
        kind = "source" if step == 0 else "skipped" if step == 4 else "plain"
        passages.append(Passage(lr, kind, 0.7))  # type: ignore[arg-type]
        if kind == "skipped":
            w += 0.7
        else:
            r, w = (1 - lr * h) * r + lr * error * w, (1 - lr * h) * w + (lr * source if kind == "source" else 0)
    found = recursion_bound(passages, Constants(h, h, 0.0, error, source))
    assert found == (pytest.approx(r, rel=1e-12), pytest.approx(w, rel=1e-12))
    with pytest.raises(LmcError, match="infinite"):
        recursion_bound([Passage(1.0, "source"), *[Passage(1.0, "plain")] * 5000], Constants(9.0, 0.0, 1.0, 1.0, 1.0))
    for wrong in ((1.0, 2.0, 0.0, 0.0, 1.0), (1.0, 0.0, -1.0, 0.0, 1.0), (math.inf, 0.0, 0.0, 0.0, 1.0)):
        with pytest.raises(LmcError):
            Constants(*wrong)


# --- noise -------------------------------------------------------------------------------------------------------------

PARAMS = [ParamSpec("wide", (3, 50_000)), ParamSpec("a", (7, 5)), ParamSpec("scalar", ()), ParamSpec("b", (1,))]
KEY = derive_key(bytes(range(32)), "noise", {"log": "x"})


def whole_noise(world_size: int, rule: Any) -> dict[str, torch.Tensor]:
    """What ranks make by themselves, put together."""
    found = {spec.name: torch.full((spec.numel,), math.nan) for spec in PARAMS}
    for rank in range(world_size):
        layout = ShardLayout(PARAMS, rank, world_size, rule)
        vector = add_normal_(ShardedVector.zeros(layout), KEY, 0.3)
        used = sum(len(values) for _, values in vector.items())
        assert int((vector.flat != 0).sum()) == used  # padding stays zero
        for slot in layout:
            found[slot.spec.name][slot.start : slot.end] = vector[slot.spec.name]
    return found


def test_noise_has_the_same_bits_at_every_world_size() -> None:
    wanted = whole_noise(1, "zero3")
    assert not any(bool(x.isnan().any()) for x in wanted.values())
    cuts = [(1, "fsdp2"), (2, "zero3"), (2, "fsdp2"), (3, "zero3"), (5, "fsdp2"), (7, "zero3")]
    for world_size, rule in [*cuts, (4, "hsdp-2"), (6, "hsdp-3")]:
        found = whole_noise(world_size, rule)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), (world_size, rule)


def test_noise_is_normal_and_independent_in_every_direction() -> None:
    z = torch.cat([normal_block(KEY, "wide", block) for block in range(16)]).numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and abs(z.std() - 1) < 4 / math.sqrt(2 * len(z))
    assert stats.kstest(z**2, "chi2", (1,)).pvalue > 1e-3 and abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / len(z))
    others = [
        normal_block(KEY, "wide", 1),
        normal_block(KEY, "wid", 0),
        normal_block(derive_key(bytes(range(32)), "noise", {"log": "y"}), "wide", 0),
        normal_block(derive_key(bytes(range(32)), "prediction 0", {"log": "x"}), "wide", 0),
        normal_block(derive_key(bytes(range(1, 33)), "noise", {"log": "x"}), "wide", 0),
    ]
    first = normal_block(KEY, "wide", 0)
    for other in others:
        assert abs(float(first @ other) / BLOCK) < 5 / math.sqrt(BLOCK)
    assert torch.equal(normal_block(KEY, "wide", 0, 100), first[:100])


def test_both_tails_reach_as_far_and_nothing_is_infinite() -> None:
    extremes = torch.tensor([0.5 * 2.0**-64, 2.0**-65 * 3, 0.25, 0.5], dtype=torch.float64)
    np.testing.assert_allclose(torch.special.ndtri(extremes).numpy(), special.ndtri(extremes.numpy()), rtol=1e-13)
    assert -9.3 < float(torch.special.ndtri(extremes)[0]) < -9


def small_subspace(seed: int = 0, skew: float = 0.0) -> tuple[Subspace, torch.Tensor, ShardLayout]:
    """(shape of 3 directions of 9 parameters, dense S^{1/2}, layout), the directions nearly orthonormal."""
    layout = ShardLayout([ParamSpec("a", (2, 3)), ParamSpec("b", (3,))])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64)).Q.T
    given = rows + skew * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    inside, outside = [1.0, 2.5, 0.5], 0.25
    shape = Subspace(given.float(), layout, inside, outside)
    q = shape.basis.double()
    dense = (
        outside * (torch.eye(9, dtype=torch.float64) - q.T @ q) + q.T @ torch.diag(torch.tensor(inside).double()) @ q
    )
    return shape, dense, layout


@pytest.mark.parametrize("skew", [0.0, 1e-3])
def test_a_shaped_covariance_is_the_one_it_says(skew: float) -> None:
    shape, dense, layout = small_subspace(skew=skew)
    assert torch.allclose(shape.basis @ shape.basis.T, torch.eye(3), atol=1e-6)
    residual = ShardedVector(layout, torch.randn(9, generator=torch.Generator().manual_seed(3)))
    wanted = torch.linalg.solve(dense, residual.flat.double()).norm()
    assert shape.distance(residual) == pytest.approx(float(wanted), rel=1e-5)
    assert shape.least == 0.25 and shape.distance(residual) <= residual.norm() / shape.least
    zero = ShardedVector.zeros(layout)
    draws = torch.stack([shape.noisy(zero, KEY[:28] + i.to_bytes(4, "little"), 2.0).flat for i in range(20_000)])
    found, covariance = torch.cov(draws.double().T), 4 * dense @ dense
    spread = torch.sqrt((covariance.diag()[:, None] * covariance.diag() + covariance.square()) / len(draws))
    assert float(((found - covariance) / spread).abs().max()) < 5
    with pytest.raises(LmcError, match="not orthonormal"):
        Subspace(torch.ones(2, 9), layout, [1.0, 1.0], 1.0)
    with pytest.raises(LmcError, match="standard deviation > 0"):
        Subspace(torch.eye(9)[:2], layout, [1.0, 0.0], 1.0)


@pytest.mark.parametrize("split", [0.0, 0.6, 1.0])
def test_little_noise_outside_the_subspace_is_paid_for(split: float) -> None:
    """δ of the actual Gaussians in the plane, integrated over it, for residuals inside, outside and between."""
    layout = ShardLayout([ParamSpec("a", (2,))])
    shape: Shape = Subspace(torch.tensor([[1.0, 0.0]]), layout, [1.0], 0.5)
    residual = ShardedVector(layout, torch.tensor([math.sqrt(1 - split**2), split]))
    sigma, epsilon = 1.3, 0.7
    mu = shape.distance(residual) / sigma
    scale, r = np.array([sigma, sigma / 2]), residual.flat.double().numpy()
    x, y = np.meshgrid(np.linspace(-9, 9, 2401), np.linspace(-9, 9, 2401), indexing="ij")

    def density(mean: np.ndarray) -> np.ndarray:
        return stats.norm.pdf(x, mean[0], scale[0]) * stats.norm.pdf(y, mean[1], scale[1])

    excess = np.clip(density(r) - math.exp(epsilon) * density(np.zeros(2)), 0, None)
    wanted = integrate.simpson(integrate.simpson(excess, x=y[0], axis=1), x=x[:, 0])
    assert delta_of(epsilon, mu) == pytest.approx(float(wanted), rel=1e-4)
    assert mu == pytest.approx(math.hypot(r[0], 2 * r[1]) / sigma)  # half the noise outside counts twice


# --- seeds, settings, statements ---------------------------------------------------------------------------------------


def test_a_seed_is_read_and_never_shown(tmp_path: Path) -> None:
    file, secret = tmp_path / "seed", "5e" * 32
    file.write_text(secret + "\n")
    assert read_seed(file) == bytes.fromhex(secret)
    assert seed_digest(read_seed(file), "00" * 16) != seed_digest(read_seed(file), "01" * 16)
    for wrong in ("42", "5e" * 31, "xy" * 32, "é" * 64):
        file.write_text(wrong)
        with pytest.raises(LmcError, match="64 hexadecimal digits") as caught:
            read_seed(file)
        assert wrong not in str(caught.value).replace(str(file), "")
    with pytest.raises(LmcError, match="64 hexadecimal digits"):
        read_seed(tmp_path / "nowhere")


BATCH = ForgetConfig(batches="3")
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "basis exact is that of exact replay": ({"basis": "exact"}, {}),
    "goes with unlearn.replay_head all": ({"basis": "controls"}, {"replay_head": "all"}),
    "basis exact adds no noise": ({"basis": "exact", "sigma": 1.0}, {"replay_head": "all"}),
    "heuristic has no bound": ({"basis": "heuristic"}, {}),
    "at least 9": ({"basis": "controls", "controls": 8}, {}),
    "confidence must be between 0 and 1": ({"basis": "controls", "confidence": 1.0}, {}),
    "measures the joint correction": ({"basis": "controls"}, {"units": "sample"}),
    "privacy.groups are groups of samples": ({"basis": "controls", "groups": "x.json"}, {}),
    "exactly one of the two": ({"basis": "assumed"}, {}),
    "needs privacy.convexity, privacy.lipschitz": ({"basis": "assumed", "smoothness": 1.0, "source": 1.0}, {}),
    "bound must be a number": ({"basis": "assumed", "bound": -1.0}, {}),
    "sigma must be above 0": ({"basis": "heuristic", "sigma": 0.0}, {}),
    "epsilon must be a number": ({"basis": "assumed", "bound": 1.0, "epsilon": -1.0}, {}),
    "delta must be between": ({"basis": "assumed", "bound": 1.0, "delta": 0.0}, {}),
    "draws must be at least 1": ({"basis": "assumed", "bound": 1.0, "draws": 0}, {}),
    "keeps the correction without noise": ({"basis": "assumed", "bound": 1.0}, {"store_units": True}),
    "does not hold 64": ({"basis": "assumed", "bound": 1.0, "seed_file": "/nowhere"}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_say_nothing_are_refused(message: str) -> None:
    privacy, unlearn = REFUSED[message]
    with pytest.raises(LmcError, match=message.replace(".", r"\.")):
        check_privacy(Config(privacy=PrivacyConfig(**privacy), unlearn=UnlearnConfig(**unlearn), forget=BATCH))
    check_privacy(Config(privacy=replace(PrivacyConfig(**privacy), basis="off")))


def test_a_run_that_was_corrected_on_its_way_has_no_controls() -> None:
    log = SimpleNamespace(edits={4: None})
    for privacy in (PrivacyConfig("controls"), PrivacyConfig("assumed", smoothness=1.0)):
        run: Any = SimpleNamespace(config=Config(privacy=privacy), log=log)
        with pytest.raises(LmcError, match="was corrected at step 4 while it went on"):
            check_private_run(run)
    word: Any = SimpleNamespace(config=Config(privacy=PrivacyConfig("assumed", bound=1.0)), log=log)
    check_private_run(word)


def test_what_is_said_is_what_the_bound_rests_on() -> None:
    settings = PrivacyConfig(epsilon=1.0, delta=1e-5)
    residuals = [float(i) for i in range(1, 20)]
    norm, coverage = conformal_bound(residuals, 0.9)
    covered = Bound("controls", norm, norm, coverage)
    sigma = sigma_of(settings, covered)
    found = certificate(settings, covered, sigma, ROUND)
    assert found["certified"] == COVERED and "certified" not in found["statement"]
    assert found["epsilon"] == pytest.approx(1.0, rel=1e-9) and found["epsilon"] <= 1 and found["delta"] == 1e-5
    assert found["delta_total"] == pytest.approx(0.1 + 1e-5) and found["failure"] == pytest.approx(0.1)
    assert "probability 0.9" in found["statement"] and "19 control deletions" in found["statement"]
    assert sigma == pytest.approx(18 / mu_of(1.0, 1e-5), rel=2e-6)

    word = certificate(settings, Bound("assumed", 2.0, 2.0, constants={"bound": 2.0}), 8.0, ROUND)
    assert word["certified"] == ON_WORD and "user's word" in word["statement"]
    assert word["epsilon"] == pytest.approx(epsilon_of(0.25, 1e-5), rel=1e-5)

    exact = Bound("exact", 0.0, 0.0)
    assert sigma_of(settings, exact) == 0
    found = certificate(settings, exact, 0.0, ROUND)
    assert (found["certified"], found["epsilon"], found["delta"]) == (CERTIFIED, 0.0, 0.0)
    found = certificate(settings, replace(exact, unmet=("it rounds otherwise",)), 0.0, ROUND)
    assert found["certified"] == UNPROVEN and found["epsilon"] is None and "it rounds otherwise" in found["statement"]

    unmet = replace(covered, unmet=("its shape depends on the data",))
    for bound in (Bound("heuristic"), unmet):
        found = certificate(settings, bound, 1.0, ROUND)
        assert found["certified"] == HEURISTIC and found["epsilon"] is None and found["delta_total"] is None
        assert found["statement"].startswith("heuristic noise: no (ε, δ) is claimed")
    with pytest.raises(LmcError, match="no noise hides this residual"):
        sigma_of(settings, Bound("controls", math.inf, math.inf, coverage))


# --- the command line and the page -------------------------------------------------------------------------------------


def test_the_command_line_knows_the_settings_and_refuses_to_put_noiseless_weights_together(tmp_path: Path) -> None:
    from lmc_dist.cli import parse
    from lmc_dist.commands.run import unlearn_work

    options = ["--privacy.basis", "assumed", "--privacy.bound", "0.5", "--privacy.delta", "1e-6", "--undo", "sample-3"]
    config = parse("unlearn", options)
    assert config.privacy == PrivacyConfig("assumed", delta=1e-6, bound=0.5) and Config().privacy.basis == "off"
    with pytest.raises(LmcError, match=r"without noise: set privacy\.basis off"):
        unlearn_work(config, None)


def test_what_the_page_says_of_composition_and_controls_is_so() -> None:
    page = (REPO / "docs" / "privacy.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert (found["epsilon"], found["delta"]) == (epsilon_of(0.5, 1e-5), pytest.approx(0.01001))
    assert [needed_controls(c) for c in (0.9, 0.95, 0.99)] == [
        9,
        19,
        99,
    ] and "9 for 90 %, 19 for 95 %, 99 for 99 %" in page
    low = [conformal_bound([0.0] * m, 0.9)[1].low for m in (9, 99)]
    told = re.search(r"With 9 controls that is\s(0\.\d\d), with 99 it is (0\.\d\d)", page)
    assert told is not None and list(told.groups()) == [f"{x:.2f}" for x in low]
