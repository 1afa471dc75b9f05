"""Residuals of control deletions: the same method on data nobody asked to forget, each retrained by replay.

For a bound by `conformal` the request and its controls must be exchangeable. A request for k samples that might have
been any k of the log, and m more sets of k from the rest with no sample in two of them, are: any order of the m + 1
disjoint sets is as likely as any other. Sets drawn with overlap among each other, as a planner's may be, would not
be, since none overlaps with the request. Users are not random sets of samples: where they are what is forgotten, the
controls are other users (`group_requests`).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmc_dist.config import PrivacyConfig
from lmc_dist.data import epoch_order
from lmc_dist.errors import LmcError, Stopped
from lmc_dist.logged_run import starting_model
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.tracking import Tracker
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

if TYPE_CHECKING:
    from lmc_dist.unlearn.run import Method, UnlearningRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """θ̂ − θ_retrain of one control.

    Attributes:
        norm: ‖r‖, ∞ where the method gave nothing.
        distance: ‖S^{-1/2} r‖ in the shape of the noise.
        exact: Whether the replay that it was measured against is training to the bit.
        why: What the method failed with.
    """

    norm: float
    distance: float
    exact: bool
    why: str | None = None


def disjoint_requests(log: TrajectoryLog, request: Counterfactual, count: int, seed: int) -> list[Counterfactual]:
    """`count` random requests like `request`, of as many samples or batches, none of which is in two or in it. Local.

    Args:
        log: Whose data they are drawn from, as far as all steps that hold it can be replayed.
        request: Samples without batches, or batches.
        count: m.
        seed: Of the draw.

    Raises:
        LmcError: The log holds too little else.
    """
    is_batches = bool(request.batch_ids)
    there, gone = held_data(log, is_batches)
    wanted = request.batch_ids or request.sample_ids
    size, rest = len(wanted & (there | gone)), there - gone - wanted
    what = "batches" if is_batches else "samples"
    if count * size > len(rest):
        raise LmcError(
            f"privacy.controls={count} deletions of {size} {what} each, none in two of them, take {count * size}, and the "
            f"log holds {len(rest)} besides the request: split the request, or lower privacy.confidence and controls"
        )
    order = epoch_order(rest, seed, 0)
    drawn = [frozenset(order[i * size : (i + 1) * size]) for i in range(count)]
    if is_batches:
        return [Counterfactual(request.kind, batch_ids=ids) for ids in drawn]
    return [Counterfactual(request.kind, sample_ids=ids) for ids in drawn]


def held_data(log: TrajectoryLog, is_batches: bool) -> tuple[set[int], set[int]]:
    """Samples or batches of the steps that can be replayed, and of those that no longer can. Local."""

    def held(kept: bool) -> set[int]:
        chosen = [r for r in log.records() if r.applied and (r.step >= log.first_step) == kept]
        return {r.batch_id for r in chosen} if is_batches else {i for r in chosen for i in r.sample_ids}

    return held(kept=True), held(kept=False)


def group_requests(
    log: TrajectoryLog, request: Counterfactual, groups: Mapping[str, Sequence[int]], count: int, seed: int
) -> list[Counterfactual]:
    """`count` random groups other than the one that the request is. Local.

    Args:
        log: Whose data they are.
        request: All samples of one of the groups that were trained on.
        groups: Disjoint, by name.
        count: m.
        seed: Of the draw.

    Raises:
        LmcError: Groups that overlap, a request that is none of them, or too few that can be replayed.
    """
    there, gone = held_data(log, is_batches=False)
    trained = [frozenset(ids) & (there | gone) for _, ids in sorted(groups.items())]
    if sum(map(len, trained)) != len(frozenset().union(*trained)):
        raise LmcError("privacy.groups: a sample is in two groups, which could then not be forgotten one for the other")
    if request.sample_ids & (there | gone) not in trained:
        raise LmcError(
            "privacy.groups: the request is for none of the groups as a whole, so that they are no controls of it"
        )
    rest = [ids for ids in trained if ids and ids <= there - gone and ids != request.sample_ids & there]
    if count > len(rest):
        raise LmcError(f"privacy.controls={count}, and privacy.groups has {len(rest)} others that can be replayed")
    drawn = epoch_order(range(len(rest)), seed, 0)[:count]
    return [Counterfactual(request.kind, sample_ids=rest[i]) for i in drawn]


def read_groups(path: str | Path) -> dict[str, list[int]]:
    """Groups from a JSON file. Local.

    Raises:
        LmcError: It holds none.
    """
    try:
        named = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # also of text that is no UTF-8
        raise LmcError(f"privacy.groups is a JSON file {{name: [ids]}}; {path}: {error}") from error
    if not isinstance(named, dict) or not all(
        isinstance(ids, list) and all(type(i) is int for i in ids) for ids in named.values()
    ):
        raise LmcError(f"privacy.groups: {path} must be an object of names with lists of ids")
    return named


def draw_requests(
    log: TrajectoryLog, request: Counterfactual, settings: PrivacyConfig, seed: int
) -> list[Counterfactual]:
    """The controls that the settings ask for. Local.

    Raises:
        LmcError: As of `disjoint_requests`, `group_requests` and `read_groups`.
    """
    if settings.groups is None:
        return disjoint_requests(log, request, settings.controls, seed)
    return group_requests(log, request, read_groups(settings.groups), settings.controls, seed)


def control_residuals(
    run: UnlearningRun,
    method: Method,
    requests: Sequence[Counterfactual],
    theta: ShardedVector,
    distance: Callable[[ShardedVector], float],
    progress: Callable[[], None] = lambda: None,
) -> list[Residual]:
    """Residuals of a method on control requests, against replay. Collective.

    Args:
        run: Whose method and log they are.
        method: Any but replay.
        requests: Controls.
        theta: θ_τ.
        distance: ‖S^{-1/2} r‖. Collective.
        progress: Called after each.
    """
    engine = replay_engine(starting_model(run.config, run.model_config, run.log), run.log)
    found = []
    for request in requests:
        result = replay(engine, run.log, run.batches, request)
        reference = relayout(result.theta, theta.layout).to(device=theta.flat.device)
        try:
            weights = run_on(run, request).compute(method, theta).correction.corrected(theta)
        except Stopped:
            raise
        except LmcError as error:  # divergence, the same on all ranks: as far off as can be, not left out
            logger.warning("a control deletion has no correction and counts as infinitely far off: %s", error)
            found.append(Residual(float("inf"), float("inf"), result.exact, str(error)))
        else:
            residual = weights - reference
            found.append(Residual(residual.norm(), distance(residual), result.exact))
        progress()
    engine.destroy()
    return found


def run_on(run: UnlearningRun, request: Counterfactual) -> UnlearningRun:
    """The same run with another request, silent and without marks. Local."""
    other = copy.copy(run)
    other.request = request
    other.touched = [record for record in run.log.records() if record.applied and request.touches(record)]
    unlearn = replace(run.config.unlearn, mark_every=None)
    other.config, other.tracker = replace(run.config, unlearn=unlearn, progress="none"), Tracker()
    return other
