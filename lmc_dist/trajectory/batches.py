"""From sample ids back to the tensors the model saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from lmc_dist.data import SampleDataset, collate

IGNORED = -100


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


def mask_samples(labels: torch.Tensor, kept: Sequence[bool]) -> torch.Tensor:
    """Labels (B, T) with all targets of the samples that are not kept turned off."""
    keep = torch.tensor(kept, device=labels.device)[:, None]
    return torch.where(keep, labels, torch.full_like(labels, IGNORED))
