"""World size 512 without 512 processes: torch's fake process group stands for the other ranks, whose values it does not make up.

Layouts, shapes, traffic and memory hold or do not hold without them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import live_peak
from pool import Pool

from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.planner.facts import Pass, model_facts
from lmc_dist.planner.memory import product_bytes
from lmc_dist.shards.gather import count_traffic
from lmc_dist.shards.layout import ParamSpec, ShardLayout, padded_numel, shard_bounds
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector

WORLD = 512
RULES: tuple[Any, ...] = ("zero3", "fsdp2")
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
SAMPLES, LENGTH = 2, 64


def join(rank: int, world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def llama(sizes: dict[str, int], vocabulary: int, key_value_heads: int = 8) -> Any:
    from transformers import LlamaConfig

    more = {"vocab_size": vocabulary, "num_key_value_heads": key_value_heads, "tie_word_embeddings": False}
    return LlamaConfig(**sizes, **more)


def layout_job() -> dict[str, Any]:
    """Layouts of a 70B model at 512 ranks, beside what `fully_shard` itself makes of one of its blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(LLAMA_70B, 128256))
        one = AutoModelForCausalLM.from_config(llama({**LLAMA_70B, "num_hidden_layers": 1}, 128256))
    found: dict[str, Any] = {"numel": sum(p.numel() for p in model.parameters())}
    params = [ParamSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    for rule in RULES:
        sizes = [ShardLayout(params, rank, WORLD, rule) for rank in (0, 1, 255, 510, 511)]
        covered = all(
            [shard_bounds(spec, r, WORLD, rule)[1] for r in range(WORLD - 1)]
            == [shard_bounds(spec, r, WORLD, rule)[0] for r in range(1, WORLD)]
            and shard_bounds(spec, WORLD - 1, WORLD, rule)[1] == spec.numel
            for spec in params
        )
        found[rule] = (covered, [layout.flat_numel for layout in sizes])
    for rank in (0, 255, 511):
        join(rank, WORLD)
        with torch.device("meta"):
            sharded = AutoModelForCausalLM.from_config(llama({**LLAMA_70B, "num_hidden_layers": 1}, 128256))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
        layout = ShardLayout.of_module(one, rule="fsdp2")
        mine = {name: p.to_local().numel() for name, p in sharded.named_parameters()}  # type: ignore[attr-defined]
        found.setdefault("same", []).append(mine == {slot.spec.name: slot.local_numel for slot in layout})
    return found


def product_job(world_size: int, rank: int) -> dict[str, tuple[float, float, float, float]]:
    """(elements gathered, reduced in whole models, peak bytes, predicted) of products on one rank of many."""
    join(rank, world_size)
    skeleton = build_skeleton(llama(SMALL, 4096))
    layout, facts = ShardLayout.of_module(skeleton), model_facts(skeleton)
    module = ShardedModule(skeleton, layout)
    theta, loss = ShardedVector.zeros(layout), TokenCrossEntropy()
    ids = torch.randint(2, 4096, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    micros = [MicroBatch({"input_ids": ids}, ids, torch.ones(SAMPLES) / 100)]
    total, found = layout.flat_numel * world_size, {}
    v = [theta * 0.5 for _ in range(2)]
    calls: dict[tuple[str, int], Any] = {
        ("gradient", 0): lambda: weighted_gradient(module, loss, theta, micros),
        ("GGN", 1): lambda: hvp_apply(v[0], HVPConfig("GGN"), module, loss, theta, micros),
        ("GGN", 2): lambda: hvp_apply(v, HVPConfig("GGN"), module, loss, theta, micros),
        ("exact", 1): lambda: hvp_apply(v[0], HVPConfig("exact"), module, loss, theta, micros),
    }
    for (mode, m), call in calls.items():
        with count_traffic() as counter:
            result = call()
        for vector in result if isinstance(result, list) else [result]:
            assert vector.layout == layout and vector.flat.shape == (layout.flat_numel,)
        del result
        beside = (1 + m) * layout.flat_numel * 4  # θ and v are looked at and alive
        predicted = product_bytes(facts, mode, m, [Pass(SAMPLES, LENGTH)], world_size) + beside
        found[f"{mode} {m}"] = (counter.gathered / total, counter.reduced / total, live_peak(call), predicted)
    return found


@pytest.fixture(scope="module")
def lonely() -> Any:
    """One process that joins no group by itself."""
    pool = Pool(1, join=False)
    yield pool
    pool.close()


def test_layouts_of_a_70b_model_are_those_of_the_engines(lonely: Pool) -> None:
    (found,) = lonely.run(layout_job)
    assert found["numel"] == 70_553_706_496 and found["same"] == [True] * 3
    for rule in RULES:
        covered, flat = found[rule]
        assert covered and len(set(flat)) == 1  # padding included, every rank holds as much
        assert 0 <= flat[0] * WORLD / found["numel"] - 1 < 0.01
    assert padded_numel(ParamSpec("norm", (8192,)), WORLD, "zero3") == 16


def test_products_hold_on_one_rank_of_512(lonely: Pool) -> None:
    """Shapes, traffic as on two ranks, peaks as the planner predicts them; the other ranks' values are whatever lies there."""
    for world_size, rank in ((8, 0), (WORLD, 0), (WORLD, WORLD - 1)):
        for name, (gathered, reduced, peak, predicted) in lonely.run(product_job, world_size, rank)[0].items():
            m = max(int(name[-1]), 1)
            assert reduced == pytest.approx(m, abs=1e-9), name
            assert gathered < {"gradient 0": 2, "GGN 1": 3, "GGN 2": 4, "exact 1": 4}[name] + 1e-9, name
            found = f"rank {rank} of {world_size}, {name}: {predicted / peak:.2f}"
            print(found)
            assert predicted == pytest.approx(peak, rel=0.2), found
