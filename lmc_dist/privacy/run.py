"""From a correction to what is released: the bound, the noise and what it costs, the statement."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import mean_loss, relative_error
from lmc_dist.privacy.certificate import Bound, certificate, sigma_of
from lmc_dist.privacy.conformal import conformal_bound
from lmc_dist.privacy.controls import Residual, control_residuals, draw_requests
from lmc_dist.privacy.covariance import Isotropic, Shape, Subspace
from lmc_dist.privacy.noise import derive_key
from lmc_dist.privacy.seeds import make_seed
from lmc_dist.privacy.theorem import constants_of, passages_of, recursion_bound
from lmc_dist.privacy.utility import Utility, finite, predict
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.kept import load_curvature
from lmc_dist.unlearn.correction import Correction

if TYPE_CHECKING:
    from lmc_dist.unlearn.run import MethodResult, UnlearningRun


def release(
    run: UnlearningRun, main: MethodResult, theta: ShardedVector, reference: ShardedVector | None = None
) -> tuple[Correction, dict[str, Any]]:
    """What goes out in place of a correction, and the `privacy` object of result.json. Collective.

    Args:
        run: With privacy.basis other than off.
        main: What its first method found.
        theta: θ_τ.
        reference: θ_retrain where it is known: a bound that turns out not to hold is none.

    Returns:
        The correction as it is where no noise is added; else θ̂ + noise without the optimizer's state, which no noise
        covers.

    Raises:
        LmcError: The bound is infinite, or the loss would change by more than privacy.max_loss_change.
    """
    settings, correction = run.config.privacy, main.correction
    seed, context = make_seed(settings.seed_file), noise_context(run)
    shape, unmet = shape_of(run)
    bound, controls = find_bound(run, main, theta, shape, derive_key(seed.secret, "controls", context))
    clean = correction.corrected(theta)
    residual = None if reference is None else clean - reference
    bound = replace(bound, unmet=(*bound.unmet, *unmet, *exceeded(bound, shape, residual)))
    sigma = sigma_of(settings, bound)
    found = certificate(settings, bound, sigma, shape.describe())
    found |= {"utility": None, "seed": None, "controls": told_controls(controls)}
    found["residual"] = None if residual is None else residual.norm()
    if sigma == 0:
        return correction, found

    def loss(weights: ShardedVector) -> float:
        return mean_loss(run.module, weights, run.retained_ids(), run.batches)

    def draw_key(i: int) -> bytes:
        return derive_key(seed.secret, f"prediction {i}", context)

    utility = predict(clean, shape, sigma, loss, draw_key, settings.draws)
    if run.runtime.is_main:
        sys.stdout.write(announcement(sigma, shape, utility) + "\n")
        sys.stdout.flush()
    check_loss(utility, settings.max_loss_change)
    released = shape.noisy(clean, derive_key(seed.secret, "noise", context), sigma)
    found["utility"] = {**asdict(utility), "change": utility.change, "released": finite(loss(released))}
    found["seed"] = seed.told
    found["rel_error"] = None if reference is None else relative_error(released, theta, reference)
    return Correction(released - theta, correction.audit, correction.gradients_equivalent, released), found


def noise_context(run: UnlearningRun) -> dict[str, Any]:
    """What decides which noise it is: all that would give other weights, or noise of another size, by one seed."""
    request, privacy = run.request, asdict(run.config.privacy)
    for name in ("seed_file", "draws", "max_loss_change"):
        privacy.pop(name)
    return {
        "log": run.log.fingerprint,
        "request": [request.kind, sorted(request.sample_ids), sorted(request.batch_ids)],
        "unlearn": asdict(run.config.unlearn),
        "privacy": privacy,
    }


def shape_of(run: UnlearningRun) -> tuple[Shape, tuple[str, ...]]:
    """S, and what keeps it from being a shape that the retrained run would have had too. Collective."""
    settings, log = run.config.privacy, run.log
    if settings.subspace is None:
        return Isotropic(), ()
    kept = load_curvature(log.path, settings.subspace, log.layout, log.fingerprint)
    first = run.touched[0].step
    earlier = [window for window in kept.windows if max(window.steps) < first]
    window = (earlier or kept.windows)[-1]
    basis = window.curvature.basis.to(run.runtime.device)
    shape = Subspace(basis, log.layout, [1.0] * len(basis), settings.outside)
    why = (
        f"the noise is shaped by curvature '{settings.subspace}' at steps up to {max(window.steps)}, which depends on what "
        f"is forgotten: no window of it ends before step {first}, the first that holds any of it"
    )
    return shape, () if earlier else (why,)


def find_bound(
    run: UnlearningRun, main: MethodResult, theta: ShardedVector, shape: Shape, draw: bytes
) -> tuple[Bound, list[Residual]]:
    """The bound on the residual, and the controls behind it. Collective."""
    settings = run.config.privacy
    if settings.basis == "exact":
        return Bound("exact", 0.0, 0.0, unmet=inexact(run, main.replay or {})), []
    if settings.basis == "assumed":
        constants, norm = constants_of(settings), settings.bound
        if constants is not None:
            norm, _ = recursion_bound(passages_of(run.log, run.request, run.batches), constants)
        assert norm is not None
        told = {"bound": norm} if constants is None else asdict(constants)
        return Bound("assumed", norm, norm / shape.least, constants=told), []
    if settings.basis == "heuristic":
        return Bound("heuristic"), []
    requests = draw_requests(run.log, run.request, settings, int.from_bytes(draw[:7], "little"))
    with tqdm(total=len(requests), desc="controls", disable=run.progress != "bar") as bar:
        found = control_residuals(run, run.methods()[0], requests, theta, shape.distance, bar.update)
    distance, coverage = conformal_bound([r.distance for r in found], settings.confidence)
    norm, _ = conformal_bound([r.norm for r in found], settings.confidence)
    return Bound("controls", norm, distance, coverage), found


def inexact(run: UnlearningRun, replay: dict[str, Any]) -> tuple[str, ...]:
    """Why a replay may differ from retraining in rounding; nothing where it is known not to."""
    if not replay.get("bit_exact_world_size"):
        return (
            "the replay ran under another engine or on another number of ranks than training: exact but for rounding",
        )
    if not replay.get("verified_steps") and run.touched[0].step > 0:
        return ("no step before the first forgotten one could be compared with its checksum",)
    return ()


def exceeded(bound: Bound, shape: Shape, residual: ShardedVector | None) -> tuple[str, ...]:
    """Whether the residual, where a reference makes it known, is above the bound. Collective."""
    if residual is None or bound.distance is None:
        return ()
    found = shape.distance(residual)
    if found <= bound.distance:
        return ()
    return (f"the residual against the reference is {found:.4g} in the noise's metric, its bound {bound.distance:.4g}",)


def told_controls(controls: list[Residual]) -> dict[str, Any] | None:
    """What result.json says of controls: numbers, not whom they forgot."""
    if not controls:
        return None
    return {
        "norms": [finite(r.norm) for r in controls],
        "distances": [finite(r.distance) for r in controls],
        "failed": [r.why for r in controls if r.why is not None],
        "replay_exact": all(r.exact for r in controls),
    }


def announcement(sigma: float, shape: Shape, utility: Utility) -> str:
    """What the noise will cost, in a line."""

    def told(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    error = "" if utility.standard_error is None else f" ± {utility.standard_error:.2g}"
    return (
        f"noise: σ = {sigma:.4g}, {shape.describe()['kind']}; loss on retained {told(utility.before)} → "
        f"{told(utility.predicted)}{error}, predicted from {2 * utility.pairs} other draws"
    )


def check_loss(utility: Utility, limit: float | None) -> None:
    """Checks that the predicted change of the loss is one that is wanted. Local; the same on every rank.

    Raises:
        LmcError: It is not.
    """
    if limit is not None and not (utility.change is not None and utility.change <= limit):
        change = "past all numbers" if utility.change is None else f"by {utility.change:.4g}"
        raise LmcError(
            f"the noise would change the loss on retained samples {change}, privacy.max_loss_change is {limit:g}: nothing "
            "is written; a better correction has a smaller bound, and a larger ε or exact replay needs less noise or none"
        )
