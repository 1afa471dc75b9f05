"""Corrections of many units: in groups of ranks, in blocks, kept on disk as they are found, gone on with after a stop.

    folder/work.json          which request this is, and how it is computed
    folder/units/NAME/        a finished unit: v, dσ, audit
    folder/passes/DIGEST/     a pass that is under way: its last mark, or all of them
    folder/marks/             all marks of a finished pass, if they are kept

Units that go along the trajectory together form a pass (`units.passes_of`); groups take passes from a queue.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agree, agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import fsync_path, read_json, write_json
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.correction import Correction, load_full_correction
from lmc_dist.unlearn.head import Head
from lmc_dist.unlearn.marks import Marks
from lmc_dist.unlearn.problem import Problem, SweepResult
from lmc_dist.unlearn.status import Progress, Status, unwatched
from lmc_dist.unlearn.sweep import Sweep
from lmc_dist.unlearn.unit_mesh import unit_mesh
from lmc_dist.unlearn.units import Unit, passes_of

logger = logging.getLogger(__name__)


def correct_units(
    problem: Problem,
    units: Sequence[Unit],
    folder: Path,
    make_module: Callable[[ShardLayout], ShardedModule] | None = None,
    num_groups: int = 1,
    width: int = 8,
    mark_every: int | None = 50,
    progress: Progress = unwatched,
    keep_marks: bool = False,
    head: Head | None = None,
) -> Correction:
    """Corrects every unit by itself and adds them up. Collective.

    Args:
        problem: On the layout of all ranks; its counterfactual is that of all units together.
        units: Of the request.
        folder: Where finished units and marks are; what an earlier run of the same request left there is used.
        make_module: Makes the model on the shards of a group of ranks; needed with several groups.
        num_groups: Groups of ranks.
        width: Vectors that go along the trajectory together.
        mark_every: Steps between two marks of a pass; None leaves none.
        progress: Called on the first rank of each group.
        keep_marks: Keep all marks of a single pass, in `folder/marks`.
        head: Steps to replay first, for a single unit that is the whole request.

    Returns:
        The sum of all units' corrections, in the order of their names whatever computed them, with all their audits.

    Raises:
        LmcError: A unit diverged (the others' finished work stays in `folder`), the folder is of another request, no unit
            was trained on, groups that do not divide the ranks.
    """
    log = problem.trajectory
    assert isinstance(log, TrajectoryLog)
    passes = passes_of(units, log.records(), problem.K, log.num_steps, width)
    trained = [unit for members in passes for unit in members]
    with agreement(log.layout.group):
        if not trained:
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        if len(trained) < len(units):
            logger.warning("%d of %d units were never trained on", len(units) - len(trained), len(units))
    _claim(folder, problem, units, head)
    mesh = unit_mesh(num_groups)
    if num_groups > 1:
        assert make_module is not None
        own = TrajectoryLog(log.path, mesh.shard_group)
        problem = replace(problem, trajectory=own, module=make_module(own.layout))
    cost, error = 0.0, None
    try:
        for number in mesh.take(len(passes)):
            cost += _Pass(problem, passes[number], folder, mark_every, len(trained), progress, keep_marks, head).run()
    except Exception as caught:  # the other groups finish what they are at
        error = caught
        mesh.fail()
    mesh.wait()
    agree(error, log.layout.group)
    costs = torch.tensor([cost if problem.trajectory.layout.rank == 0 else 0.0], dtype=torch.float64)
    if log.layout.world_size > 1:
        dist.all_reduce(costs, group=log.layout.group)
    return replace(add_up(folder, [unit.name for unit in trained], log), gradients_equivalent=float(costs))


def add_up(folder: Path, names: Sequence[str], log: TrajectoryLog) -> Correction:
    """The sum of finished units, in the order of their names. Collective."""
    with agreement(log.layout.group):
        like = ShardedVector.zeros(log.layout, torch.promote_types(log.dtype, torch.float32))
        total: Correction | None = None
        audit: list[AuditRecord] = []
        for name in sorted(names):
            found = load_full_correction(folder / "units" / name, log.layout, like)
            audit += [AuditRecord(**row) for row in read_json(folder / "units" / name / "audit.json")]
            if total is None:
                total = found
                continue
            total.v.add_(found.v)
            for key, vector in found.state.items():
                total.state[key].add_(vector)
            total = replace(total, behind=total.behind + found.behind)
    assert total is not None
    return replace(total, audit=tuple(audit))


class _Pass:
    """Some units on their way along the trajectory, in one group."""

    def __init__(
        self,
        problem: Problem,
        units: Sequence[Unit],
        folder: Path,
        mark_every: int | None,
        total: int,
        progress: Progress,
        keep_marks: bool,
        head: Head | None,
    ) -> None:
        self.problem, self.units, self.folder, self.total, self.progress = problem, units, folder, total, progress
        self.layout, self.mark_every, self.keep_marks = problem.trajectory.layout, mark_every, keep_marks
        self.head = head
        digest = hashlib.blake2b("\n".join(unit.name for unit in units).encode(), digest_size=8).hexdigest()
        self.own = folder / "passes" / digest
        self.finished = self._finished()

    def run(self) -> float:
        """Its cost in gradients. Collective in the group."""
        done = self._done()
        left = [unit for unit in self.units if unit.name not in done]
        if not left:
            self._clear()
            return 0.0
        marks = None
        if self.mark_every is not None:
            dtype = torch.promote_types(self.problem.trajectory.dtype, torch.float32)  # type: ignore[attr-defined]
            marks = Marks(self.own, self.layout, dtype, self.mark_every, self.keep_marks)
        # A mark is of all units of the pass. They go together even where there is none yet: vectors in other company are
        # the same to rounding only, and what comes of a stopped run is to be the same to the bit.
        sweep = Sweep(self.problem, left if marks is None else self.units, self.head, marks)
        sweep.run(self._keep, self._report)
        self._clear()
        return sweep.cost

    def _done(self) -> set[str]:
        """Units of the pass that are finished, as its first rank sees it. Collective in the group."""
        with agreement(self.layout.group):
            found = {unit.name for unit in self.units if (self.folder / "units" / unit.name).is_dir()}
        return broadcast_object(found, self.layout.group)

    def _clear(self) -> None:
        """Removes the marks, or puts them where they stay. Collective in the group."""
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                kept = self.folder / "marks"
                if self.keep_marks and not kept.exists():
                    self.own.mkdir(parents=True, exist_ok=True)  # a short run leaves none
                    self.own.replace(kept)
                shutil.rmtree(self.own, ignore_errors=True)

    def _keep(self, result: SweepResult) -> None:
        """Writes a finished unit. Collective in the group."""
        if result.unit in self._done():  # before the run was stopped, and after the mark that it goes on from
            return
        found = Correction(result.v, result.audit, 0.0, None, result.state, result.behind, result.step)
        target = self.folder / "units" / result.unit
        part = target.with_name(f"{target.name}.part")
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
        with agreement(self.layout.group):
            found.save(part, compression="zstd")
            if self.layout.rank == 0:
                write_json(part / "audit.json", [asdict(record) for record in result.audit])
        with agreement(self.layout.group):
            if self.layout.rank == 0:
                part.replace(target)
                fsync_path(target.parent)
                self.finished = self._finished()

    def _finished(self) -> int:
        """Units of all groups that are through. Local; looked up only when one of this group is: the folder may be large."""
        return sum(not path.name.endswith(".part") for path in (self.folder / "units").glob("*"))

    def _report(self, status: Status) -> None:
        """Tells how far all groups are. Local."""
        if self.layout.rank == 0:
            self.progress(replace(status, done=self.finished, left=self.total - self.finished))


def work_digest(problem: Problem, units: Sequence[Unit], head: Head | None = None) -> str:
    """By which the work on a request with these settings is known again. Local."""
    log = problem.trajectory
    assert isinstance(log, TrajectoryLog)
    request = problem.counterfactual
    ids: Any = [sorted(request.sample_ids), sorted(request.batch_ids)]
    parts = {unit.name: sorted(unit.sample_ids | unit.batch_ids) for unit in units}
    identity = {
        "log": log.fingerprint,
        "request": [request.kind, ids],
        "units": parts,
        "curvature": asdict(problem.config),
        "kept": None if problem.kept is None else problem.kept.name,
        "K": problem.K,
        "tol": problem.tol,
        **({"update": "finite"} if problem.is_finite else {}),
        **({"head": [head.length, head.tolerance]} if head is not None else {}),
    }
    return json_digest(identity)


def _claim(folder: Path, problem: Problem, units: Sequence[Unit], head: Head | None) -> None:
    """Makes the folder this request's, or finds that it is. Collective.

    Raises:
        LmcError: It is of another one.
    """
    log, digest = problem.trajectory, work_digest(problem, units, head)
    path = folder / "work.json"
    with agreement(log.layout.group):
        if path.exists() and read_json(path)["digest"] != digest:
            raise LmcError(
                f"{folder} holds the work of another request, or of other settings: finish that one, remove the folder, or "
                "choose another output_dir"
            )
    with agreement(log.layout.group):
        if log.layout.rank == 0:
            (folder / "units").mkdir(parents=True, exist_ok=True)
            (folder / "passes").mkdir(parents=True, exist_ok=True)
            write_json(path, {"digest": digest, "mode": problem.config.mode, "K": problem.K, "units": len(units)})
