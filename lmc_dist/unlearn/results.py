"""What a finished run leaves behind: model, correction, audit, result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmc_dist.curvature import HVPConfig
from lmc_dist.export import export_model
from lmc_dist.runtime import agreement
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import write_json
from lmc_dist.trajectory.logger import package_versions
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import write_audit
from lmc_dist.unlearn.correction import Correction


def library_result(
    log: TrajectoryLog,
    correction: Correction,
    request: Counterfactual,
    hvp: HVPConfig,
    K: int | None,
    replay_head: int | str,
    update: str,
    seconds: float,
) -> dict[str, Any]:
    """What result.json says of a correction that was asked for by a call, not by a configuration. Collective."""
    return {
        "status": "done",
        "rel_error": None,
        "seconds_unlearn": seconds,
        "seconds_retrain": None,
        "gradients_equivalent": correction.gradients_equivalent,
        "v_norm": correction.v.norm(),
        "n_units": len(correction.audit),
        "world_size": log.layout.world_size,
        "engine": log.manifest.engine,
        "config": {
            "K": K,
            "hessian_mode": hvp.mode,
            "damping": hvp.damping,
            "counterfactual": request.kind,
            "replay_head": replay_head,
            "update": update,
        },
        "versions": package_versions(),
        "log_fingerprint": log.fingerprint,
    }


def write_results(
    folder: Path,
    log: TrajectoryLog,
    module: ShardedModule,
    theta_hat: ShardedVector,
    correction: Correction,
    result: dict[str, Any],
    tokenizer: Any = None,
) -> None:
    """Writes model/, correction/, audit/ and result.json into `folder`. Collective.

    Args:
        folder: Where to; see `runtime.promoted`.
        log: The log that was unlearned from.
        module: The model on shards, for its config and its frozen weights.
        theta_hat: Corrected weights.
        correction: v and its audit records.
        result: Content of result.json; `model_checksum` is added.
        tokenizer: Saved beside the model when given.
    """
    dtypes = {row["name"]: getattr(torch, row["dtype"]) for row in log.manifest.parameters}
    model_checksum = export_model(folder / "model", theta_hat, dtypes, module.module, tokenizer, module.frozen)
    with agreement():
        correction.save(folder / "correction")
        if log.layout.rank == 0:
            write_audit(folder / "audit", correction.audit)
            if result.get("privacy") is not None:
                write_json(folder / "audit" / "privacy.json", result["privacy"])
            write_json(folder / "result.json", {**result, "model_checksum": model_checksum})
