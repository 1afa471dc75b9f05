"""Marks: the state of a computation along the steps of a log, on disk, from which it goes on after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import fsync_path, publish_files, read_json, stage_shard_file, write_json
from lmc_dist.trajectory.reader import ShardReader

DESCRIPTION = "mark.json"

# Reads a vector of a mark by its kind, in the given type, at the layout of this rank.
Read = Callable[[str, torch.dtype], ShardedVector]


class MarkFolder:
    """A folder of marks, `mark-STEP` each; the one before goes only once the next is whole.

    Args:
        folder: The folder; made with the first mark.
        layout: Of the vectors.
        every: Steps between two marks.
        keep: Earlier ones stay.

    Attributes:
        newest: Step of the last one that was left or read.
    """

    def __init__(self, folder: Path, layout: ShardLayout, every: int, keep: bool = False) -> None:
        self.folder, self.layout, self.every, self.keep = folder, layout, every, keep
        self.newest: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a mark should be left before a step. Local, the same on all ranks."""
        return step >= (self.newest or 0) + self.every

    def write(self, step: int, vectors: Mapping[str, ShardedVector], about: dict[str, Any]) -> None:
        """Leaves a mark before a step: vectors by kind, and what else is known, as JSON has it. Collective."""
        part = self.folder / "mark.part"
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
        with agreement(self.layout.group):
            publish_files(
                [
                    stage_shard_file(part, self.layout, dict(vector.items()), {"kind": kind}, kind=kind)
                    for kind, vector in vectors.items()
                ]
            )
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                write_json(part / DESCRIPTION, {"step": step, "partition": self.layout.rule, **about})
                old = [] if self.keep else self._steps()
                part.replace(self.folder / f"mark-{step}")
                fsync_path(self.folder)
                for other in old:
                    shutil.rmtree(self.folder / f"mark-{other}", ignore_errors=True)
        self.newest = step

    def last(self, until: int | None = None) -> tuple[dict[str, Any], Read] | None:
        """What the last mark says, and how its vectors are read; None where there is none. Collective.

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
        folder = self.folder / f"mark-{step}"
        with agreement(self.layout.group):
            known = read_json(folder / DESCRIPTION)
            if not isinstance(known, dict) or known.get("step") != step:
                raise LmcError(f"{folder / DESCRIPTION} is damaged: it describes no mark of step {step}")

        def read(kind: str, dtype: torch.dtype) -> ShardedVector:
            return ShardReader(folder, self.layout, known["partition"], f"mark {folder}", kind).read(dtype)

        self.newest = step
        return known, read

    def _steps(self) -> list[int]:
        """Steps that have a mark. After an interruption there can be two, the older one without some of its files."""
        return [int(path.name.removeprefix("mark-")) for path in self.folder.glob("mark-*")]
