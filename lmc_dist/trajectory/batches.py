"""From sample ids back to the tensors the model saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from lmc_dist.data import SampleDataset, collate
from lmc_dist.errors import LmcError

IGNORED = -100
BLANK = -1  # `index` of a row without a sample


class BatchSource(Protocol):
    """Regenerates batches by sample id."""

    def inputs(self, ids: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(keyword arguments of the forward without labels, targets), padded as in training."""

    def num_targets(self, ids: Sequence[int]) -> list[int]:
        """Target tokens of each sample."""

    def unknown(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that the dataset does not have."""


class DatasetBatches:
    """Batches of a `SampleDataset`, collated as in training.

    Args:
        dataset: The dataset training used.
        device: Where tensors are put.
    """

    def __init__(self, dataset: SampleDataset, device: torch.device | str = "cpu") -> None:
        self.dataset, self.device = dataset, device
        self._known = set(dataset.ids)

    def inputs(self, ids: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = collate(self.dataset.by_id(ids), self.dataset.pad_token_id)
        tensors = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return tensors, batch["labels"].to(self.device)

    def num_targets(self, ids: Sequence[int]) -> list[int]:
        return [self.dataset.num_targets(i) for i in ids]

    def unknown(self, ids: Iterable[int]) -> list[int]:
        return sorted(set(ids) - self._known)


def blank_rows(batch: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch (B, T) whose `rows` hold no sample any more: no token of theirs, no target, BLANK as `index`.

    All shapes stay, so that the other rows are computed to the same bit; what is in an empty row enters nothing.
    """
    if not rows:
        return batch
    places = torch.tensor(rows, device=batch["labels"].device)
    found = {name: tensor.clone() for name, tensor in batch.items()}
    found["input_ids"][places] = 0
    if "attention_mask" in found:
        found["attention_mask"][places] = 0
        found["attention_mask"][places, 0] = 1  # attention over nothing at all would be NaN
    found["labels"][places] = IGNORED
    if "index" in found:
        found["index"][places] = BLANK
    return found


def empty_rows(
    rows: int, width: int, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs, targets) of a pass of `rows` rows of `width` tokens without any sample."""
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: torch.zeros(rows, width, dtype=torch.int64, device=device) for name in names}
    batch = blank_rows(batch, range(rows))
    labels = batch.pop("labels")
    return batch, labels


def with_blanks(
    inputs: dict[str, torch.Tensor], labels: torch.Tensor, blanks: Sequence[int], width: int | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch of a pass as the model saw it: samples' rows with empty ones at `blanks`, padded to `width` tokens."""
    if not blanks:
        return inputs, labels
    assert width is not None
    rows = len(labels) + len(blanks)
    if labels.shape[1] > width:
        raise LmcError(f"a pass was {width} tokens wide, its samples have {labels.shape[1]}: is it the same dataset?")
    kept = torch.tensor([row for row in range(rows) if row not in blanks], device=labels.device)

    def placed(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        whole = torch.full((rows, width), fill, dtype=tensor.dtype, device=tensor.device)
        whole[kept, : tensor.shape[1]] = tensor
        return whole

    batch = {name: placed(tensor, 0) for name, tensor in inputs.items()} | {"labels": placed(labels, IGNORED)}
    batch = blank_rows(batch, blanks)
    labels = batch.pop("labels")
    return batch, labels
