"""Deviations under propagation, and the watch over their growth."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc_dist.errors import LmcError
from lmc_dist.shards.vector import ShardedVector, dots
from lmc_dist.update_rules import Deviation, UpdateRule

logger = logging.getLogger(__name__)

# ‖v‖ beyond this multiple of all that entered, added up, is divergence: a stable sweep keeps it near or below one.
GROWTH_LIMIT = 1e3
# A PSD curvature within the stability limit never lengthens v; a little room is left for weight changes between steps.
GROWTH_WARNING = 1.05
# With momentum v is lengthened by the steps that its source still takes part in: beyond this multiple of them it is not.
STATE_WARNING = 2.0
RECENT = 10  # steps over which growth is averaged
MOST_NORMS = 256  # kept of a window for the audit


@dataclass
class Window:
    """A deviation under propagation.

    Attributes:
        name: In the audit.
        owner: Unit that it is of.
        tz: Step of its first source.
        last_step: Last step it is propagated through.
        at: (v, dσ).
        v0_norm: ‖v‖ right after the first source.
        norm: ‖v‖.
        entered: How far its sources move θ in their first step, added up.
        skipped: Steps among its sources that the counterfactual run does not take, and that count as its own.
        replayed: Whether its first steps were.
        steps: Steps it was propagated through.
        hvp_calls: Curvature products it took.
        growth_max: Largest growth of ‖v‖ in a step, before its own source is added.
        recent: Growth of ‖v‖ in the last steps.
        paces: ‖v_{s+1} − v_s‖ / ‖v_s‖ in the last steps, where that is watched.
        is_still: Whether it has as good as stopped moving.
        norms: (step, ‖v‖ after it, sources included), for the audit.
    """

    name: str
    owner: str
    tz: int
    last_step: int
    at: Deviation
    v0_norm: float
    norm: float
    entered: float = 0.0
    skipped: list[int] = field(default_factory=list)
    replayed: bool = False
    steps: int = 0
    hvp_calls: int = 0
    growth_max: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    is_still: bool = False
    norms: list[tuple[int, float]] = field(default_factory=list)

    def note(self, step: int) -> None:
        """Takes ‖v‖ after a step down, every 2^k-th step so that there are never more than `MOST_NORMS`. Local."""
        every = self.norms[1][0] - self.norms[0][0] if len(self.norms) > 1 else 1
        if self.norms and (step - self.norms[0][0]) % every:
            return
        self.norms.append((step, self.norm))
        if len(self.norms) > MOST_NORMS:
            self.norms = self.norms[::2]

    def noted(self, end: int) -> list[tuple[int, float]]:
        """The norms that were taken down, and that after its last step. Local."""
        known = list(self.norms)
        return known if known and known[-1][0] == end else [*known, (end, self.norm)]

    @property
    def growth(self) -> float:
        """Mean growth a step of the last steps."""
        logs = [math.log(g) for g in self.recent if g > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0


class GrowthGuard:
    """Stops a window that diverges, tells which have come to rest, and says at the end how near a sweep came to diverging.

    dσ needs no bound of its own: it forgets, so it outgrows its sources only where v does.

    Args:
        rule: The run's update rule.
        tol: A window is still when the mean pace of its last steps, over all steps that are left, is below it; None
            does not watch that.

    Attributes:
        worst: Largest ‖v‖ over what is stable, with the growth there, and the largest growth in a step.
    """

    def __init__(self, rule: UpdateRule, tol: float | None = None) -> None:
        self.rule, self.tol = rule, tol
        self.worst = (0.0, 1.0, 0.0)

    def moved(self, window: Window, v: ShardedVector) -> None:
        """Notes the pace of a window that is about to go to `v`. Collective where paces are watched."""
        if self.tol is None:
            return
        before = window.at.v
        new, across, old = dots([(v, v), (v, before), (before, before)])
        if old > 0:
            window.paces.append(math.sqrt(max(new - 2 * across + old, 0.0) / old))

    def measure(self, windows: Sequence[Window], step: int, tau: int) -> None:
        """Norms of all windows after a step, with one all-reduce. Collective.

        Raises:
            LmcError: A window diverges.
        """
        if not windows:
            return
        squares = iter(dots([(x, x) for window in windows for x in window.at.vectors()]))
        for window in windows:
            norm = _root(next(squares))
            state = {key: _root(next(squares)) for key in window.at.state}
            growth = norm / window.norm if window.norm > 0 else None
            if growth is not None:
                window.recent.append(growth)
                window.growth_max = max(window.growth_max or 0.0, growth)
            stable = self.rule.amplification * window.entered
            has_entered = stable > 0  # at a learning rate of 0 a source moves nothing, and v is rounding
            if not all(map(math.isfinite, (norm, *state.values()))) or (has_entered and norm > GROWTH_LIMIT * stable):
                self._stop(window, step, norm, state)
            if has_entered:
                self.worst = (*max(self.worst[:2], (norm / stable, window.growth)), max(self.worst[2], growth or 0.0))
            window.norm = norm
            if self.tol is not None and len(window.paces) == RECENT:
                window.is_still = sum(window.paces) / RECENT * (tau - 1 - step) < self.tol

    def _stop(self, window: Window, step: int, norm: float, state: dict[str, float]) -> None:
        growth = window.growth if math.isfinite(window.growth) else math.inf
        estimate, limit = self.rule.stability(max(growth, 1.0))
        moments = "".join(f", ‖d {key}‖ = {value:.3g}" for key, value in state.items())
        preconditioned = " (of the curvature as Adam scales it)" if "exp_avg_sq" in state else ""
        raise LmcError(
            f"unit {window.name}: the correction diverged at step {step}, ‖v‖ = {norm:.3g}{moments} after sources of "
            f"{window.entered:.3g} together; it grew {growth:.3g}-fold a step over the last {len(window.recent)} steps, so "
            f"η·λ_max ≈ {estimate:.3g}{preconditioned} where the recursion is stable up to {limit:.3g}. Use a smaller K "
            f"(this window is {window.steps} steps old), hessian_mode GGN where another was used, or replay_head=all"
        )

    def warn(self) -> None:
        """Says where a finished sweep was unstable. Local."""
        ratio, sustained, growth_max = self.worst
        growth = growth_max if self.rule.is_plain else sustained
        if growth <= GROWTH_WARNING or not (self.rule.is_plain or ratio > STATE_WARNING):
            return
        estimate, limit = self.rule.stability(growth)
        logger.warning(
            "the correction grew by up to %.2f a step: η·λ_max ≈ %.2f, beyond %.2f, where the recursion is unstable "
            "although training was not; compare with a replay before trusting it",
            growth,
            estimate,
            limit,
        )


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
