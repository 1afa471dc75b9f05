"""What the forward passes of one step showed, on each rank, and how the ranks' parts become one record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BATCH_INPUTS, batch_digest
from lmc_dist.trajectory.record import LossNormalization, MicroRecord

if TYPE_CHECKING:
    from lmc_dist.shards.engines import EngineShards

_CHUNK = 1 << 16  # elements
NO_LABELS = (
    "no `labels` reach the model, so the loss is not computed by the model (label smoothing, a compute_loss_func, or a "
    "compute_loss of one's own that takes them out): only the model's own token cross entropy can be logged, leave them in "
    "the batch and use the loss that the model returns"
)


@dataclass
class Pass:
    """What one forward pass of this rank showed."""

    sample_ids: list[int]
    num_targets: int
    num_items: float | None
    random_state: torch.Tensor
    drew_random: bool = False
    loss: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    is_local: bool = False
    autocast: torch.dtype | None = None
    blanks: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int | None:
        return len(self.inputs["input_ids"]) if "input_ids" in self.inputs else None

    def to_wire(self, loss_scale: float = 1.0) -> dict[str, Any]:
        """What rank 0 needs to know; the loss reached the gradient multiplied by `loss_scale` as well."""
        return {
            "ids": self.sample_ids,
            "targets": self.num_targets,
            "labels": "labels" in self.inputs,
            "items": self.num_items,
            "loss": None if self.loss is None else float(self.loss),
            "seed": None if self.seed is None else float(self.seed) / loss_scale,
            "state": self.random_state.cpu().numpy().tobytes() if self.drew_random else None,
            # a pass whose ids are not those of its rows (a filler, a masked reference) cannot be regenerated from ids
            "digest": batch_digest(self.inputs) if self.num_rows == len(self.sample_ids) else None,
            "local": self.is_local,
            "blanks": self.blanks,
            "width": self.inputs["input_ids"].shape[1] if self.num_rows is not None else None,
        }


def batch_samples(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The samples of a batch without their padding: `input_ids`, `labels`, and the token that `pad`s (None: nothing).

    Raises:
        LmcError: Padding on the left or in the middle: where it lies could not be told again from the tokens. A batch
            that lacks what the model needs.
    """
    if missing := [name for name in BATCH_INPUTS if name not in inputs]:
        if missing == ["labels"]:
            raise LmcError(NO_LABELS)
        raise LmcError(f"save_batch_data needs {', '.join(BATCH_INPUTS)} in every batch, and {missing[0]} is missing")
    samples = []
    for ids, mask, labels in zip(*(inputs[name].tolist() for name in BATCH_INPUTS), strict=True):
        length = sum(mask)
        if mask != [1] * length + [0] * (len(mask) - length):
            raise LmcError("save_batch_data needs batches that are padded on the right")
        pad = ids[length] if length < len(ids) else None
        samples.append({"input_ids": ids[:length], "labels": labels[:length], "pad": pad})
    return samples


def first_leaf(module: torch.nn.Module) -> torch.nn.Module:
    """A part of the model without parts, the first by registration (a language model's embedding)."""
    return next(part for part in module.modules() if not any(True for _ in part.children()))


def check_autocast(step: int, shards: EngineShards, passes: Sequence[Pass]) -> None:
    """Checks that the passes of a torch loop computed in what was declared, DeepSpeed's settings say it themselves. Local.

    Raises:
        LmcError: They did not, so that a replay would compute otherwise.
    """
    if shards.name.startswith("deepspeed"):
        return
    for seen in passes:
        if seen.autocast != shards.autocast:
            found, declared = (str(d).removeprefix("torch.") for d in (seen.autocast, shards.autocast))
            raise LmcError(
                f"step {step} computed under autocast {found}, declared is {declared}: pass autocast='{found}' to "
                "TrainingLogger"
            )


def step_statistics(
    before: ShardedVector,
    after: ShardedVector,
    passes: list[Pass],
    layout: ShardLayout,
    flags: Sequence[bool] = (),
    drift: int = 0,
) -> dict[str, Any]:
    """What must be known of a step at once, equal on all ranks. One all-gather; collective.

    Returns:
        `changed`: whether any weight did; `same_ids`: whether all ranks saw the same samples; `flags`: those of each rank;
        `drifted`: whether the ranks' `drift`s, modulo 2^32, add up to any.
    """
    ids = repr([p.sample_ids for p in passes]).encode()
    digest = int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "big", signed=True)
    mine = torch.tensor([digest, int(differs(before.flat, after.flat)), drift, *map(int, flags)])
    rows = mine[None]
    if layout.world_size > 1:
        gathered = [torch.empty_like(mine) for _ in range(layout.world_size)]
        dist.all_gather(gathered, mine, group=layout.group)
        rows = torch.stack(gathered)
    seen = any(p.sample_ids for p in passes)
    return {
        "same_ids": seen and len(set(rows[:, 0].tolist())) == 1,
        "changed": bool(rows[:, 1].any()),
        "drifted": sum(rows[:, 2].tolist()) % 2**32 != 0,
        "flags": [tuple(map(bool, row)) for row in rows[:, 3:].tolist()],
    }


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two 1-D tensors differ in any element; looks no further than the first difference."""
    return any(not torch.equal(x, y) for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True))


def gather_to_main(value: Any, layout: ShardLayout) -> list[Any]:
    """All ranks' values on rank 0, [] elsewhere. Collective."""
    if layout.world_size == 1:
        return [value]
    box: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(value, box, group=layout.group, group_dst=0)
    return box or []


def merge_passes(
    ranks: list[list[dict[str, Any]]], normalization: LossNormalization
) -> tuple[tuple[MicroRecord, ...], float, float | None]:
    """All ranks' passes of one step → (records ordered by micro step and rank, D_s, loss).

    Raises:
        LmcError: The ranks ran different numbers of passes, the loss is not the model's own, or it was not normalised as
            declared.
    """
    micro_steps = len(ranks[0])
    if any(len(passes) != micro_steps for passes in ranks):
        raise LmcError(f"ranks ran {[len(p) for p in ranks]} forward passes in one step; they must agree")
    if not micro_steps:
        raise LmcError("the optimizer stepped without a forward pass in training mode: call engine.train()")
    passes = [(r, m, ranks[r][m]) for m in range(micro_steps) for r in range(len(ranks))]
    if not all(p["labels"] for _, _, p in passes):
        raise LmcError(NO_LABELS)
    targets = [p["targets"] for _, _, p in passes]
    items = {p["items"] for _, _, p in passes}
    if normalization == "micro_batch_token_mean":
        if items != {None}:
            raise LmcError("num_items_in_batch reaches the model, so the loss is no mean over micro-batches")
        denominators = [float(n * len(passes)) for n in targets]
    else:
        if len(items) != 1 or None in items:
            raise LmcError(
                f"the model got num_items_in_batch={sorted(map(str, items))}: pass the target tokens of the global batch, "
                "the same on all ranks, or declare loss_normalization='micro_batch_token_mean' if the loss is the plain "
                "mean over micro-batches"
            )
        if normalization == "global_token_mean" and items != {float(sum(targets))}:
            raise LmcError(
                f"the loss was divided by {items.pop()}, but the global batch holds {sum(targets)} target tokens: "
                "declare loss_normalization='given' if that is meant (such a log cannot be renormalised)"
            )
        denominators = [items.pop()] * len(passes)
    if normalization != "given":
        # The engine averages over ranks, so a sum over them needs a loss multiplied by their number.
        check_seeds(passes, len(ranks) if normalization == "global_token_mean" else 1 / micro_steps)
    records = tuple(
        MicroRecord(r, m, tuple(p["ids"]), d, p["state"], p["digest"], p["local"], p["blanks"], p["width"])
        for (r, m, p), d in zip(passes, denominators, strict=True)
    )
    losses = [p["loss"] for _, _, p in passes]
    if None in losses:
        loss = None
    else:  # a mean over passes was not divided by their number yet
        loss = sum(losses) / (len(passes) if normalization == "micro_batch_token_mean" else 1)
    return records, sum(denominators) / len(denominators), loss


def check_seeds(passes: list[tuple[int, int, dict[str, Any]]], expected: float) -> None:
    """Checks that the model's loss reached the gradient with the weight its normalisation needs.

    Raises:
        LmcError: It was scaled otherwise, so D_s would not be what the gradient was divided by.
    """
    for rank, micro_step, p in passes:
        if p["targets"] and p["seed"] is not None and abs(p["seed"] - expected) > 1e-6 * expected:
            raise LmcError(
                f"rank {rank}, pass {micro_step}: the loss entered the gradient multiplied by {p['seed']:g}, its "
                f"normalisation needs {expected:g}: with num_items_in_batch use engine.backward(loss * world_size, "
                "scale_wrt_gas=False), with a mean over micro-batches plain engine.backward(loss)"
            )


def clip_coefficient(grad_norm: float | None, max_grad_norm: float) -> float:
    """What clipping multiplied the gradient by, as DeepSpeed and torch compute it."""
    if not max_grad_norm or grad_norm is None or grad_norm != grad_norm:
        return 1.0
    return 1.0 / max((grad_norm + 1e-6) / max_grad_norm, 1.0)
