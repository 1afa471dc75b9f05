"""An engine set to a place in a logged run, and logged steps taken by it, with or without some samples."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import EngineShards
from lmc_dist.shards.module import set_rng_state
from lmc_dist.shards.precision import IEEE, float32_matmuls
from lmc_dist.shards.relayout import relayout
from lmc_dist.trajectory.batches import BLANK, BatchSource, blank_rows, empty_rows, logged_batch
from lmc_dist.trajectory.counterfactual import EditedStep
from lmc_dist.trajectory.record import MicroRecord, Segment, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.store import TrajectoryLog

FILLER_TOKENS = 8  # of an empty row, where nothing says how many it had


def stand_at(shards: EngineShards, log: TrajectoryLog, step: int) -> None:
    """Sets an engine's weights and optimizer state to those of a snapshot. Collective."""
    vectors, scalars = log.snapshot(step)
    shards.write(relayout(vectors.pop("theta"), shards.layout))
    shards.write_state({key: relayout(vector, shards.layout) for key, vector in vectors.items()}, scalars)


def can_be_exact(shards: EngineShards, segment: Segment) -> bool:
    """Whether the engine rounds as the one did that ran a segment. Local.

    Not in float16 under DeepSpeed: gradients then depend on the loss scale, which is its own.
    """
    same = (shards.name, shards.layout.world_size) == (segment.engine, segment.world_size)
    return same and (torch.float16 not in (shards.dtype, shards.autocast) or hasattr(shards, "replay_scale"))


def check_reproduced(shards: EngineShards, record: StepRecord) -> None:
    """Checks that an engine that has repeated a step holds the weights that training had after it. Collective.

    Raises:
        LmcError: It does not.
    """
    if checksum(shards.read()) != record.checksum:
        raise LmcError(
            f"replay of step {record.step} does not reproduce its checksum: other hardware, thread count, package versions, "
            "attention kernel (model.attn_implementation) or engine settings than in training (see manifest.json), other "
            "data or frozen parameters, or a loss that was not the model's own alone (a regulariser, noise, label smoothing)"
        )


def warm_up(shards: EngineShards, log: TrajectoryLog, batches: BatchSource, start: int) -> None:
    """Readies a fresh engine to go on in the middle of a run; weights, state and random numbers stay. Collective."""
    ids = next(
        (m.sample_ids for s in range(start, log.num_steps) for m in log.record(s).micro_batches if m.sample_ids), ()
    )
    if ids:
        inputs, labels = batches.inputs(ids[:1])
        shards.warm_up(blank_rows({**inputs, "labels": labels}, [0]))


def run_step(
    shards: EngineShards,
    edited: EditedStep,
    batches: BatchSource,
    manifest: TrajectoryManifest,
    attempt: Callable[[], None] | None = None,
) -> None:
    """One optimizer step of the engine on the edited step's passes. Collective.

    The logged passes are dealt out to the present ranks in order; ranks left without one run a pass without samples.

    Args:
        shards: Of the engine.
        edited: The step.
        batches: Samples by id.
        manifest: Of the logged run, which says how the loss was normalised and matrix products were rounded.
        attempt: For a logger that watches: called before the passes, also where float16 overflowed and they are run
            again; every batch then has the field `index`.
    """
    for group, lr in zip(shards.param_groups, edited.record.lr, strict=True):
        group["lr"] = lr
    if hasattr(shards, "replay_scale"):  # DeepSpeed brings its own
        shards.replay_scale = edited.record.loss_scale
    shards.module.train()
    is_done = False
    with float32_matmuls(manifest.segment(edited.record.step).run.get("matmul", IEEE)):
        while not is_done:
            if attempt is not None:
                attempt()
            _run_passes(shards, edited, batches, manifest.loss_normalization, attempt is not None)
            is_done = shards.step()


def _run_passes(
    shards: EngineShards, edited: EditedStep, batches: BatchSource, normalization: str, is_indexed: bool
) -> None:
    rank, world_size = shards.layout.rank, shards.layout.world_size
    passes = edited.micro_batches
    rounds = -(-len(passes) // world_size)
    is_dealt_as_logged = len(passes) == rounds * world_size and all(
        (p.record.micro_step, p.record.rank) == divmod(i, world_size) for i, p in enumerate(passes)
    )
    for i in range(rounds):
        position = i * world_size + rank
        micro = passes[position] if position < len(passes) else None
        if micro is None or not micro.record.sample_ids:  # a filler: no sample, no target
            rows, width = (1, None) if micro is None else (len(micro.record.blanks) or 1, micro.record.width)
            inputs, labels = empty_rows(rows, width or FILLER_TOKENS, shards.device)
            num_items, scale = max((p.denominator for p in passes), default=0.0) or 1.0, float(world_size)
        else:
            # As training empties them: attention takes another path where a row is shorter than the others.
            dropped = [row for row, keep in enumerate(micro.kept) if not keep]
            inputs, labels = logged_batch(micro.record, batches, dropped)
            num_items = micro.denominator
            if normalization == "micro_batch_token_mean":
                num_items /= len(passes)
            scale = world_size * num_items / micro.denominator
        if is_indexed:
            inputs["index"] = torch.tensor([BLANK] * len(labels) if micro is None else row_ids(micro.record))
        if micro is not None and micro.record.random_state is not None:
            state = torch.frombuffer(bytearray(micro.record.random_state), dtype=torch.uint8)
            set_rng_state(state, shards.device)
        is_last = i == rounds - 1
        is_local = micro is not None and micro.record.is_local if is_dealt_as_logged else not is_last
        shards.run_pass({**inputs, "labels": labels}, num_items, scale, is_last, is_local)


def row_ids(record: MicroRecord) -> list[int]:
    """The sample of each row of a pass, BLANK for an empty one; one empty row for a filler without any. Pure."""
    ids = iter(record.sample_ids)
    rows = len(record.sample_ids) + len(record.blanks)
    return [BLANK if row in record.blanks else next(ids) for row in range(rows)] or [BLANK]
