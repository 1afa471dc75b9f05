"""Live engines as shards: what is read is what trains, what is written is what runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import VOCAB, token_batch
from test_fd_engines import fsdp2_engine, reference_model, zero3_engine

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.vector import ShardedVector


class Odd(torch.nn.Module):
    """Parameters of every awkward shape: uneven rows, fewer rows than ranks, vectors, one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 7)
        self.narrow = torch.nn.Linear(7, 2)
        self.wide = torch.nn.Linear(2, 5)
        self.one = torch.nn.Parameter(torch.full((1,), 1.5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.wide(self.narrow(self.embed(input_ids))) * self.one


def odd_model() -> Odd:
    torch.manual_seed(2)
    return Odd()


adamw = partial(torch.optim.AdamW, lr=1e-2)


def build(engine_name: str, model: torch.nn.Module) -> tuple[Any, Any]:
    """(what is called and trained, its shards)."""
    if engine_name == "zero3":
        engine = zero3_engine(model, adamw)
        return engine, engine_shards(engine)
    if isinstance(model, Odd):
        from torch.distributed.fsdp import fully_shard

        module = fully_shard(model)
        return module, engine_shards(module, adamw(module.parameters()))
    module, optimizer = fsdp2_engine(model, adamw)
    return module, engine_shards(module, optimizer)


def train_step(engine: Any, shards: Any, seed: int) -> None:
    ids = token_batch(seed, 4)[0]
    output = engine(input_ids=ids)
    value = getattr(output, "logits", output).square().mean()
    if hasattr(engine, "step"):
        engine.backward(value)
        engine.step()
    else:
        value.backward()
        shards.optimizer.step()
        shards.optimizer.zero_grad()


def check_engine(engine_name: str, model_name: str) -> None:
    def fresh() -> torch.nn.Module:
        return odd_model() if model_name == "odd" else reference_model(model_name, torch.float32)

    original = {name: p.detach().clone() for name, p in fresh().named_parameters()}
    engine, shards = build(engine_name, fresh())
    layout = shards.layout
    assert set(layout.slots) == set(original)
    expected = ShardedVector.from_full(layout, original.__getitem__)
    assert checksum(shards.read()) == checksum(expected) == checksum(shards.working())
    assert not shards.has_state and shards.read_state() == ({}, {})

    with torch.no_grad():  # leaves whole parameters behind
        engine(input_ids=token_batch(1, 2)[0])
    changed = expected * 1.5
    shards.write(changed)
    assert shards.verify(changed) == checksum(changed) != checksum(expected)
    with pytest.raises(LmcError, match="do not hold the written weights"):
        shards.verify(expected)
    with torch.no_grad():
        for p in (model := fresh()).parameters():
            p.mul_(1.5)
        output, reference = engine(input_ids=token_batch(1, 2)[0]), model(input_ids=token_batch(1, 2)[0])
        difference = getattr(output, "logits", output) - getattr(reference, "logits", reference)
        assert difference.abs().max() < 1e-6

    for seed in range(2):
        train_step(engine, shards, seed)
    theta, (vectors, scalars) = shards.read(), shards.read_state()
    assert set(vectors) == {"exp_avg", "exp_avg_sq"} and scalars == {"step": 2.0} and shards.has_state
    assert all(vector.norm() > 0 for vector in vectors.values())
    train_step(engine, shards, 5)
    after = checksum(shards.read())
    if engine_name == "zero3":
        engine.destroy()

    engine, shards = build(engine_name, fresh())  # goes on to the bit from what was read
    shards.write(theta)
    shards.write_state(vectors, scalars)
    train_step(engine, shards, 5)
    assert checksum(shards.read()) == after
    shards.write_state({}, {})
    assert not shards.has_state
    if engine_name == "zero3":
        engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_engines_are_read_and_written(ranks: Any, world_size: int) -> None:
    for engine in ("fsdp2", "zero3"):
        for model in ("odd", "llama-tied", "gpt2-untied"):
            ranks(world_size).run(check_engine, engine, model)


def check_refusals() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(LmcError, match="torch optimizer is needed"):
        engine_shards(fully_shard(odd_model()))
    model = odd_model()
    early = adamw(model.parameters())
    with pytest.raises(LmcError, match="build it after the model was wrapped"):
        engine_shards(fully_shard(model), early)
    model = fully_shard(odd_model())
    with pytest.raises(LmcError, match=r"the optimizer has not, first one"):
        engine_shards(model, adamw(model.wide.parameters()))
    model = odd_model()
    fully_shard(model, ignored_params={model.one})
    with pytest.raises(LmcError, match="one is not sharded"):
        engine_shards(model, adamw(model.parameters()))
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))["shard"]
    model = fully_shard(odd_model(), mesh=mesh)
    with pytest.raises(LmcError, match=r"mesh of \(1,\) is not supported: shard over all 2 ranks"):
        engine_shards(model, adamw(model.parameters()))


def test_unsupported_fsdp2_models_are_refused(ranks: Any) -> None:
    ranks(2).run(check_refusals)
