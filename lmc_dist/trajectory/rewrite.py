"""The log itself without the forgotten data: that of the counterfactual run (`replay`), or what does not depend on it (`remove`).

The new log is made beside the old one, out of links to what stays, and takes its place when all of it is on disk. Its
step table is a new file, so that no page of the old one comes along.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.engines import engine_shards
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.certify import begin
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step
from lmc_dist.trajectory.edits import EDIT_FILE, LogEdit
from lmc_dist.trajectory.exchange import this_rank
from lmc_dist.trajectory.files import fsync_path, rank_file, step_folder
from lmc_dist.trajectory.lock import LogLock, require_free
from lmc_dist.trajectory.manifest import write_manifest
from lmc_dist.trajectory.record import StepRecord, TrajectoryManifest
from lmc_dist.trajectory.repeat import can_be_exact, check_reproduced, warm_up
from lmc_dist.trajectory.rewrite_logger import RewriteLogger, taken_over
from lmc_dist.trajectory.rewrite_plan import How, RewritePlan, plan_rewrite, rewritten_manifest
from lmc_dist.trajectory.sealed import require_plain, write_sealed
from lmc_dist.trajectory.snapshots import snapshot_folder
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.swap import building, put_in_place, recover_name, remove_leftovers
from lmc_dist.trajectory.table import TABLE_FILE, StepTable, decode_sample, read_rows


@dataclass(frozen=True)
class Rewritten:
    """A rewriting that is done.

    Attributes:
        plan: What it did.
        before: Fingerprint of the old log.
        after: Fingerprint of the new one.
        steps: Gradients computed.
        verified: Repeated steps before the first change, whose checksums were found again.
        exact: Whether all steps were run as the logged engine rounds; None where none was run.
    """

    plan: RewritePlan
    before: str
    after: str
    steps: int = 0
    verified: int = 0
    exact: bool | None = None


def take_over(
    log: TrajectoryLog,
    plan: RewritePlan,
    manifest: TrajectoryManifest,
    output: Path,
    taken: Callable[[StepRecord], StepRecord] = lambda record: record,
) -> None:
    """Makes a log of the steps before `plan.stop`, by links where the file system has them. Local; all of it synced.

    Args:
        log: The old log.
        plan: What is done.
        manifest: Of the new log.
        output: The new log.
        taken: What becomes of their records.
    """
    for name in ("steps", "snapshots"):
        (output / name).mkdir(parents=True)
    for step in range(plan.stop):
        folder = step_folder(step)
        for kind, digests in log.kinds(step).items():
            (output / folder).mkdir(exist_ok=True)
            for rank in range(len(digests)):
                link(log.path / folder / rank_file(rank, len(digests), kind), output / folder)
        if (output / folder).exists():
            fsync_path(output / folder)
    for n in plan.snapshots:
        folder = snapshot_folder(n)
        (output / folder).mkdir()
        for path in sorted((log.path / folder).iterdir()):
            if path.name != EDIT_FILE:
                link(path, output / folder)
        if n in log.edits:
            write_sealed(output / folder / EDIT_FILE, without(log.edits[n], plan.request).to_json())
        fsync_path(output / folder)
    table = StepTable(output)
    table.insert((taken(log.record(step)), log.kinds(step) or None) for step in range(plan.stop))
    table.close()
    write_manifest(output, manifest)
    for path in (output / "steps", output / "snapshots", output, output.parent):
        fsync_path(path)


def link(path: Path, folder: Path) -> None:
    """A file of a log, which nobody changes, in another log too. Local."""
    require_plain(path)
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)
        fsync_path(folder / path.name)


def without(edit: LogEdit, request: Counterfactual) -> LogEdit:
    """A correction that stays, naming none of the samples, which training had not seen by then. Pure.

    Raises:
        LmcError: Nothing is left of it.
    """
    ids = edit.request.sample_ids - request.sample_ids
    if not ids and edit.request.sample_ids:
        raise LmcError(
            f"the correction at step {edit.step} stays, and names samples of this request alone, none of which any step before "
            "it had seen: leave those out of the request"
        )
    relearn = tuple(i for i in edit.relearn if i not in request.sample_ids)
    return replace(edit, request=replace(edit.request, sample_ids=ids), relearn=relearn)


def finish(log: TrajectoryLog, plan: RewritePlan, output: Path) -> str:
    """Gives a new log the samples' tokens that belong to it, checks what it names; its fingerprint. Local.

    Raises:
        LmcError: Something of the forgotten data is still there.
    """
    new = TrajectoryLog(output)
    seen = {i for record in new.records() for i in record.sample_ids}
    if log.manifest.save_batch_data:
        table = StepTable(output)
        rows = read_rows(log.path / TABLE_FILE, "samples", "id")
        table.insert_samples({"id": r["id"], "pad": r["pad"], **decode_sample(r)} for r in rows if r["id"] in seen)
        table.close()
    named = seen | {i for edit in new.edits.values() for i in (*edit.request.sample_ids, *edit.relearn)}
    batches = {record.batch_id for record in new.records() if record.micro_batches}
    if (left := named & plan.request.sample_ids) or batches & plan.request.batch_ids:
        raise LmcError(
            f"the new log still names {len(left)} of the forgotten samples: it is dropped, and the old one stays"
        )
    fsync_path(output / TABLE_FILE)
    fsync_path(output)
    return new.fingerprint


@contextmanager
def held(log_dir: Path) -> Iterator[None]:
    """The log is nobody else's within it, and what a rewriting that was cut off has left is gone. Collective.

    Raises:
        LmcError: On every rank: another job writes the log, or there is none.
    """
    lock = None
    with agreement():
        if this_rank()[0] == 0:
            recover_name(log_dir)
            TrajectoryLog(log_dir)
            lock = LogLock(log_dir)
            try:
                remove_leftovers(log_dir)
            except BaseException:
                lock.release()
                raise
    try:
        yield
    finally:
        if lock is not None:
            lock.release()  # it went with the old log where that is gone


def dry_run(log_dir: str | Path, request: Counterfactual, how: How) -> RewritePlan:
    """What `remove` or `rewrite` would do. Local.

    Raises:
        LmcError: As they.
    """
    require_free(Path(log_dir))
    return plan_rewrite(TrajectoryLog(log_dir), request, how)


def remove(log_dir: str | Path, request: Counterfactual, salt: bytes) -> Rewritten:
    """Cuts a log off before the first step that holds forgotten data. Collective; the first rank does it.

    Args:
        log_dir: The log, which nobody may be writing.
        request: What is forgotten.
        salt: Secret under which the manifest names it.

    Raises:
        LmcError: See `plan_rewrite` and `held`; the log is as it was then.
    """
    path = Path(log_dir).resolve()
    with held(path), _new_log(path) as output:
        with agreement():
            log = TrajectoryLog(path)
            plan = plan_rewrite(log, request, "remove")
        with agreement():
            if this_rank()[0] == 0:
                take_over(log, plan, rewritten_manifest(log, plan, salt), output)
        after = _put_in_place(log, plan, output)
    return Rewritten(plan, log.fingerprint, after)


def rewrite(
    engine: Any,
    log_dir: str | Path,
    batches: BatchSource,
    request: Counterfactual,
    salt: bytes,
    progress: Callable[[int], None] = lambda step: None,
) -> Rewritten:
    """Makes a log that of the run without the forgotten data, by running its steps again from the first changed one. Collective.

    Args:
        engine: An engine of the logged model with the same optimizer (`replay_engine`); its state is overwritten.
        log_dir: The log, which nobody may be writing.
        batches: Samples by id.
        request: What is forgotten.
        salt: Secret under which the manifest names it.
        progress: Called with each step done.

    Raises:
        LmcError: See `plan_rewrite`, `held` and `replay`; the log is as it was then.
    """
    path = Path(log_dir).resolve()
    with held(path), _new_log(path) as output:
        with agreement():
            log = TrajectoryLog(path)
            plan = plan_rewrite(log, request, "replay")
            manifest = rewritten_manifest(log, plan, salt)
        normalization = log.manifest.loss_normalization
        with agreement():
            if this_rank()[0] == 0:
                take_over(log, plan, manifest, output, lambda r: taken_over(r, plan.request, batches, normalization))
        run = _run_steps(engine, log, batches, plan, manifest, output, progress)
        after = _put_in_place(log, plan, output)
    return Rewritten(plan, log.fingerprint, after, *run)


@contextmanager
def _new_log(log_dir: Path) -> Iterator[Path]:
    """Where the new log is made; it is gone again if the block fails. Collective."""
    output = building(log_dir)
    try:
        yield output
    except BaseException:
        if this_rank()[0] == 0:
            shutil.rmtree(output, ignore_errors=True)
        raise


def _put_in_place(log: TrajectoryLog, plan: RewritePlan, output: Path) -> str:
    """Ends a rewriting whose steps are there; the new log's fingerprint. Collective."""
    is_main, after = this_rank()[0] == 0, ""
    with agreement():
        if is_main:
            after = finish(log, plan, output)
    after = str(broadcast_object(after))
    with agreement():
        if is_main:
            put_in_place(log.path)
    return after


def _run_steps(
    engine: Any,
    log: TrajectoryLog,
    batches: BatchSource,
    plan: RewritePlan,
    manifest: TrajectoryManifest,
    output: Path,
    progress: Callable[[int], None],
) -> tuple[int, int, bool]:
    """Runs the steps from `plan.stop` on and logs them; (gradients, verified steps, exact). Collective."""
    logger = RewriteLogger(output, manifest, log.manifest.segment(plan.num_steps - 1), keeps_first(log))
    try:
        steps = begin(engine_shards(engine), log, batches, plan.stop, plan.stop >= plan.first)
        logger.attach(engine)
        shards, normalization = logger.shards, log.manifest.loss_normalization
        if logger.step != plan.stop:
            raise LmcError(f"log {log.path}: snapshot {plan.stop} is damaged, the steps after it cannot be run again")
        if plan.stop > 0:
            warm_up(shards, log, batches, plan.stop)
        exact, verified = True, 0
        for step in range(plan.stop, plan.num_steps):
            record = log.record(step)
            exact = exact and can_be_exact(shards, log.manifest.segment(step))
            edited = edit_step(record, plan.request, normalization, batches.num_targets)
            steps += logger.take(edited, batches, log.manifest, step >= plan.first or edited.is_changed)
            if step < plan.first and exact:
                check_reproduced(shards, record)
                verified += 1
            progress(step)
        logger.close()
    finally:
        logger.detach()
    return steps, verified, exact


def keeps_first(log: TrajectoryLog) -> bool:
    """Whether a ring has kept θ_0 beside its last steps, as `log.keep_first` asks. Local."""
    if log.manifest.max_steps is None or 0 not in log.snapshots:
        return False
    window_start = log.snapshots[-1] - log.manifest.max_steps
    return any(0 < n <= window_start for n in log.snapshots)  # or the ring would have dropped θ_0
