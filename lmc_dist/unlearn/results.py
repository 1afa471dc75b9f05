"""What a finished run leaves behind: model, correction, audit, result. Written aside, promoted by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.export import export_model
from lmc_dist.runtime import agreement
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import fsync_path, write_json
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.audit import write_audit
from lmc_dist.unlearn.correction import Correction


def check_output_dir(folder: Path) -> None:
    """Raises:
    LmcError: The directory holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise LmcError(f"output_dir {folder} is not empty: choose another, or pass --overwrite true")


@contextmanager
def promoted(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, and is removed when it fails. Collective."""
    part = folder.with_name(folder.name + ".part")
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with agreement():
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise
    with agreement():  # also waits for all ranks' files
        pass
    with agreement():
        if is_main:
            if folder.exists():
                folder.rmdir()  # empty: checked before
            part.replace(folder)
            fsync_path(folder.parent)


def write_results(
    folder: Path,
    log: TrajectoryLog,
    model: torch.nn.Module,
    theta_hat: ShardedVector,
    correction: Correction,
    result: dict[str, Any],
    tokenizer: Any = None,
) -> None:
    """Writes model/, correction/, audit/ and result.json into `folder`. Collective.

    Args:
        folder: Where to; see `promoted`.
        log: The log that was unlearned from.
        model: A module of the model's architecture, for its config.
        theta_hat: Corrected weights.
        correction: v and its audit records.
        result: Content of result.json; `model_checksum` is added.
        tokenizer: Saved beside the model when given.
    """
    dtypes = {row["name"]: getattr(torch, row["dtype"]) for row in log.manifest.parameters}
    model_checksum = export_model(folder / "model", theta_hat, dtypes, model, tokenizer)
    with agreement():
        correction.save(folder / "correction")
        if log.layout.rank == 0:
            write_audit(folder / "audit", correction.audit)
            write_json(folder / "result.json", {**result, "model_checksum": model_checksum})
