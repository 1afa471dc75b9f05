"""Unlearning for language models trained with DeepSpeed ZeRO-3: sharded logs, curvature, corrections, exact replay.

The public names are imported when they are first used, so that `import lmc_dist` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "HVPConfig": "lmc_dist.curvature",
    "hvp_apply": "lmc_dist.curvature",
    "ShardLayout": "lmc_dist.shards.layout",
    "ShardedVector": "lmc_dist.shards.vector",
    "ShardedModule": "lmc_dist.shards.module",
    "StepRecord": "lmc_dist.trajectory.record",
    "StepLog": "lmc_dist.trajectory.record",
    "TrajectoryLog": "lmc_dist.trajectory.store",
    "TrainingLogger": "lmc_dist.trajectory.logger",
    "TrainingLoggerCallback": "lmc_dist.trajectory.callback",
    "AuditRecord": "lmc_dist.unlearn.audit",
    "compute_correction": "lmc_dist.unlearn.correction",
    "apply_correction": "lmc_dist.unlearn.correction",
    "run_lmcleaner_batch_unlearning": "lmc_dist.unlearn.api",
    "run_lmcleaner_sample_unlearning": "lmc_dist.unlearn.api",
    "LMCleanerBatchLevel": "lmc_dist.trainers.lmcleaner",
    "LMCleanerSampleLevel": "lmc_dist.trainers.lmcleaner",
    "OnlineUnlearning": "lmc_dist.online.service",
    "OnlineSettings": "lmc_dist.config",
    "unlearn_online": "lmc_dist.online.hf",
    "Ledger": "lmc_dist.online.ledger",
    "LmcError": "lmc_dist.errors",
}

__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lmc_dist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
