"""The samples of a Trainer's dataset by their own ids: items carry them in the field `index`, as for the logger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset

from lmc_dist.data import IGNORED, SampleDataset
from lmc_dist.errors import LmcError

ID = "index"


def sample_positions(dataset: Any) -> dict[int, int]:
    """Sample id → position in a map-style dataset. Local; reads all items unless the dataset has columns.

    Raises:
        LmcError: Not a map-style dataset, items without an id, or an id twice.
    """
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise LmcError(
            "train_dataset must be the map-style dataset of the logged training: samples are found by their id"
        )
    if isinstance(dataset, SampleDataset):
        ids: Sequence[Any] = dataset.ids
    elif hasattr(dataset, "column_names"):
        ids = list(dataset[ID]) if ID in dataset.column_names else []
    else:
        ids = [item[ID] for item in (dataset[i] for i in range(len(dataset))) if ID in item]
    if len(ids) != len(dataset):
        raise LmcError(f"items of train_dataset need an integer `{ID}`, the sample ids of the logged training")
    positions = {int(i): position for position, i in enumerate(ids)}
    if len(positions) < len(ids):
        raise LmcError("sample ids repeat in train_dataset: give every sample its own")
    return positions


def without(dataset: Any, positions: Mapping[int, int], forgotten: Collection[int]) -> Any:
    """The dataset without some samples, in its order."""
    kept = [position for i, position in positions.items() if i not in forgotten]
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


class CollatedBatches:
    """Batches of any dataset by the Trainer's own collator: a `BatchSource`.

    Args:
        dataset: Map-style; items have `index` and `labels`.
        positions: Of its samples.
        collator: Makes a batch of items, `labels` among its tensors.
        device: Where tensors are put.
    """

    def __init__(
        self,
        dataset: Any,
        positions: Mapping[int, int],
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset, self.positions, self.collator, self.device = dataset, positions, collator, device
        self._num_targets: dict[int, int] = {}

    def inputs(self, ids: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = self.collator([dict(self.dataset[self.positions[i]]) for i in ids])
        tensors = {key: value.to(self.device) for key, value in batch.items() if torch.is_tensor(value)}
        tensors.pop(ID, None)
        if "labels" not in tensors:
            raise LmcError("the data collator makes no `labels`: losses of samples cannot be computed")
        return tensors, tensors.pop("labels")

    def num_targets(self, ids: Sequence[int]) -> list[int]:
        for i in ids:
            if i not in self._num_targets:
                self._num_targets[i] = int((self.inputs([i])[1][0, 1:] != IGNORED).sum())
        return [self._num_targets[i] for i in ids]

    def unknown(self, ids: Iterable[int]) -> list[int]:
        return sorted(set(ids) - set(self.positions))
