"""What the windows of each unit have found that are through, until the unit is."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmc_dist.shards.vector import ShardedVector
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.windows import Window


@dataclass
class Total:
    """What a unit has found so far.

    Attributes:
        v: Sum of its windows; None before the first is through.
        state: dσ of those that ran to the end.
        behind: Skipped steps among their sources.
        audit: A record a window.
    """

    v: ShardedVector | None = None
    state: dict[str, ShardedVector] = field(default_factory=dict)
    behind: int = 0
    audit: list[AuditRecord] = field(default_factory=list)


class Totals:
    """The totals of all units of a sweep.

    Args:
        left: Units that are not through, with their last step with a source.
        tau: Steps of the run.
    """

    def __init__(self, left: dict[str, int], tau: int) -> None:
        self.left, self.tau = left, tau
        self.sums: dict[str, Total] = {}

    def add(self, window: Window, step: int, record: AuditRecord) -> None:
        """Takes up a window that ends with a step. Local."""
        total = self.sums.setdefault(window.owner, Total())
        total.v = window.at.v if total.v is None else total.v.add_(window.at.v)
        if step == self.tau - 1:
            total.behind += len(window.skipped)
            for key, vector in window.at.state.items():
                total.state[key] = total.state[key].add_(vector) if key in total.state else vector
        total.audit.append(record)

    def is_rest(self, window: Window, step: int) -> bool:
        """Whether a window may stop at a step because it has come to rest: no source of its unit is to come. Local."""
        return window.is_still and step >= self.left[window.owner]

    def take(self, step: int, under_way: set[str]) -> list[tuple[str, Total]]:
        """The units that are through with a step, no longer kept here. Local."""
        names = [u for u, last in self.left.items() if step >= last and u in self.sums and u not in under_way]
        for name in names:
            del self.left[name]
        return [(name, self.sums.pop(name)) for name in names]
