"""The audit record: what was done for one forget unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmc_dist.trajectory.files import write_atomic, write_json

NORMS_FILE = "norms.json"


@dataclass(frozen=True)
class AuditRecord:
    """What was done for one forget unit, or for all of them jointly.

    Attributes:
        unit: `joint`, or `step-N` for the source of one step when K truncates.
        tz: First step that held forgotten data.
        tau: Steps of the run; the correction belongs to θ_τ.
        K_used: Steps the source was propagated through.
        v_norm: ‖v‖ at the end.
        v0_norm: ‖v‖ right after the first source.
        hvp_calls: Curvature products.
        mode: `hessian_mode`, or `replay`.
        damping: λ.
        counterfactual: `skip`, `zero` or `renormalize`.
        replay_head: Steps replayed first; `all` for exact replay.
        stopped_by: `end` of the trajectory or `K`.
        seconds: Wall time.
        growth_max: Largest ‖v_{s+1}‖ / ‖v_s‖ of a step, before its own source is added.
        missed: `low_rank`: largest share of C z, z random, that a basis left out.
        head_error: Replayed head of length `auto`: ‖difference of recursion and replay‖ / ‖v‖ when it took over.
        update: How the optimizer's steps were carried: by their `tangent`, or `finite`, as they are.
        norms: (step, ‖v‖ after it) along the way, thinned out to at most `windows.MOST_NORMS`; None where the steps are not taken
            one by one. They go to a file of their own, norms.json.
    """

    unit: str
    tz: int
    tau: int
    K_used: int
    v_norm: float
    v0_norm: float
    hvp_calls: int
    mode: str
    damping: float
    counterfactual: str
    replay_head: int | str
    stopped_by: str
    seconds: float
    growth_max: float | None
    missed: float | None = None
    head_error: float | None = None
    update: str = "tangent"
    norms: Sequence[tuple[int, float]] | None = None


def figures(record: AuditRecord) -> dict[str, Any]:
    """A record without the norms along the way."""
    return {key: value for key, value in asdict(record).items() if key != "norms"}


def write_audit(folder: Path, records: Sequence[AuditRecord]) -> Path:
    """Writes `audit_records.json` and, in the same order, `norms.json` into `folder`, atomically; rank 0 calls."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit_records.json"
    write_json(path, [figures(record) for record in records])
    rows = [json.dumps(record.norms, allow_nan=False) for record in records]
    write_atomic(folder / NORMS_FILE, "[\n" + ",\n".join(rows) + "\n]\n")
    return path
