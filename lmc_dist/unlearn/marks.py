"""Marks: the state of a sweep between two steps, on disk, from which it goes on to the bit after an interruption."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmc_dist.runtime import agreement
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.marks import MarkFolder
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.totals import Total
from lmc_dist.unlearn.windows import RECENT, Window
from lmc_dist.update_rules import Deviation, State


@dataclass(frozen=True)
class Mark:
    """A sweep before a step.

    Attributes:
        step: The step.
        windows: Vectors under way.
        sums: What units have that are not through, by name.
        left: Units that are not through, with their last step with a source.
        state: σ of the training path.
        cost: Gradients of a whole batch so far.
        worst: See `GrowthGuard`.
        missed: See `StepProducts`.
        basis: `low_rank`: step whose basis was in use.
        felt_until: See `Sweep`: it depends on the corrections that lie behind.
        head: See `Head.to_json`; the trial, if there is one, is the last of the windows.
    """

    step: int
    windows: list[Window]
    sums: dict[str, Total]
    left: dict[str, int]
    state: State
    cost: float
    worst: tuple[float, float, float]
    missed: float | None
    basis: int | None
    felt_until: dict[int, int]
    head: dict[str, Any] | None = None


class Marks(MarkFolder):
    """Where a sweep leaves its marks.

    Args:
        folder: Their folder.
        layout: Of the vectors.
        dtype: Of θ and v.
        every: Steps between two marks.
        keep: Earlier ones stay.
    """

    def __init__(self, folder: Path, layout: ShardLayout, dtype: torch.dtype, every: int, keep: bool = False) -> None:
        super().__init__(folder, layout, every, keep)
        self.dtype = dtype

    def save(self, mark: Mark) -> None:
        """Replaces the last mark by this one. Collective."""
        vectors = {f"sigma-{key}": vector for key, vector in mark.state.vectors.items()}
        for i, window in enumerate(mark.windows):
            vectors |= {f"window-{i}-v": window.at.v}
            vectors |= {f"window-{i}-{key}": vector for key, vector in window.at.state.items()}
        for i, total in enumerate(mark.sums.values()):
            vectors |= {f"sum-{i}-{key}": vector for key, vector in total.state.items()}
            vectors |= {} if total.v is None else {f"sum-{i}-v": total.v}
        self.write(mark.step, vectors, self._description(mark))

    @staticmethod
    def _description(mark: Mark) -> dict[str, Any]:
        def plain(window: Window) -> dict[str, Any]:
            known = {key: value for key, value in vars(window).items() if key != "at"}
            return known | {"recent": list(window.recent), "paces": list(window.paces), "kinds": list(window.at.state)}

        sums = {
            unit: {
                "has_v": total.v is not None,
                "kinds": list(total.state),
                "behind": total.behind,
                "audit": [asdict(record) for record in total.audit],
            }
            for unit, total in mark.sums.items()
        }
        return {
            "windows": [plain(window) for window in mark.windows],
            "sums": sums,
            "left": mark.left,
            "counter": mark.state.step,
            "state": list(mark.state.vectors),
            "cost": mark.cost,
            "worst": list(mark.worst),
            "missed": mark.missed,
            "basis": mark.basis,
            "felt_until": sorted(mark.felt_until.items()),
            "head": mark.head,
        }

    def load(self, until: int | None = None) -> Mark | None:
        """The last mark that was left, at the present layout; None where there is none. Collective.

        Args:
            until: Of those of steps up to this one.

        Raises:
            LmcError: It is damaged.
        """
        found = self.last(until)
        if found is None:
            return None
        known, read_kind = found

        def read(kind: str) -> ShardedVector:
            return read_kind(kind, self.dtype)

        with agreement(self.layout.group):
            windows = []
            for i, row in enumerate(known["windows"]):
                kinds = row.pop("kinds")
                at = Deviation(read(f"window-{i}-v"), {key: read(f"window-{i}-{key}") for key in kinds})
                recent, paces = (deque(row.pop(key), maxlen=RECENT) for key in ("recent", "paces"))
                norms = [(step, norm) for step, norm in row.pop("norms")]
                windows.append(Window(**row, at=at, recent=recent, paces=paces, norms=norms))
            sums: dict[str, Total] = {}
            for i, (unit, row) in enumerate(known["sums"].items()):
                state = {key: read(f"sum-{i}-{key}") for key in row["kinds"]}
                v = read(f"sum-{i}-v") if row["has_v"] else None
                sums[unit] = Total(v, state, row["behind"], [AuditRecord(**a) for a in row["audit"]])
            return Mark(
                known["step"],
                windows,
                sums,
                known["left"],
                State({key: read(f"sigma-{key}") for key in known["state"]}, known["counter"]),
                known["cost"],
                tuple(known["worst"]),  # type: ignore[arg-type]
                known["missed"],
                known["basis"],
                dict(known["felt_until"]),
                known["head"],
            )
