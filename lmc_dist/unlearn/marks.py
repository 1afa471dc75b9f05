"""Marks: the state of a sweep between two steps, on disk, from which it goes on to the bit after an interruption."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import fsync_path, publish_files, read_json, stage_shard_file, write_json
from lmc_dist.trajectory.reader import ShardReader
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
    """

    step: int
    windows: list[Window]
    sums: dict[str, Total]
    left: dict[str, int]
    state: State
    cost: float
    worst: tuple[float, float, float]
    missed: float | None
    basis: int | None = None


class Marks:
    """Where a sweep leaves its marks, `mark-STEP` each; the one before goes only once the next is whole.

    Args:
        folder: Their folder.
        layout: Of the vectors.
        dtype: Of θ and v.
        every: Steps between two marks.
        keep: Earlier ones stay.
    """

    def __init__(self, folder: Path, layout: ShardLayout, dtype: torch.dtype, every: int, keep: bool = False) -> None:
        self.folder, self.layout, self.dtype, self.every, self.keep = folder, layout, dtype, every, keep
        self.newest: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a mark should be left before a step. Local, the same on all ranks."""
        return step >= (self.newest or 0) + self.every

    def save(self, mark: Mark) -> None:
        """Replaces the last mark by this one. Collective."""
        part = self.folder / "mark.part"
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
        vectors = {f"sigma-{key}": vector for key, vector in mark.state.vectors.items()}
        for i, window in enumerate(mark.windows):
            vectors |= {f"window-{i}-v": window.at.v}
            vectors |= {f"window-{i}-{key}": vector for key, vector in window.at.state.items()}
        for i, total in enumerate(mark.sums.values()):
            vectors |= {f"sum-{i}-{key}": vector for key, vector in total.state.items()}
            vectors |= {} if total.v is None else {f"sum-{i}-v": total.v}
        with agreement(self.layout.group):
            publish_files(
                [
                    stage_shard_file(part, self.layout, dict(vector.items()), {"kind": kind}, kind=kind)
                    for kind, vector in vectors.items()
                ]
            )
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                write_json(part / "mark.json", self._description(mark))
                old = [] if self.keep else self._steps()
                part.replace(self.folder / f"mark-{mark.step}")
                fsync_path(self.folder)
                for step in old:
                    shutil.rmtree(self.folder / f"mark-{step}", ignore_errors=True)
        self.newest = mark.step

    def _description(self, mark: Mark) -> dict[str, Any]:
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
            "step": mark.step,
            "partition": self.layout.rule,
            "windows": [plain(window) for window in mark.windows],
            "sums": sums,
            "left": mark.left,
            "counter": mark.state.step,
            "state": list(mark.state.vectors),
            "cost": mark.cost,
            "worst": list(mark.worst),
            "missed": mark.missed,
            "basis": mark.basis,
        }

    def load(self, until: int | None = None) -> Mark | None:
        """The last mark that was left, at the present layout; None where there is none. Collective.

        Args:
            until: Of those of steps up to this one.

        Raises:
            LmcError: It is damaged.
        """
        with agreement(self.layout.group):
            steps = [step for step in self._steps() if until is None or step <= until]
        step = broadcast_object(max(steps, default=None), self.layout.group)
        if step is None:
            return None
        with agreement(self.layout.group):
            folder = self.folder / f"mark-{step}"
            known = read_json(folder / "mark.json")

            def read(kind: str) -> ShardedVector:
                reader = ShardReader(folder, self.layout, known["partition"], f"mark {folder}", kind)
                return reader.read(self.dtype)

            windows = []
            for i, row in enumerate(known["windows"]):
                kinds = row.pop("kinds")
                at = Deviation(read(f"window-{i}-v"), {key: read(f"window-{i}-{key}") for key in kinds})
                recent, paces = (deque(row.pop(key), maxlen=RECENT) for key in ("recent", "paces"))
                norms = [(step, norm) for step, norm in row.pop("norms")]
                windows.append(Window(**row, at=at, recent=recent, paces=paces, norms=norms))
            sums: dict[str, Total] = {}
            for i, (unit, row) in enumerate(known["sums"].items()):
                found = {key: read(f"sum-{i}-{key}") for key in row["kinds"]}
                v = read(f"sum-{i}-v") if row["has_v"] else None
                sums[unit] = Total(v, found, row["behind"], [AuditRecord(**a) for a in row["audit"]])
            state = State({key: read(f"sigma-{key}") for key in known["state"]}, known["counter"])
            self.newest = known["step"]
            return Mark(
                known["step"],
                windows,
                sums,
                known["left"],
                state,
                known["cost"],
                tuple(known["worst"]),  # type: ignore[arg-type]
                known["missed"],
                known["basis"],
            )

    def _steps(self) -> list[int]:
        """Steps that have a mark. After an interruption there can be two, the older one without some of its files."""
        return [int(path.name.removeprefix("mark-")) for path in self.folder.glob("mark-*")]
