"""Control deletions: other samples of the same log are forgotten by several strategies and by replay, and the errors kept
beside the log, so that later plans can say what a strategy's error was rather than guess it.

controls.json       sealed; a row a deletion: what was forgotten, rel_error and seconds by strategy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmc_dist.curvature import HVPConfig
from lmc_dist.data import epoch_order
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.distance import relative_error
from lmc_dist.logged_run import LoggedRun
from lmc_dist.planner.strategies import Measurement, strategy_name
from lmc_dist.runtime import agreement, broadcast_object
from lmc_dist.shards.relayout import relayout
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.replay import replay
from lmc_dist.trajectory.sealed import read_sealed, write_sealed
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import compute_correction

SCHEMA_VERSION = 1
FILE = "controls.json"


@dataclass(frozen=True)
class Candidate:
    """A strategy whose error is measured.

    Attributes:
        mode: hessian_mode.
        head: Replayed steps, or `auto`.
    """

    mode: str
    head: int | Literal["auto"] = 0

    @property
    def name(self) -> str:
        return strategy_name(self.mode, self.head)


def control_requests(log: TrajectoryLog, request: Counterfactual, count: int, seed: int = 0) -> list[Counterfactual]:
    """`count` random requests of the same kind and size, for data that the request leaves alone. Local.

    Raises:
        LmcError: The log holds too little else.
    """
    is_batches = bool(request.batch_ids)
    wanted = request.batch_ids or request.sample_ids
    records = [record for record in log.records() if record.applied and record.step >= log.first_step]
    if is_batches:
        seen = {record.batch_id for record in records}
    else:
        seen = {i for record in records for i in record.sample_ids}
    size, rest = len(wanted & seen), sorted(seen - wanted)
    if len(rest) <= size:
        raise LmcError(
            f"no control deletions of {size} {'batches' if is_batches else 'samples'}: the log holds {len(rest)} others"
        )
    drawn = [epoch_order(rest, seed, number)[:size] for number in range(count)]
    if is_batches:
        return [Counterfactual(request.kind, batch_ids=frozenset(ids)) for ids in drawn]
    return [Counterfactual(request.kind, sample_ids=frozenset(ids)) for ids in drawn]


def measure_controls(
    run: LoggedRun,
    engine: Any,
    requests: Sequence[Counterfactual],
    candidates: Sequence[Candidate],
    config: Callable[[str], HVPConfig],
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """rel_error and seconds of each candidate on each control request, against replay. Collective.

    Args:
        run: The log with data and model.
        engine: Of the kind that trained (`replay_engine`).
        requests: Control requests.
        candidates: Strategies.
        config: The curvature of a mode.
        progress: Told what was done.

    Returns:
        A row a request: kind, size, forgotten, seconds of the replay, {strategy: {rel_error, seconds, gradients}} and
        failed, {strategy: why it gave nothing}.
    """
    log, rows = run.log, []
    theta = log.theta(log.num_steps)
    for request in requests:
        began = time.perf_counter()
        reference = relayout(replay(engine, log, run.batches, request).theta, theta.layout)
        reference = reference.to(device=theta.flat.device)
        progress("replay")
        ids = sorted(request.batch_ids or request.sample_ids)
        row: dict[str, Any] = {"kind": request.kind, "size": len(ids), "forgotten": ids}
        row["replay_seconds"] = broadcast_object(time.perf_counter() - began)
        found: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for candidate in candidates:
            began = time.perf_counter()
            try:
                correction = compute_correction(
                    log,
                    run.module,
                    run.batches,
                    request,
                    config(candidate.mode),
                    replay_head=candidate.head,
                    update="auto",
                )
            except LmcError as error:  # divergence: the same on all ranks
                failed[candidate.name] = str(error)
                progress(candidate.name)
                continue
            seconds = broadcast_object(time.perf_counter() - began)
            error_of = relative_error(correction.corrected(theta), theta, reference)
            found[candidate.name] = {
                "rel_error": error_of,
                "seconds": seconds,
                "gradients": correction.gradients_equivalent,
            }
            progress(candidate.name)
        rows.append({**row, "strategies": found, "failed": failed})
    return rows


def keep_controls(log: TrajectoryLog, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Adds rows to those beside the log; rows of other settings or of the same deletions are replaced. Collective."""
    with agreement():
        if log.layout.rank == 0:
            kept = [row for row in read_controls(log, settings) if _key(row) not in {_key(new) for new in rows}]
            write_sealed(
                log.path / FILE,
                {
                    "schema": SCHEMA_VERSION,
                    "log_fingerprint": log.fingerprint,
                    "settings": dict(settings),
                    "rows": [*kept, *rows],
                },
            )


def _key(row: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    return row["kind"], tuple(row["forgotten"])


def read_controls(log: TrajectoryLog, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows measured on this very log with these settings; none where there is no file, or another run's. Local.

    Raises:
        LmcError: The file is damaged.
    """
    path = log.path / FILE
    if not path.exists():
        return []
    found = read_sealed(path)
    same = (found.get("schema"), found.get("log_fingerprint")) == (SCHEMA_VERSION, log.fingerprint)
    return list(found["rows"]) if same and found.get("settings") == dict(settings) else []


def measurements(rows: Sequence[Mapping[str, Any]], kind: str, size: int) -> dict[str, Measurement]:
    """What rows say of deletions of a kind and size: up to twice as many samples or half as many count as alike."""
    alike = [row for row in rows if row["kind"] == kind and size / 2 <= row["size"] <= 2 * size]
    names = {name for row in alike for name in row["strategies"]}
    found: dict[str, Measurement] = {}
    for name in names:
        # A strategy that failed on any of them has no error to be relied on.
        if not any(name in row["failed"] for row in alike):
            errors = tuple(row["strategies"][name]["rel_error"] for row in alike if name in row["strategies"])
            found[name] = Measurement(errors)
    return found
