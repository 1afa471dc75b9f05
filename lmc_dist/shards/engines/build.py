"""Engines made anew: for a training run, or to repeat one by the settings its log holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines import DDPShards, SingleShards, UnfusedShards, engine_shards
from lmc_dist.shards.engines.loading import load_partitioned, load_sharded, load_whole
from lmc_dist.shards.layout import is_rule, shard_ranks
from lmc_dist.shards.unloaded import Unloaded

ENGINES = ("deepspeed", "fsdp2", "hsdp-R", "ddp", "single")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def build_engine(
    name: str, model: nn.Module | Unloaded, make_optimizer: MakeOptimizer, settings: dict[str, Any]
) -> Any:
    """A DeepSpeed engine, or the shards of another one, ready to train. Collective.

    Args:
        name: `deepspeed` with or without a stage behind it (the settings decide), `fsdp2`, `hsdp-R` (FSDP2 in each of R
            replicas), `ddp` or `single`.
        model: On every rank with the same weights, which go to this rank's GPU, where there is one; or one whose weights are
            still to come, which no rank then holds all of under FSDP2, HSDP and ZeRO-3.
        make_optimizer: The optimizer of a model's trainable parameters.
        settings: DeepSpeed's whole configuration, or what `EngineShards.settings` was.

    Raises:
        LmcError: Unknown engine, `single` on several ranks, or replicas that do not divide the ranks.
    """
    if name.startswith("deepspeed"):
        import deepspeed

        if isinstance(model, Unloaded):
            is_partitioned = settings.get("zero_optimization", {}).get("stage") == 3
            model = load_partitioned(model, settings) if is_partitioned else load_whole(model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=settings)
        shards = engine_shards(engine)
        if isinstance(shards, UnfusedShards):  # steps once on no gradient when it is made, working weights left behind
            shards.write(shards.read())
        return engine
    device = own_device()  # DeepSpeed sees to it by itself
    if name == "fsdp2" or name.startswith("hsdp-"):
        whole = model.module if isinstance(model, Unloaded) else model.to(device)
        module = shard_fully(whole, settings, mesh_shape(name), device)
        if isinstance(model, Unloaded):
            load_sharded(module, model.weights, device)
        return engine_shards(module, make_optimizer(module))
    model = load_whole(model, device) if isinstance(model, Unloaded) else model.to(device)
    if name == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DDPShards(DistributedDataParallel(model, **settings), make_optimizer(model))
    if name == "single":
        return SingleShards(model, make_optimizer(model))
    raise LmcError(f"unknown engine '{name}'; available: {', '.join(ENGINES)}")


def own_device() -> torch.device:
    """Where this rank computes: its present GPU, or the CPU where there is none. Local."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def mesh_shape(name: str) -> tuple[int, ...]:
    """All ranks as `fsdp2` or `hsdp-R` arranges them: (shards,) or (replicas, shards). Local.

    Raises:
        LmcError: The replicas do not divide the ranks.
    """
    world_size = dist.get_world_size()
    if name == "fsdp2":
        return (world_size,)
    try:
        shards = shard_ranks(world_size, name)
    except ValueError as error:
        raise LmcError(f"engine {name} cannot be made of {world_size} ranks: {error}") from None
    return (world_size // shards, shards)


def engine_here(name: str) -> str:
    """A logged engine as the present ranks can repeat it: HSDP whose replicas do not divide them becomes FSDP2. Local.

    Nothing is lost by it, as another world size rounds otherwise whatever the engine.
    """
    try:
        is_possible = not name.startswith("hsdp-") or shard_ranks(dist.get_world_size(), name) > 0
    except ValueError:
        is_possible = not is_rule(name)  # what is no engine at all is refused when it is made
    return name if is_possible else "fsdp2"


def shard_fully(model: nn.Module, settings: dict[str, Any], shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """`fully_shard` of the model's units and of the model.

    Args:
        model: Whole on every rank, or on the meta device.
        settings: `units`, names of modules, without them each block of the model; `param_dtype`, `reduce_dtype`.
        shape: Of the mesh: (shards,) or (replicas, shards).
        device: Where it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not settings.get("uniform", True):
        raise LmcError("the log's FSDP2 units differ in their MixedPrecisionPolicy: build the engine and pass it")
    dtypes = {
        key: None if settings.get(key) is None else getattr(torch, settings[key])
        for key in ("param_dtype", "reduce_dtype")
    }
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=settings.get("cast_forward_inputs", True))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for name in sorted(settings.get("units") or block_names(model), key=lambda unit: -unit.count(".")):
        if name:
            fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def block_names(model: nn.Module) -> list[str]:
    """Names of the model's repeated blocks: the members of its first list of modules."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList):
            return [f"{name}.{i}" for i in range(len(part))]
    return []
