"""Reading all of a log: is every byte what was written, and do the updates lead from snapshot to snapshot?

Ranks share the work: files and passes are dealt out, vectors are read in shards. Nothing stops at the first problem, and
no rank enters a collective that another could miss: local work first, then one exchange for each of the stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError, first_line
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.checksum import format_checksum, local_checksum
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.contents import LogContents, Problem, read_contents, writer_of
from lmc_dist.trajectory.exchange import all_gather, all_reduce_sum, this_rank
from lmc_dist.trajectory.files import step_folder
from lmc_dist.trajectory.kept import DESCRIPTION
from lmc_dist.trajectory.kept import FOLDER as CURVATURE_FOLDER
from lmc_dist.trajectory.reader import ShardReader, apply_fixes, rank_files
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.sealed import read_sealed
from lmc_dist.trajectory.snapshot_files import SnapshotReader
from lmc_dist.trajectory.snapshots import META_FILE, read_meta, snapshot_folder
from lmc_dist.trajectory.table import TABLE_FILE, decode_sample, read_rows

Progress = Callable[[int], None]


@dataclass
class Verification:
    """What reading a log showed.

    Attributes:
        problems: Every place that is not as it was written, in the order of the log.
        notes: What is worth knowing and no damage.
        counts: How much was checked, by kind.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "problems": [{"place": p.place, **p.to_json()} for p in self.problems],
            "notes": self.notes,
            "checked": self.counts,
        }


def verify(log_dir: str | Path, progress: Progress = lambda units: None) -> Verification:
    """Reads a whole log. Collective; equal on all ranks.

    Args:
        log_dir: The log.
        progress: Called with the units of work of this rank that are done; `total_units` says how many there are.

    Raises:
        LmcError: There is no log.
    """
    return _Verifier(Path(log_dir), progress).run()


def total_units(contents: LogContents) -> int:
    """Units of work of rank 0 in `verify`, for a progress bar."""
    _, world_size = this_rank()
    followed = sum(1 for kinds in contents.digests.values() if {"update", "theta"} & set(kinds))
    return -(-sum(1 for _ in contents.files()) // world_size) + len(contents.snapshots) + followed


class _Verifier:
    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.rank, self.world_size = this_rank()
        with agreement():
            found = read_contents(path)
        self.contents = self._same_contents(found)
        self.problems: list[Problem] = list(self.contents.problems) if self.rank == 0 else []
        self.result = Verification()

    def _same_contents(self, found: LogContents) -> LogContents:
        """Cut back to what all ranks saw: the log may be growing. Collective."""
        seen = all_gather((found.num_steps, found.snapshots))
        num_steps = min(number for number, _ in seen)
        snapshots = sorted(set.intersection(*(set(some) for _, some in seen)))
        found.records = {step: r for step, r in found.records.items() if step < num_steps}
        found.digests = {step: d for step, d in found.digests.items() if step < num_steps}
        found.num_steps, found.snapshots = num_steps, snapshots
        return found

    def run(self) -> Verification:
        contents, counts = self.contents, self.result.counts
        counts["rows"] = contents.num_steps
        if all(all_gather(contents.manifest is not None)):
            assert contents.manifest is not None
            self.layout = ShardLayout.of_table(contents.manifest.parameters)
            self.dtype: torch.dtype = getattr(torch, contents.manifest.dtype)
            self._check_files()
            whole = self._check_snapshots()
            self._check_chain(whole)
            self._check_samples()
            self._check_curvature()
        else:
            self.result.notes.append("without the manifest nothing but the step table can be checked")
        gathered = [problem for problems in all_gather(self.problems) for problem in problems]
        unique = dict.fromkeys(gathered)
        self.result.problems = sorted(unique, key=lambda p: (p.step is None, p.step or 0, p.rank or 0))
        self._note_leftovers()
        self.result.notes = broadcast_object(self.result.notes)
        return self.result

    def _report(self, message: str, **place: Any) -> None:
        self.problems.append(Problem(message, **place))

    # --- shard files -----------------------------------------------------------------------------------------------

    def _check_files(self) -> None:
        """Every file that the table names: its header against the table, its tensors against its header."""
        count = 0
        for i, (step, kind, rank, ranks, _) in enumerate(self.contents.files()):
            count += 1
            if i % self.world_size != self.rank:
                continue
            digests = self.contents.digests[step][kind]
            place = {"step": step, "rank": rank, "kind": kind}
            try:
                folder, what = self.path / step_folder(step), f"step {step}"
                rule = self.contents.rule(step)
                reader = ShardReader(folder, self.layout, rule, what, kind, None, digests, is_partial=True)
                if not reader.path(rank).exists():
                    raise LmcError(f"its file is missing ({ranks} ranks wrote one each)")
                for name in reader.damaged_tensors(rank):
                    self._report("its bytes do not have their digest", tensor=name, **place)
            except Exception as error:  # whatever damaged bytes lead to
                self._report(first_line(error), **place)
            self.progress(1)
        self.result.counts["files"] = count

    # --- snapshots -------------------------------------------------------------------------------------------------

    def _check_snapshots(self) -> list[int]:
        """Every vector of every snapshot; returns those whose θ is whole."""
        names = (
            [(step, kind) for step in self.contents.snapshots for kind in self._kinds(step)] if self.rank == 0 else []
        )
        names = broadcast_object(names)
        sums = torch.zeros(len(names), 3, dtype=torch.int64)
        for step in self.contents.snapshots:
            folder = self.path / snapshot_folder(step)
            places = [i for i, name in enumerate(names) if name[0] == step]
            try:
                reader = SnapshotReader(folder)
            except Exception as error:
                self._report(first_line(error), snapshot=step)
                sums[places, 2] = 1
                self.progress(1)
                continue
            for i in places:
                kind = names[i][1]
                try:
                    sums[i, :2] = local_checksum(reader.read(kind, self.layout, self.dtype))
                except Exception as error:
                    self._report(first_line(error), snapshot=step, kind=kind)
                    sums[i, 2] = 1
            self.progress(1)
        all_reduce_sum(sums)
        self.result.counts["snapshots"] = len(self.contents.snapshots)
        return broadcast_object(self._judge_snapshots(names, sums) if self.rank == 0 else [])

    def _judge_snapshots(self, names: list[tuple[int, str]], sums: torch.Tensor) -> list[int]:
        """Reports vectors without their checksum; returns the snapshots whose θ is whole. Rank 0."""
        whole = []
        for (step, kind), row in zip(names, sums, strict=True):
            meta = self._meta(step)
            if row[2] or meta is None:
                continue
            if format_checksum(row[:2]) != meta["kinds"][kind]:
                self._report("it does not have its checksum", snapshot=step, kind=kind)
            elif kind == "theta":
                whole.append(step)
                record = self.contents.records.get(step - 1)
                if record is not None and step not in self.contents.edits and record.checksum != meta["kinds"][kind]:
                    message = f"it is not the θ that step {step - 1} led to by the step table"
                    self._report(message, snapshot=step, kind=kind)
        return whole

    def _kinds(self, step: int) -> list[str]:
        meta = self._meta(step, report=True)
        return [] if meta is None else sorted(meta["kinds"])

    def _meta(self, step: int, report: bool = False) -> dict[str, Any] | None:
        """`meta.json` of a snapshot; None where it is damaged."""
        try:
            return read_meta(self.path / snapshot_folder(step))
        except LmcError as error:
            if report:
                self._report(first_line(error), snapshot=step, file=META_FILE)
            return None

    # --- the chain -------------------------------------------------------------------------------------------------

    def _check_chain(self, whole: list[int]) -> None:
        """Following the updates from each whole snapshot meets the checksum of every θ up to the next one."""
        manifest, contents = self.contents.manifest, self.contents
        assert manifest is not None
        kinds = TIERS[manifest.storage]
        anchors = broadcast_object([step for step in whole if self._is_anchor(step)])
        if not anchors or not kinds:
            return
        kind = "theta" if "theta" in kinds else "update"
        spans = list(zip(anchors, [*anchors[1:], contents.num_steps], strict=True))
        sums = torch.zeros(contents.num_steps, 3, dtype=torch.int64)
        sums[:, 2] = 1  # until it is read
        errors = [error for start, stop in spans for error in self._follow(start, stop, kind, sums)]
        all_reduce_sum(sums)
        self.result.counts["steps followed"] = int((sums[:, 2] == 0).sum())
        known = {(p.step, p.kind) for problems in all_gather(self.problems) for p in problems}
        self.problems += [error for error in errors if (error.step, error.kind) not in known]
        broken = {step for step, _ in known}
        for start, stop in spans if self.rank == 0 else ():
            for step in range(start, stop):
                record = contents.records.get(step)
                if step in broken or record is None or sums[step, 2]:
                    break  # what comes of known damage is no news
                if format_checksum(sums[step, :2]) != (record.log_checksum or record.checksum):
                    message = f"θ after it does not have the logged checksum: its {kind} is not what was trained"
                    self._report(message, step=step, kind=kind)
                    break

    def _follow(self, start: int, stop: int, kind: str, sums: torch.Tensor) -> list[Problem]:
        """Sums of θ_{s+1} for s from `start`, as far as this rank can read; what stopped it. Local."""
        theta: ShardedVector | None = None
        for step in range(start, stop):
            record, digests = self.contents.records.get(step), self.contents.digests.get(step) or {}
            if record is None or (record.applied and kind not in digests):
                break
            try:
                if theta is None:
                    theta = SnapshotReader(self.path / snapshot_folder(start)).read("theta", self.layout, self.dtype)
                if record.applied:
                    folder = self.path / step_folder(step)
                    rule = self.contents.rule(step)
                    reader = ShardReader(folder, self.layout, rule, f"step {step}", kind, None, digests[kind])
                    if kind == "theta":
                        theta = reader.read(self.dtype)
                    else:
                        theta.add_(reader.read(self.dtype))
                        apply_fixes(theta, reader.fixes())
            except Exception as error:
                return [Problem(first_line(error), step=step, kind=kind)]
            sums[step, :2] = local_checksum(theta)
            sums[step, 2] = 0
            self.progress(1)
        return []

    def _is_anchor(self, step: int) -> bool:
        """Whether following the log meets the snapshot exactly: any, unless updates are stored rounded."""
        record = self.contents.records.get(step - 1)
        return record is None or step in self.contents.edits or record.log_checksum in (None, record.checksum)

    # --- samples ---------------------------------------------------------------------------------------------------

    def _check_samples(self) -> None:
        """The tokens of every sample that training saw are there as they were."""
        manifest, contents = self.contents.manifest, self.contents
        assert manifest is not None
        if not manifest.save_batch_data:  # of a log without, a few may be left by pruning that was cut off
            return
        rows = []
        try:
            rows = read_rows(self.path / TABLE_FILE, "samples", "id")
        except LmcError as error:
            self._report_once(str(error), file=TABLE_FILE)
        for row in rows:
            try:
                decode_sample(row)
            except Exception as error:
                self._report_once(first_line(error), sample=row["id"], file=TABLE_FILE)
        seen = {i for record in contents.records.values() for i in record.sample_ids}
        for sample in sorted(seen - {row["id"] for row in rows}):
            self._report_once("training saw it, and its tokens are not in the table", sample=sample, file=TABLE_FILE)
        self.result.counts["samples"] = len(rows)

    # --- the rest --------------------------------------------------------------------------------------------------

    def _check_curvature(self) -> None:
        """Kept eigenvectors: their tensors against their files' headers."""
        folders = sorted({path.parent for path in (self.path / CURVATURE_FOLDER).glob("*/window-*/*.safetensors")})
        files = 0
        for folder in folders:
            kinds = {path.name.split(".")[0] for path in folder.glob("*.safetensors")}
            for kind in sorted(kinds):
                for rank, _ in rank_files(folder, kind):
                    files += 1
                    if files % self.world_size != self.rank:
                        continue
                    place = {"rank": rank, "kind": kind, "file": str(folder.relative_to(self.path))}
                    try:
                        rule: Any = read_sealed(folder.parent / DESCRIPTION)["partition"]
                        reader = ShardReader(folder, self.layout, rule, folder.name, kind)
                        for name in reader.damaged_tensors(rank):
                            self._report("its bytes do not have their digest", tensor=name, **place)
                    except Exception as error:
                        self._report(first_line(error), **place)
        if files:
            self.result.counts["curvature files"] = files

    def _note_leftovers(self) -> None:
        if self.rank != 0:
            return
        if writer := writer_of(self.path):
            self.result.notes.append(
                f"the log is being written by {writer}; steps that its ring drops meanwhile are missed"
            )
        elif left := self.contents.leftovers():
            names = ", ".join(str(path.relative_to(self.path)) for path in left[:3])
            self.result.notes.append(
                f"{len(left)} files or folders that nothing names were left behind by something that was cut off "
                f"({names}); they do no harm, lmc log prune removes them"
            )

    def _report_once(self, message: str, **place: Any) -> None:
        """A problem that all ranks see."""
        if self.rank == 0:
            self._report(message, **place)
