"""What a run with noise needs, checked before any long work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lmc_dist.config import Config, PrivacyConfig
from lmc_dist.errors import LmcError
from lmc_dist.privacy.conformal import check_controls
from lmc_dist.privacy.gaussian import mu_of
from lmc_dist.privacy.seeds import read_seed
from lmc_dist.privacy.theorem import check_theorem, constants_of

if TYPE_CHECKING:
    from lmc_dist.unlearn.run import UnlearningRun


def check_privacy(config: Config, is_main: bool = True) -> None:
    """Checks what does not need the log. Local.

    Args:
        config: Settings.
        is_main: Whether this rank reads the seed, as the first does.

    Raises:
        LmcError: A setting out of bounds, missing, or one that does not go with another.
    """
    settings, unlearn = config.privacy, config.unlearn
    basis = settings.basis
    if basis == "off":
        return
    mu_of(settings.epsilon, settings.delta)
    if settings.draws < 1 or not 0 < settings.outside < math.inf:
        raise LmcError("privacy.draws must be at least 1 and privacy.outside above 0")
    if settings.sigma is not None and not 0 < settings.sigma < math.inf:
        raise LmcError(f"privacy.sigma must be above 0, got {settings.sigma}; privacy.basis off adds no noise")
    if (basis == "exact") != (unlearn.replay_head == "all"):
        raise LmcError(
            "privacy.basis exact is that of exact replay, and of nothing else: it goes with unlearn.replay_head all"
        )
    if basis == "exact":
        if settings.sigma is not None or settings.subspace is not None:
            raise LmcError("privacy.basis exact adds no noise: leave privacy.sigma and privacy.subspace out")
        return
    if basis == "heuristic" and settings.sigma is None:
        raise LmcError(
            "privacy.basis heuristic has no bound that noise could follow from: give its size, privacy.sigma"
        )
    if basis == "controls":
        check_controls(settings.controls, settings.confidence)
        if unlearn.units != "joint":
            raise LmcError("privacy.basis controls measures the joint correction: it goes with unlearn.units joint")
        if settings.groups is not None and config.forget.batches is not None:
            raise LmcError("privacy.groups are groups of samples, and forget.batches forgets batches")
    if basis == "assumed":
        check_assumed(settings)
    if unlearn.store_units:
        raise LmcError(
            "unlearn.store_units keeps the correction without noise beside the model that has it: leave it out"
        )
    if settings.seed_file is not None and is_main:
        read_seed(settings.seed_file)


def check_assumed(settings: PrivacyConfig) -> None:
    """Checks that a bound or its constants are given. Local."""
    constants = constants_of(settings)
    if (constants is None) == (settings.bound is None):
        raise LmcError(
            "privacy.basis assumed takes the bound itself (privacy.bound) or the constants of one (privacy.smoothness, "
            "convexity, lipschitz, curvature_error and source): exactly one of the two"
        )
    if settings.bound is not None and not 0 <= settings.bound < math.inf:
        raise LmcError(f"privacy.bound must be a number ≥ 0, got {settings.bound}")


def check_private_run(run: UnlearningRun) -> None:
    """Checks what needs the log and the request. Local.

    Raises:
        LmcError: Too little data for controls, a log that cannot be replayed, steps that are not the theorem's, or no
            such curvature.
    """
    from lmc_dist.privacy.controls import draw_requests
    from lmc_dist.trajectory.kept import load_curvature

    settings, log = run.config.privacy, run.log
    has_constants = settings.basis == "assumed" and settings.bound is None
    if log.edits and (settings.basis == "controls" or has_constants):
        raise LmcError(
            f"the run was corrected at step {max(log.edits)} while it went on, so other deletions of it are not like this "
            "one, nor is the recursion that of the theorem: privacy.basis exact or assumed with privacy.bound are left"
        )
    if settings.basis == "controls":
        log.require(log.first_step, updates=False)
        log.require(log.first_step)
        draw_requests(log, run.request, settings, seed=0)
    if has_constants:
        check_theorem(log, run.config.unlearn)
    if settings.basis != "off" and settings.subspace is not None:
        load_curvature(log.path, settings.subspace, log.layout, log.fingerprint)
