"""Deletion while training runs: at a step boundary the ranks agree on the requests that have come, correct weights and
optimizer state over the logged steps, and go on without the data.

    logger.attach(engine, optimizer)
    online = OnlineUnlearning(logger, batches)
    ...
    batch = blank_rows(batch, online.empties(batch["index"].tolist()))     # before each pass

What is done at a boundary is on disk line by line; after a crash at any point the run goes on from its last snapshot, comes to
the same boundary and ends with the same weights:

    ledger: decided at step N  →  the log's edit of step N  →  audit record  →  ledger: applied
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.audit.chain import AuditChain
from lmc_dist.audit.digests import salted_digest
from lmc_dist.config import OnlineSettings
from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError
from lmc_dist.online.asked import Asked, Relearning, companions, counterfactual, unknown_batches
from lmc_dist.online.ledger import ANSWERED, CHAIN_FILE, Ledger, Request, Status
from lmc_dist.online.live import LiveRun
from lmc_dist.online.settings import check_settings
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.edits import LogEdit, first_touched, read_edits, union, with_open_edits
from lmc_dist.trajectory.files import MANIFEST_FILE, ledger_folder
from lmc_dist.trajectory.logger import TrainingLogger
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.passes import Pass
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.rewritten import gone_requests
from lmc_dist.trajectory.snapshots import snapshot_steps
from lmc_dist.trajectory.store import TrajectoryLog

logger = logging.getLogger("lmc_dist")


class OnlineUnlearning:
    """Answers the requests of a run's ledger at its step boundaries. Every rank constructs one, after `logger.attach`.

    Args:
        logger: Of the run, attached.
        batches: The training data by sample id.
        settings: How; None is `OnlineSettings()`.
        known_ids: Ids of the dataset. Those that the log has seen are known without; a request for others excludes them
            either way.

    Attributes:
        lost_seconds: What boundaries took, answers included.
        answered: Requests that this process has answered.
        corrections: How many corrections that took.

    Raises:
        LmcError: On every rank: not attached, settings that do not fit, a ledger that is none.
    """

    def __init__(
        self,
        logger: TrainingLogger,
        batches: BatchSource,
        settings: OnlineSettings | None = None,
        known_ids: Iterable[int] = (),
    ) -> None:
        self.logger, self.settings = logger, settings or OnlineSettings()
        self.shards = logger.shards
        self.group, self.is_main = self.shards.layout.group, self.shards.layout.rank == 0
        self.live = LiveRun(logger, batches, self.settings)
        self.lost_seconds, self.answered, self.corrections = 0.0, 0, 0
        self._forgotten: set[str] = set()  # digests
        self._digests: dict[int, str] = {}
        self._known = list(known_ids)
        self._relearn: list[Relearning] = []
        self._due: dict[int, list[str]] = {}  # decided before a crash: step → names
        self._looks_again = False  # at the next step, whatever `poll_every`: the ledger could not be read
        with agreement(self.group):
            check_settings(self.settings)
            if self.is_main:
                self.ledger, self.audit = open_books(logger.log_dir, self.settings, is_new=not logger.has_resumed)
        self._salt: bytes = broadcast_object(self.ledger.salt if self.is_main else None, self.group)
        self._take_up()
        logger.boundaries.append(self._boundary)
        logger.is_void = self._is_void

    # --- what training asks ------------------------------------------------------------------------------------------

    def is_forgotten(self, sample_id: int) -> bool:
        """Whether a sample must not be trained on any more. Local, the same on all ranks."""
        return bool(self._forgotten) and self._digest(sample_id) in self._forgotten

    def empties(self, ids: Sequence[int]) -> list[int]:
        """Rows of a batch, by their samples' ids, that are to be emptied with `blank_rows`. Local."""
        return [row for row, i in enumerate(ids) if self.is_forgotten(i)]

    def relearned(self, step: int, own: Collection[int] = ()) -> list[int]:
        """Companions of removed batches that the batch of a step takes up beside its own samples. Local.

        Asked once for each step, in order, and after a resume for the steps before it as well, since what they took up
        follows from their own samples: so it is the same on all ranks and in every process.

        Args:
            step: The step.
            own: Its own samples. A companion that is among them waits for a later step.
        """
        found: list[int] = []
        for queue in self._relearn:
            found += queue.take(step, {*own, *found}, self.settings.relearn_per_step)
        return [i for i in found if not self.is_forgotten(i)]

    def summary(self) -> dict[str, Any]:
        """What answering cost this process. Local."""
        return {"answered": self.answered, "lost_seconds": self.lost_seconds, "corrections": self.corrections}

    def _is_void(self, passes: Sequence[Pass]) -> bool:
        """Whether a step's passes hold nothing any more, on any rank, because of what is forgotten. Collective."""
        if not self._forgotten:
            return False
        is_any = torch.tensor([any(p.blanks for p in passes), any(p.num_targets for p in passes)], dtype=torch.int64)
        if self.shards.layout.world_size > 1:
            dist.all_reduce(is_any, dist.ReduceOp.MAX, group=self.group)
        is_emptied, is_used = is_any.tolist()
        return bool(is_emptied and not is_used)

    def _digest(self, sample_id: int) -> str:
        if sample_id not in self._digests:
            self._digests[sample_id] = salted_digest(self._salt, sample_id)
        return self._digests[sample_id]

    # --- going on after a stop -----------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Where an earlier process of the run left off: what is forgotten, relearned, and still to be done. Collective."""
        found: Any = None
        with agreement(self.group):
            if self.is_main:
                found = self._left_off()
        forgotten, edits, self._due = broadcast_object(found, self.group)
        self._forgotten = set(forgotten)
        self._relearn = [Relearning(edit.step, list(edit.relearn)) for edit in edits if edit.relearn]

    def _left_off(self) -> tuple[list[str], list[LogEdit], dict[int, list[str]]]:
        """(digests that are forgotten, edits in order, requests that are due by step). Rank 0."""
        step, path = self.logger.step, self.logger.log_dir
        edits = {n: edit for n, edit in read_edits(path, snapshot_steps(path)).items() if n <= step}
        gone = gone_requests(read_manifest(path)) if (path / MANIFEST_FILE).exists() else set()
        forgotten: list[str] = []
        due: dict[int, list[str]] = {}
        for request in self.ledger.requests(*ANSWERED)[0]:
            if request.name in gone:  # the log is without its data from the first step on: there is nothing to correct
                forgotten += request.samples
                if request.status == "decided":
                    self._close(request, "excluded", {"reason": "the log was rewritten without it"}, None)
                continue
            if request.step is None or request.step > step:  # its snapshot was never finished, or is lost
                due.setdefault(request.step or step + 1, []).append(request.name)
                continue
            forgotten += request.samples
            edit = edits.get(request.step)
            if request.status != "decided":
                continue
            if edit is not None and request.name in edit.names:
                self._close(request, "applied", edit.figures, edit)
            else:  # nothing says what came of it
                due.setdefault(step + 1, []).append(request.name)
        return forgotten, [edit for _, edit in sorted(edits.items())], due

    # --- the boundary ------------------------------------------------------------------------------------------------

    def _boundary(self, step: int) -> None:
        """Answers what has come. Collective; called once a step is recorded and before its snapshot."""
        due = [name for at, names in self._due.items() if at <= step for name in names]
        if not due and not self._looks_again and step % self.settings.poll_every:
            return
        started = time.perf_counter()
        asked = broadcast_object(self._ask(step, due) if self.is_main else None, self.group)
        self._looks_again = asked is None
        if asked is not None:
            self._due = {at: names for at, names in self._due.items() if at > step}
        if asked:
            self._answer(step, asked)
        self.lost_seconds += time.perf_counter() - started

    def _ask(self, step: int, due: Sequence[str]) -> list[Request] | None:
        """What is to be answered at a step, noted as decided; None where the ledger could not be read. Rank 0.

        A ledger in trouble never stops training.
        """
        try:
            if not due and not self.ledger.has_pending():
                return []
            found, malformed = self.ledger.requests("pending")
            for row in malformed:
                logger.warning("rejected: %s", row)
                self.ledger.reject(row.row, row.reason)
                self.audit.append("rejected", {"reason": row.reason}, f"row-{row.row}")
            again = [request for request in self.ledger.requests(*ANSWERED)[0] if request.name in due] if due else []
            self.ledger.decide([request.name for request in found], step)
            self.ledger.decide([request.name for request in again], step, ANSWERED)
            return [*found, *again]
        except (LmcError, OSError) as error:
            logger.warning("requests wait: %s", error)
            return None

    def _answer(self, step: int, requests: Sequence[Request]) -> None:
        """Corrects for all of them together, those that can be. Collective."""
        log = self.live.log()
        records = list(log.records())
        ids = {self._digest(i): i for record in records for i in record.sample_ids}
        ids |= {self._digest(i): i for i in self._known}
        asked = [Asked(request, tuple(sorted(ids[d] for d in request.samples if d in ids))) for request in requests]
        seen: list[Asked] = []
        for one in asked:
            reason = unknown_batches(one.request, records)
            if reason is not None:
                self._finish(one.request, "rejected", {"reason": reason})
                continue
            self._forgotten |= set(one.request.samples)
            if first_touched(counterfactual(one, records), records) is None:
                self._finish(one.request, "excluded", {"reason": "training had not seen it"})
            else:
                seen.append(one)
        self._correct(step, log, records, [one for one in seen if self._is_within_reach(one, log, records)])
        self.answered += len(asked)

    def _is_within_reach(self, one: Asked, log: TrajectoryLog, records: Sequence[StepRecord]) -> bool:
        """Whether the log still holds what the correction starts from; if not, the request is refused. Collective."""
        request, _ = with_open_edits(counterfactual(one, records), log.edits, records)
        first = first_touched(request, records)
        assert first is not None
        propagates = self.settings.replay_head != "all" and self.settings.fallback == "refuse"
        try:
            with agreement(self.group):
                log.require(first, updates=propagates)
        except LmcError as error:
            self._finish(one.request, "refused", {"reason": str(error)})
            return False
        return True

    def _correct(self, step: int, log: TrajectoryLog, records: Sequence[StepRecord], seen: Sequence[Asked]) -> None:
        """One correction for all that were seen. Collective."""
        if not seen:
            return
        whole = reduce(union, [counterfactual(one, records) for one in seen])
        try:
            found = self.live.correct(log, whole)
        except LmcError as error:
            for one in seen:
                self._finish(one.request, "refused", {"reason": str(error)})
            return
        removed = frozenset(i for edit in log.edits.values() for i in edit.request.batch_ids)
        relearn = tuple(i for i in companions(seen, records, removed) if not self.is_forgotten(i))
        names = tuple(one.request.name for one in seen)
        edit = LogEdit(step, whole, found.method, names, relearn, found.figures)
        self.logger.edit(edit)
        self.corrections += 1
        if relearn:
            self._relearn.append(Relearning(step, list(relearn)))
        for one in seen:
            self._finish(one.request, "applied", found.figures, edit)

    # --- the books ---------------------------------------------------------------------------------------------------

    def _finish(
        self, request: Request, status: Status, figures: Mapping[str, Any], edit: LogEdit | None = None
    ) -> None:
        """Writes into audit and ledger what came of a request. Local; rank 0 does it."""
        if not self.is_main:
            return
        logger.info("request %s: %s at step %d", request.name[:12], status, self.logger.step)
        try:
            self._close(replace(request, step=self.logger.step), status, figures, edit)
        except (LmcError, OSError) as error:  # the edit is in the log: the next start completes the books
            logger.warning("request %s is %s, and that could not be noted: %s", request.name[:12], status, error)

    def _close(self, request: Request, status: Status, figures: Mapping[str, Any], edit: LogEdit | None) -> None:
        body = {
            "request": request.name,
            "unit": request.unit,
            "num_samples": len(request.samples),
            "num_batches": len(request.batches),
            "received": request.received,
            "step": request.step,
            "method": None if edit is None else edit.method,
            "figures": dict(figures),
            "certificate": certificate(figures) if edit is not None else None,
        }
        self.audit.append(status, body, f"{request.name}:{status}:{json_digest(body)}")
        self.ledger.finish(request.name, status, {**figures, "latency_seconds": time.time() - request.received})


def certificate(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the distance to the run without the data, and how. Pure."""
    if figures.get("exact"):
        return {"basis": "exact", "bound": 0.0}
    return {"basis": "none", "bound": None}


def open_books(log_dir: str | Path, settings: OnlineSettings, is_new: bool) -> tuple[Ledger, AuditChain]:
    """Ledger and audit of a run, of which it is known that they can go on. Local; the first rank alone.

    Args:
        log_dir: The log.
        settings: How requests are answered.
        is_new: Whether the run begins, and does not go on.

    Raises:
        LmcError: No ledger, or one that cannot be read whole; an earlier run's, where a new one begins; a key that cannot be
            used or is not that of the audit.
    """
    ledger = Ledger(ledger_folder(log_dir))
    answered, malformed = ledger.requests(*ANSWERED)
    if is_new and (answered or malformed):
        raise LmcError(
            f"{ledger.folder} holds {len(answered) + len(malformed)} answered requests of an earlier run, and a new one begins: "
            "move it away (it is the earlier run's proof), and leave the samples out of the new run's data (forget.samples)"
        )
    if malformed:
        raise LmcError(
            f"{ledger.path}: {malformed[0]}, and {len(malformed)} such requests were answered: what they forgot is not known any "
            "more, so training would learn it again: put the ledger back from a copy"
        )
    audit = AuditChain(ledger.folder / CHAIN_FILE, settings.signing_key)
    audit.check()
    return ledger, audit
