"""Deviations under propagation, and the watch over their growth."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc_dist.errors import LmcError
from lmc_dist.shards.vector import dots
from lmc_dist.update_rules import Deviation, UpdateRule

logger = logging.getLogger(__name__)

# ‖v‖ beyond this multiple of all that entered, added up, is divergence: a stable sweep keeps it near or below one.
GROWTH_LIMIT = 1e3
# A PSD curvature within the stability limit never lengthens v; a little room is left for weight changes between steps.
GROWTH_WARNING = 1.05
# With momentum v is lengthened by the steps that its source still takes part in: beyond this multiple of them it is not.
STATE_WARNING = 2.0
_RECENT = 10  # steps over which growth is averaged


@dataclass
class Window:
    """A deviation under propagation.

    Attributes:
        unit: Its name in the audit.
        tz: Step of its first source.
        last_step: Last step it is propagated through.
        at: (v, dσ).
        v0_norm: ‖v‖ right after the first source.
        norm: ‖v‖.
        behind: Skipped steps among its sources, by which its optimizer's counter lags behind.
        last_source: Step of its last source, if its first steps were replayed.
        steps: Steps that it was propagated through.
        hvp_calls: Curvature products it took.
        growth_max: Largest growth of ‖v‖ in a step.
        recent: Growth of ‖v‖ in the last steps.
    """

    unit: str
    tz: int
    last_step: int
    at: Deviation
    v0_norm: float
    norm: float
    behind: int = 0
    last_source: int | None = None
    steps: int = 0
    hvp_calls: int = 0
    growth_max: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    @property
    def growth(self) -> float:
        """Mean growth a step of the last steps."""
        logs = [math.log(g) for g in self.recent if g > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0


class GrowthGuard:
    """Stops a sweep that diverges, and says at its end how near it came.

    dσ needs no bound of its own: it forgets, so it outgrows its sources only where v does.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule, self.total = rule, 0.0
        self.worst = (0.0, 1.0)  # ‖v‖ over what is stable, growth there

    def enter(self, size: float) -> None:
        """A source comes in that moves θ by `size` in its first step."""
        self.total += size

    def measure(self, windows: Sequence[Window], step: int) -> None:
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
            stable = self.rule.amplification * max(self.total, 1e-300)
            if not all(map(math.isfinite, (norm, *state.values()))) or norm > GROWTH_LIMIT * stable:
                self._stop(window, step, norm, state)
            self.worst = max(self.worst, (norm / stable, window.growth))
            window.norm = norm

    def _stop(self, window: Window, step: int, norm: float, state: dict[str, float]) -> None:
        growth = window.growth if math.isfinite(window.growth) else math.inf
        estimate, limit = self.rule.stability(max(growth, 1.0))
        moments = "".join(f", ‖d {key}‖ = {value:.3g}" for key, value in state.items())
        preconditioned = " (of the curvature as Adam scales it)" if "exp_avg_sq" in state else ""
        raise LmcError(
            f"unit {window.unit}: the correction diverged at step {step}, ‖v‖ = {norm:.3g}{moments} after sources of "
            f"{self.total:.3g} together; it grew {growth:.3g}-fold a step over the last {len(window.recent)} steps, so "
            f"η·λ_max ≈ {estimate:.3g}{preconditioned} where the recursion is stable up to {limit:.3g}. Use a smaller K "
            f"(this window is {window.steps} steps old), hessian_mode GGN where another was used, or replay_head=all"
        )

    def warn(self, growth_max: float) -> None:
        """Says where a finished sweep was unstable. Local."""
        ratio, sustained = self.worst
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
