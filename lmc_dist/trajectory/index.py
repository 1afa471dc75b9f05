"""The field `index` of a batch: which sample each of its rows is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmc_dist.data import IGNORED
from lmc_dist.errors import LmcError
from lmc_dist.trajectory.batches import BLANK


def read_index(index: Any, inputs: Mapping[str, torch.Tensor]) -> list[int]:
    """The sample of each row of a batch, BLANK for an empty one. Local.

    Args:
        index: The batch's field; None is a batch without ids, as where they are registered by hand.
        inputs: What the model sees of it.

    Raises:
        LmcError: Ids that are no integers ≥ 0, of another number than the rows, or an empty row with a target.
    """
    if index is None:
        return []
    ids = index if torch.is_tensor(index) else _as_tensor(index)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise LmcError(f"`index` holds {str(ids.dtype).removeprefix('torch.')}: sample ids are integers ≥ 0")
    found: list[int] = ids.reshape(-1).tolist()
    if odd := [i for i in found if i < 0 and i != BLANK]:
        raise LmcError(
            f"`index` holds the sample id {odd[0]}: sample ids are integers ≥ 0 ({BLANK} marks a row without sample)"
        )
    check_row_number(found, inputs)
    labels = inputs.get("labels")
    for row, i in enumerate(found):
        if i == BLANK and labels is not None and (labels[row, 1:] != IGNORED).any():
            raise LmcError(
                f"row {row} of a batch has {BLANK} as `index`, which marks a row without sample, and has targets (labels "
                f"other than {IGNORED}): sample ids are integers ≥ 0, number the samples from 0"
            )
    return found


def _as_tensor(index: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise LmcError(f"`index` holds {repr(index)[:80]}: sample ids are integers ≥ 0") from None


def check_row_number(ids: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> None:
    """Checks that a batch has one id for each of its rows. Local.

    Raises:
        LmcError: It has more or fewer, as where several samples are packed into one row.
    """
    rows = next((len(inputs[name]) for name in ("input_ids", "labels") if name in inputs), len(ids))
    if len(ids) != rows:
        raise LmcError(
            f"a batch has {len(ids)} sample ids and {rows} rows: a sample must be one row of its own. Turn packing off (with "
            "TRL packing=False and padding_free=False, a collator that pads instead of DataCollatorWithFlattening)"
        )
