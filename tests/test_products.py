"""Properties of curvature products: linear algebra on random batches, micro-batches, dtypes, and curvlinops as a peer."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import VOCAB, KeepDouble, model_config, token_batch
from hvp import Logits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curvature import random_full, shard_of

from lmc_dist.curvature import HVPConfig, MicroBatch, SquaredError, TokenCrossEntropy, hvp_apply
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector

PRODUCTS = {
    "GGN": HVPConfig("GGN"),
    "GGN, kept": HVPConfig("GGN", keep_activations=True),
    "exact": HVPConfig("exact"),
    "exact, kept": HVPConfig("exact", keep_activations=True),
}


def module_of(kind: str, dtype: torch.dtype = torch.float64, blocked: bool = True, **changes: Any) -> ShardedModule:
    skeleton = build_skeleton(model_config(kind, **changes)).to(dtype)
    return ShardedModule(skeleton, ShardLayout.of_module(skeleton), blocked=blocked)


def vector_of(layout: ShardLayout, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> ShardedVector:
    return (shard_of(layout, random_full(layout, seed)) * scale).to(dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["llama-tied", "gpt2-untied", "qwen3-tied"]),
    name=st.sampled_from(list(PRODUCTS)),
    samples=st.integers(1, 4),
    length=st.integers(2, 8),
    masked=st.floats(0, 1),
    padded=st.booleans(),
    damping=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_products_are_symmetric_linear_and_the_ggn_positive(
    kind: str, name: str, samples: int, length: int, masked: float, padded: bool, damping: float, seed: int
) -> None:
    module = module_of(kind)
    theta, u, v = (vector_of(module.layout, seed + i, scale) for i, scale in enumerate((0.3, 1.0, 1.0)))
    ids, labels, weights = token_batch(seed, samples, length)
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < masked] = -100
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -1] = 0
    base = PRODUCTS[name]
    config = HVPConfig(base.mode, damping, base.keep_activations)

    def product(x: Any) -> Any:
        with KeepDouble():
            return hvp_apply(x, config, module, TokenCrossEntropy(), theta, [MicroBatch(inputs, labels, weights)])

    Cu, Cv, together = product([u, v, u * 2.0 + v * -0.7])
    scale = max(Cu.norm() * v.norm(), Cv.norm() * u.norm(), 1e-300)
    assert abs(u.dot(Cv) - v.dot(Cu)) <= 1e-12 * scale
    assert (together - Cu * 2.0 - Cv * -0.7).norm() <= 1e-12 * (Cu.norm() + Cv.norm() + 1e-300)
    assert (product(u) - Cu).norm() <= 1e-12 * (Cu.norm() + 1e-300)  # one vector alone, or among others
    if base.mode == "GGN":
        assert u.dot(Cu) >= -1e-13 * scale


def check_micro_batches(name: str) -> None:
    """One batch in 1, 2 and 5 passes on this rank, in float64 and float32; twice, to the bit."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        module = module_of("llama-tied", dtype)
        theta = vector_of(module.layout, 1, 0.3, dtype)
        vectors = [vector_of(module.layout, seed, 1.0, dtype) for seed in (2, 3)]
        ids, labels, weights = token_batch(module.layout.rank, 5)
        weights = weights.to(dtype)
        results = {}
        for cuts in ([0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]):
            micros = [MicroBatch({"input_ids": ids[a:b]}, labels[a:b], weights[a:b]) for a, b in pairwise(cuts)]
            with KeepDouble():
                results[len(micros)], again = (
                    hvp_apply(vectors, PRODUCTS[name], module, TokenCrossEntropy(), theta, micros) for _ in range(2)
                )
            for first, second in zip(results[len(micros)], again, strict=True):
                assert torch.equal(first.flat, second.flat)
        for several in (2, 5):
            for got, expected in zip(results[several], results[1], strict=True):
                assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", PRODUCTS)
def test_micro_batches_only_change_the_order_of_sums(ranks: Any, name: str) -> None:
    ranks(2).run(check_micro_batches, name)


DTYPE_ERROR = 2e-6  # docs/method.md §4 states it


@pytest.mark.parametrize("kind", ["llama-tied", "gemma-tied", "gpt2-tied", "qwen3-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_models_give_float32_products(kind: str, dtype: torch.dtype) -> None:
    """A config that says bfloat16 or float16 changes no arithmetic: products are float32, near float64's."""
    skeleton = build_skeleton(model_config(kind, dtype=dtype))
    module = ShardedModule(skeleton, ShardLayout.of_module(skeleton))
    exact = ShardedModule(build_skeleton(model_config(kind, dtype=dtype)).double(), module.layout)  # the same buffers
    theta = vector_of(module.layout, 1, 0.3, torch.float32).to(dtype).to(torch.float32)  # weights as such a model has
    v = vector_of(module.layout, 2, 1.0, torch.float32)
    ids, labels, weights = token_batch(3, 4)
    for name, config in PRODUCTS.items():
        micros = [MicroBatch({"input_ids": ids}, labels, weights)]
        got = hvp_apply(v, config, module, TokenCrossEntropy(), theta, micros)
        with KeepDouble():
            doubles = theta.to(torch.float64), v.to(torch.float64)
            expected = hvp_apply(doubles[1], config, exact, TokenCrossEntropy(), doubles[0], micros)
        assert got.flat.dtype == torch.float32
        assert (got.to(torch.float64) - expected).norm() <= DTYPE_ERROR * expected.norm(), (name, dtype)


class Plain(torch.nn.Module):
    """A model without repeated blocks, above the size at which that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(1000, 1001, bias=False, device="meta")
        self.outer = torch.nn.Linear(1001, 3, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).tanh())


def test_a_model_without_blocks_runs_whole_and_says_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lmc_dist"):
        module = ShardedModule(Plain(), ShardLayout.of_module(Plain()))
    assert "no repeated blocks found in Plain: products gather the whole model (4 MB a rank) at once" in caplog.text
    theta, v = (vector_of(module.layout, seed, 0.01, torch.float32) for seed in (1, 2))
    micros = [MicroBatch({"x": torch.randn(2, 1000)}, torch.randn(2, 3), torch.ones(2))]
    product = hvp_apply(v, HVPConfig("GGN"), module, SquaredError(), theta, micros)
    assert product.dot(v) > 0


# curvlinops takes the Hessian forward over reverse, by torch's own rules: silu's backward has none, and on GPT-2
# they are off by 0.3 % in float64 (double backward agrees with ours to 3e-16).
PEER_CASES = {
    "llama-untied": ({}, ["GGN"]),
    "gpt2-tied": ({}, ["GGN"]),
    "llama-tied": ({"hidden_act": "gelu"}, ["GGN", "exact"]),
}


@pytest.mark.parametrize("kind", PEER_CASES)
def test_products_equal_those_of_curvlinops(kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed: make peers")
    import transformers

    changes, modes = PEER_CASES[kind]
    torch.manual_seed(1)
    config = model_config(kind, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    module = module_of(kind, torch.float32, **changes)
    layout = module.layout
    theta = ShardedVector.from_full(layout, model.get_parameter)
    ids = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].flatten()
    weights = torch.full((4,), 1 / targets.numel())
    parameters = [model.get_parameter(slot.spec.name) for slot in layout]
    vectors = [vector_of(layout, seed, 1.0, torch.float32) for seed in (5, 6, 7)]
    lists = [torch.stack([v[slot.spec.name].view(slot.spec.shape) for v in vectors], -1) for slot in layout]
    operators = {"GGN": curvlinops.GGNLinearOperator, "exact": curvlinops.HessianLinearOperator}
    for mode in modes:
        peer = operators[mode](
            Logits(model), torch.nn.CrossEntropyLoss(), parameters, [(ids, targets)], check_deterministic=False
        )
        expected = torch.cat([part.detach().reshape(-1, len(vectors)) for part in peer @ lists])
        micros = [MicroBatch({"input_ids": ids}, ids, weights)]
        got = hvp_apply(vectors, HVPConfig(mode), module, TokenCrossEntropy(), theta, micros)
        for i, image in enumerate(got):
            error = (image.flat - expected[:, i]).norm() / expected[:, i].norm()
            assert error <= 1e-5, (mode, float(error))
