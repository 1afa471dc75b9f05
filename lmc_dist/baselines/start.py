"""Where a baseline starts: the end of the log, or the model that a finished run left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lmc_dist.audit.hidden import is_hidden
from lmc_dist.audit.request import is_of_request
from lmc_dist.config import ForgetConfig
from lmc_dist.errors import LmcError, first_line
from lmc_dist.evaluate.model_folder import check_shapes, find_model
from lmc_dist.shards.checkpoint import read_checkpoint
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.training import read_request
from lmc_dist.trajectory.files import read_json
from lmc_dist.unlearn.asked import AskedRun


@dataclass(frozen=True)
class Start:
    """Weights to start from, and what it took to get there.

    Attributes:
        theta: θ, laid out like the log.
        label: In tables; empty for the end of the log.
        folder: Of the model; None for the end of the log.
        gradients: Cost in gradients of a whole training batch; None where the folder does not say.
        seconds: Likewise.
    """

    theta: ShardedVector
    label: str = ""
    folder: str | None = None
    gradients: float | None = 0.0
    seconds: float | None = 0.0


def read_start(run: AskedRun, folder: Path, theta: ShardedVector) -> Start:
    """The model in a folder, shard by shard. Local.

    Args:
        run: The log and request that it must be of.
        folder: Of a finished run (`lmc unlearn`, `lmc baseline`), or of a checkpoint.
        theta: θ_τ, for the type of its elements.

    Raises:
        LmcError: No model there, one of another architecture or with other frozen weights, or a run on another log or for
            another request.
    """
    found = find_model(folder)
    weights = _read(found.path, run.log.layout).to(theta.flat.dtype)
    frozen = run.module.frozen
    if frozen is not None:
        stored = _read(found.path, frozen.layout).to(frozen.flat.dtype)
        if not bool((stored.flat == frozen.flat).all()):
            raise LmcError(f"the frozen weights in {found.path} are not those of model.path: start from another model")
    if not (folder / "result.json").exists():
        return Start(weights, f"the model in {folder}", str(folder), None, None)
    result: dict[str, Any] = read_json(folder / "result.json")
    if result.get("log_fingerprint") != run.log.fingerprint:
        raise LmcError(f"baseline.start {folder} is a run on another log than {run.log.path}: give its own (--log_dir)")
    if not _is_same_request(run, result, folder):
        raise LmcError(
            f"baseline.start {folder} forgot something else than is asked for here: give the same --forget option"
        )
    rows = result.get("rows", [])
    label = next((row["label"] for row in rows if row["seconds"] == result["seconds_unlearn"]), f"the run in {folder}")
    return Start(weights, label, str(folder), result["gradients_equivalent"], result["seconds_unlearn"])


def _is_same_request(run: AskedRun, result: dict[str, Any], folder: Path) -> bool:
    """Whether a finished run forgot what is asked for here; a run of `lmc unlearn` names digests, a baseline the ids."""
    forget = result["config"]["forget"]
    if is_hidden(forget):
        return is_of_request(result, folder, run.asked_for)
    return read_request(replace(run.config, forget=ForgetConfig(**forget)), run.dataset) == run.asked_for


def _read(folder: Path, layout: ShardLayout) -> ShardedVector:
    """This rank's shards of a checkpoint's weights in float32."""
    try:
        check_shapes(folder, layout)
        return read_checkpoint(folder, ShardedVector.zeros(layout))
    except (OSError, KeyError, SafetensorError) as error:
        raise LmcError(f"the weights in {folder} are not those of the logged model: {first_line(error)}") from None
