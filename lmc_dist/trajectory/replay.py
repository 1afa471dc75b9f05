"""Run logged steps again on the engine that trained, with or without some samples.

At the logged world size the same samples meet the same random numbers in the same passes, and the result is that of
training to the bit; at another one passes are dealt out anew and only rounding differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import backward_micro_batch, engine_shards
from lmc_dist.shards.module import set_rng_state
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource, mask_samples
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedStep, edit_step
from lmc_dist.trajectory.record import TrajectoryManifest
from lmc_dist.trajectory.store import TrajectoryLog


@dataclass(frozen=True)
class ReplayResult:
    """Where replay ended.

    Attributes:
        theta: θ after the last step.
        steps: Gradients computed.
        verified: Steps whose checksum equalled the logged one (those before the first change).
        exact: Whether this world size can be bit-exact; otherwise expect a relative difference up to 1e-5.
    """

    theta: ShardedVector
    steps: int
    verified: int
    exact: bool


def replay(
    engine: Any,
    log: TrajectoryLog,
    batches: BatchSource,
    counterfactual: Counterfactual | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> ReplayResult:
    """Repeats the run from the last snapshot before the first changed step, without the forgotten data. Collective.

    Args:
        engine: A DeepSpeed ZeRO-3 engine of the logged model, with the same optimizer; its state is overwritten.
        log: The logged run.
        batches: Samples by id.
        counterfactual: What to leave out; None repeats the whole run as it was.
        progress: Called with each step done.

    Raises:
        LmcError: Snapshot missing, or, at the logged world size, a step that does not reproduce its checksum.
    """
    shards = engine_shards(engine)
    first = 0
    if counterfactual is not None:
        first = next((r.step for r in log.records() if counterfactual.touches(r)), log.num_steps)
    log.require(first, updates=False)
    start = log.nearest_snapshot(first)
    if start == first and start > log.first_step:
        start = log.nearest_snapshot(start - 1)  # some unchanged steps, whose checksums certify the rest
    vectors, scalars = log.snapshot(start)
    shards.write(vectors.pop("theta"))
    shards.write_state(vectors, scalars)
    exact = shards.layout.world_size == log.manifest.world_size
    steps = verified = 0
    for step in range(start, log.num_steps):
        record = log.record(step)
        edited = edit_step(record, counterfactual, log.manifest.loss_normalization, batches.num_targets)
        if record.applied and not edited.skipped:
            run_step(engine, edited, batches, log.manifest.loss_normalization)
            steps += 1
        if step < first or counterfactual is None:
            if exact and checksum(shards.read()) != record.checksum:
                raise LmcError(
                    f"replay of step {step} does not reproduce its checksum: other hardware, thread count or package "
                    "versions than in training (see manifest.json), or other data"
                )
            verified += exact
        progress(step)
    return ReplayResult(shards.read(), steps, verified, exact)


def logged_optimizer(model: torch.nn.Module, manifest: TrajectoryManifest) -> torch.optim.Optimizer:
    """The optimizer of the logged run: its class, its groups, its hyper-parameters.

    Raises:
        LmcError: Not an optimizer of torch.
    """
    name = manifest.optimizer["class"]
    kind = getattr(torch.optim, name, None)
    if kind is None:
        raise LmcError(
            f"the log was trained with {name}, which is not torch's: build the engine and pass it to replay()"
        )
    accepted = set(inspect.signature(kind).parameters)
    named = dict(model.named_parameters())
    groups = []
    for i, settings in enumerate(manifest.optimizer["groups"]):
        members = [named[row["name"]] for row in manifest.parameters if row["group"] == i]
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in accepted}
        groups.append({"params": members, **values})
    return kind(groups)


def replay_engine(model: torch.nn.Module, log: TrajectoryLog, settings: dict[str, Any] | None = None) -> Any:
    """A DeepSpeed ZeRO-3 engine that repeats the logged run. Collective.

    Args:
        model: The logged architecture; its weights are overwritten by replay.
        log: The logged run.
        settings: DeepSpeed settings of the run, where they went beyond plain ZeRO-3.
    """
    import deepspeed

    base = {"zero_optimization": {"stage": 3}, "steps_per_print": 1 << 30} | (settings or {})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=logged_optimizer(model, log.manifest),
        config=base
        | {
            "train_micro_batch_size_per_gpu": 1,  # neither number is used: passes are scaled and bounded one by one
            "gradient_accumulation_steps": 1,
            "gradient_clipping": log.manifest.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine


def run_step(engine: Any, edited: EditedStep, batches: BatchSource, normalization: str) -> None:
    """One optimizer step of the engine on the edited step's passes. Collective.

    The logged passes are dealt out to the present ranks in order; ranks left without one run a pass without targets.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for group, lr in zip(engine.optimizer.param_groups, edited.record.lr, strict=True):
        group["lr"] = lr
    passes = edited.micro_batches
    rounds = -(-len(passes) // world_size)
    engine.train()
    for i in range(rounds):
        position = i * world_size + rank
        micro = passes[position] if position < len(passes) else None
        if micro is None or not micro.record.sample_ids:  # a filler: any sample, no target
            filler = next(m for m in passes if m.record.sample_ids)
            inputs, labels = batches.inputs(filler.record.sample_ids[:1])
            labels = mask_samples(labels, [False])
            num_items, scale = 1.0, 1.0
        else:
            inputs, labels = batches.inputs(micro.record.sample_ids)
            labels = mask_samples(labels, micro.kept)
            num_items = micro.denominator
            if normalization == "micro_batch_token_mean":
                num_items /= len(passes)
            scale = world_size * num_items / micro.denominator
        if micro is not None and micro.record.random_state is not None:
            state = torch.frombuffer(bytearray(micro.record.random_state), dtype=torch.uint8)
            set_rng_state(state, engine.device)
        backward_micro_batch(engine, {**inputs, "labels": labels}, num_items, scale, i == rounds - 1)
    engine.step()
