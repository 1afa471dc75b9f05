"""Layout, vectors, checksums and the differentiable gather on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vjp, vmap

from lmc_dist.errors import LmcError
from lmc_dist.export import export_model
from lmc_dist.shards.checksum import checksum, format_checksum, local_checksum
from lmc_dist.shards.gather import all_gather, reduce_scatter, unpack
from lmc_dist.shards.layout import ParamSpec, ShardLayout, group_rank
from lmc_dist.shards.vector import ShardedVector, dots

SHAPES = {"wide": (3, 7), "bias": (5,), "scalar": (), "one": (1,), "tall": (6, 2)}
SPECS = [ParamSpec(name, shape) for name, shape in SHAPES.items()]


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=5),
    world_size=st.integers(1, 9),
    rule=st.sampled_from(["zero3", "fsdp2"]),
)
def test_layout_covers_every_element_once(shapes: list[list[int]], world_size: int, rule: Any) -> None:
    specs = [ParamSpec(f"p{i}", tuple(shape)) for i, shape in enumerate(shapes)]
    layouts = [ShardLayout(specs, rank, world_size, rule) for rank in range(world_size)]
    for spec in specs:
        slots = [layout.slots[spec.name] for layout in layouts]
        covered = [i for slot in slots for i in range(slot.start, slot.end)]
        assert covered == list(range(spec.numel))
        assert all(slot.local_numel <= slot.padded == slots[0].padded for slot in slots)
    assert all(layout.total_numel == sum(spec.numel for spec in specs) for layout in layouts)


def full_values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def check_vectors() -> list[Any]:
    rank, world_size = group_rank(None)
    layout = ShardLayout(SPECS, rank, world_size)
    a, b = (ShardedVector.from_full(layout, full_values(seed).__getitem__) for seed in (1, 2))
    whole = [torch.cat([t.reshape(-1) for t in full_values(seed).values()]) for seed in (1, 2)]
    torch.testing.assert_close(a.dot(b), float(whole[0] @ whole[1]), rtol=1e-13, atol=0)
    torch.testing.assert_close((a * 2.0 - b).norm(), float((2 * whole[0] - whole[1]).norm()), rtol=1e-13, atol=0)
    assert dots([(a, b), (a, a)]) == [a.dot(b), a.dot(a)]
    padding = a.flat.numel() - sum(slot.local_numel for slot in layout)
    assert int((a.flat == 0).sum()) == padding
    gathered = unpack(all_gather(a.flat), layout)
    for name, value in full_values(1).items():
        assert torch.equal(gathered[name], value)
    return [checksum(a), checksum(a.to(torch.float32)), checksum(b)]


def test_vectors_and_checksums_do_not_depend_on_the_world_size(ranks: Any) -> None:
    expected = ranks(1).run(check_vectors)[0]
    assert len(set(expected)) == 3
    for world_size in (2, 3, 4):
        assert ranks(world_size).run(check_vectors) == [expected] * world_size


def test_checksum_sees_every_flipped_bit_and_swapped_elements() -> None:
    layout = ShardLayout(SPECS)
    vector = ShardedVector.from_full(layout, full_values(1).__getitem__).to(torch.float32)
    original = format_checksum(local_checksum(vector))
    for element in range(vector.flat.numel()):
        for bit in (0, 13, 31):
            damaged = vector.clone()
            damaged.flat.view(torch.int32)[element] ^= torch.tensor(1 << bit).to(torch.int32)
            assert format_checksum(local_checksum(damaged)) != original
    swapped = vector.clone()
    swapped.flat[[3, 4]] = swapped.flat[[4, 3]]
    assert format_checksum(local_checksum(swapped)) != original


def check_gather_rules() -> None:
    """Every derivative of f(gather(x)) against the same function of the whole tensor."""
    rank, world_size = group_rank(None)
    generator = torch.Generator().manual_seed(0)
    X, V, W = (torch.randn(world_size, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    x, v, w = X[rank].clone(), V[rank].clone(), W[rank].clone()

    def whole(full: torch.Tensor) -> torch.Tensor:  # nonlinear and mixing ranks
        return (full.sin() * full.roll(1, 0) ** 2).sum()

    def own(shard: torch.Tensor) -> torch.Tensor:  # each rank holds 1/N of the loss, so their sum is `whole`
        return whole(all_gather(shard)) / world_size

    def close(got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got, expected[rank], rtol=1e-13, atol=1e-13)

    G, HV = grad(whole)(X), jvp(grad(whole), (X,), (V,))[1]
    close(grad(own)(x), G)
    close(jvp(grad(own), (x,), (v,))[1], HV)  # forward over reverse
    close(vjp(grad(own), x)[1](v)[0], HV)  # reverse over reverse
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(own(leaf), leaf, create_graph=True)
    close(torch.autograd.grad(first, leaf, v)[0], HV)  # plain autograd, twice
    tangent = jvp(lambda t: all_gather(t), (x,), (v,))[1]
    torch.testing.assert_close(tangent, V)
    batched = vmap(lambda t: jvp(grad(own), (x,), (t,))[1])(torch.stack([v, w]))
    close(batched[0], HV)
    close(batched[1], jvp(grad(whole), (X,), (W,))[1])
    cotangent = torch.randn(world_size, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(reduce_scatter(cotangent), cotangent[rank] * world_size)
    batch = torch.stack([cotangent, 2 * cotangent], dim=1)  # a batch dimension in the middle
    scattered = vmap(reduce_scatter, in_dims=1)(batch)
    torch.testing.assert_close(scattered[1], 2 * cotangent[rank] * world_size)
    # ⟨gather x, Y⟩ summed over ranks equals ⟨x, scatter Y⟩ summed over ranks: the maps are transposes.
    sums = torch.stack([(all_gather(x) * cotangent).sum(), (x * reduce_scatter(cotangent)).sum()])
    dist.all_reduce(sums)
    torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gather_has_backward_jvp_and_vmap_in_any_order(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(check_gather_rules)


def test_skeleton_holds_no_parameter_values() -> None:
    from cases import MODELS, model_config

    from lmc_dist.shards.module import ShardedModule, build_skeleton

    for kind in MODELS:
        skeleton = build_skeleton(model_config(kind))
        assert all(p.is_meta for p in skeleton.parameters())
        assert not any(b.is_meta for b in skeleton.buffers())
    with pytest.raises(LmcError, match="trainable parameters are not those of the layout"):
        ShardedModule(skeleton, ShardLayout(SPECS))


@pytest.mark.parametrize("kind", ["neox", "mixtral"])
def test_checkpoints_of_models_that_transformers_renames(tmp_path: Path, kind: str) -> None:
    """They have the module's names, load to the same weights, and are rewritten as docs/limits.md says."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

    shape = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = GPTNeoXConfig(**shape) if kind == "neox" else MixtralConfig(**shape, **experts)
    model = AutoModelForCausalLM.from_config(config)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    theta = ShardedVector.from_full(ShardLayout.of_module(model), weights.__getitem__)
    export_model(tmp_path / "ours", theta, {name: torch.float32 for name in weights}, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())
    again = AutoModelForCausalLM.from_config(loaded.config)
    again.load_state_dict(loaded.state_dict())
    again.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "published")

    def names(folder: str) -> set[str]:
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            return set(file.keys())

    assert names("ours") == set(weights) and names("again") == names("published") != names("ours")
