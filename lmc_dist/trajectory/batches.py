"""From sample ids back to the tensors the model saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch.nn.functional import pad

from lmc_dist.data import IGNORED, SampleDataset, collate
from lmc_dist.errors import LmcError, shorten
from lmc_dist.trajectory.record import MicroRecord

BLANK = -1  # `index` of a row without a sample
# What the model sees of a sample.
BATCH_INPUTS = ("input_ids", "attention_mask", "labels")


def batch_digest(inputs: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b-64 of the tokens, mask and labels that the model sees in one pass, padding included."""
    hasher = hashlib.blake2b(digest_size=8)
    for name in BATCH_INPUTS:
        if name in inputs:
            tensor = inputs[name].to("cpu", torch.int64).contiguous()
            hasher.update(f"{name}{tuple(tensor.shape)}".encode())
            hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()


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
        self.pad_token_id = dataset.pad_token_id
        self._known = set(dataset.ids)

    def inputs(self, ids: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = collate(self.dataset.by_id(ids), self.dataset.pad_token_id)
        tensors = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return tensors, batch["labels"].to(self.device)

    def num_targets(self, ids: Sequence[int]) -> list[int]:
        return [self.dataset.num_targets(i) for i in ids]

    def unknown(self, ids: Iterable[int]) -> list[int]:
        return sorted(set(ids) - self._known)


def logged_batch(
    record: MicroRecord, batches: BatchSource, dropped: Sequence[int] = ()
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs, targets) of a pass as the model saw them, with its empty rows. Local.

    Args:
        record: The pass; it has samples.
        batches: Samples by id.
        dropped: Places among its samples whose rows are emptied as well.

    Raises:
        LmcError: The data gives another batch.
    """
    inputs, labels = seen_batch(record, batches)
    batch = blank_rows({**inputs, "labels": labels}, dropped)
    labels = batch.pop("labels")
    return with_blanks(batch, labels, record.blanks, record.width)


def seen_batch(record: MicroRecord, batches: BatchSource) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The samples of a pass as the model saw them, padded as they were. Local.

    Raises:
        LmcError: The data gives another batch.
    """
    inputs, labels = batches.inputs(record.sample_ids)
    inputs, labels = as_wide(inputs, labels, record.width, getattr(batches, "pad_token_id", 0))
    if record.digest is None or record.digest == batch_digest({**inputs, "labels": labels}):
        return inputs, labels
    unmasked = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    if record.digest == batch_digest({**unmasked, "labels": labels}):  # the model got no mask
        return unmasked, labels
    raise LmcError(
        f"the data gives another batch than the model saw for samples {shorten(record.sample_ids)}: other data, tokenizer, "
        "prompt or collator than in training. Give the same (`lmc log doctor` tells which passes differ), or a BatchSource "
        "of your own"
    )


def as_wide(
    inputs: dict[str, torch.Tensor], labels: torch.Tensor, width: int | None, pad_token_id: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch (B, T) with rows of `width` tokens: collators pad otherwise, above all by other multiples. Pure.

    Raises:
        LmcError: It is wider, and not by padding alone.
    """
    found = labels.shape[1]
    if width is None or width == found:
        return inputs, labels
    batch = {**inputs, "labels": labels}
    if width < found:
        mask = inputs.get("attention_mask")
        if bool((labels[:, width:] != IGNORED).any()) or (mask is not None and bool(mask[:, width:].any())):
            raise LmcError(f"a pass was {width} tokens wide, its samples have {found}: is it the same dataset?")
        batch = {name: x[:, :width] if x.shape[1:2] == (found,) else x for name, x in batch.items()}
    else:
        fills = {"input_ids": pad_token_id, "labels": IGNORED}
        wide = [name for name, x in batch.items() if x.shape[1:2] == (found,)]
        batch |= {name: pad(batch[name], (0, width - found), value=fills.get(name, 0)) for name in wide}
    labels = batch.pop("labels")
    return batch, labels


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
