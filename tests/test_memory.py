"""What a product holds and moves: live bytes by depth, and the collectives' payload."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import model_config, token_batch
from measure import live_peak

from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import summed_loss, weighted_gradient
from lmc_dist.shards.gather import count_traffic
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector

SAMPLES, LENGTH, HIDDEN = 4, 24, 12


def setup(layers: int, blocked: bool = True) -> tuple[ShardedModule, ShardedVector, list[MicroBatch]]:
    skeleton = build_skeleton(model_config("llama-tied", num_hidden_layers=layers))
    layout = ShardLayout.of_module(skeleton)
    module = ShardedModule(skeleton, layout, blocked=blocked)
    generator = torch.Generator().manual_seed(layout.rank)
    theta = ShardedVector.zeros(layout)
    for _, shard in theta.items():
        shard.copy_(torch.randn(shard.shape, generator=generator) * 0.1)
    ids, labels, weights = token_batch(layout.rank, SAMPLES, LENGTH)
    return module, theta, [MicroBatch({"input_ids": ids}, labels, weights)]


def peak(layers: int, mode: str, blocked: bool = True) -> int:
    module, theta, micros = setup(layers, blocked)
    v = theta * 0.5
    if mode == "gradient":
        return live_peak(lambda: weighted_gradient(module, TokenCrossEntropy(), theta, micros))
    return live_peak(lambda: hvp_apply(v, HVPConfig(mode), module, TokenCrossEntropy(), theta, micros))


@pytest.mark.parametrize("mode", ["gradient", "GGN", "exact"])
def test_memory_grows_with_depth_by_boundaries_only(mode: str) -> None:
    """From 8 to 16 layers: own shards of the vectors held and the blocks' inputs (with tangents, for the Hessian)."""
    block = 2 * 12 * 16 + 2 * 12 * 8 + 3 * 12 * 20 + 2 * 12  # parameters of a layer
    layout = ShardLayout.of_module(build_skeleton(model_config("llama-tied", num_hidden_layers=1)))
    assert sum(s.spec.numel for s in layout if ".layers.0." in s.spec.name) == block
    boundary = SAMPLES * LENGTH * HIDDEN * (2 if mode == "exact" else 1)
    vectors = 2 if mode == "gradient" else 3  # θ, v and the result
    growth = peak(16, mode) - peak(8, mode)
    assert growth <= 1.01 * 8 * 4 * (vectors * block + boundary)
    assert peak(16, mode) < 0.5 * peak(16, mode, blocked=False)


def check_evaluation() -> None:
    """Summed losses, block by block, against the loss of the gradient's own forward."""
    for layers in (1, 3):
        module, theta, micros = setup(layers)
        for micro in micros:
            micro.weights = torch.ones_like(micro.weights)
        total, count = summed_loss(module, TokenCrossEntropy(), theta, micros)
        whole, _, _ = setup(layers, blocked=False)
        other, _ = summed_loss(whole, TokenCrossEntropy(), theta, micros)
        value = TokenCrossEntropy().value(whole(theta.flat, **micros[0].inputs).logits, micros[0]).double()
        torch.distributed.all_reduce(value)
        assert total == pytest.approx(float(value), rel=1e-6) and total == pytest.approx(other, rel=1e-6)
        assert count == sum(int((token_batch(r, SAMPLES, LENGTH)[1][:, 1:] != -100).sum()) for r in range(2))
        empty = summed_loss(module, TokenCrossEntropy(), theta, micros if theta.layout.rank else [])
        assert 0 < empty[0] < total


def test_evaluation_runs_block_by_block(ranks: Any) -> None:
    ranks(2).run(check_evaluation)


def traffic_job() -> dict[str, tuple[float, float]]:
    """(gathered, reduced) of each product in units of the padded model."""
    module, theta, micros = setup(layers=3)
    total = theta.layout.flat_numel * theta.layout.world_size
    outer = module.segments.outer.numel * theta.layout.world_size / total
    found = {"outer": (outer, 0.0)}
    v = theta * 0.5

    def count(name: str, call: Any) -> None:
        with count_traffic() as counter:
            call()
        found[name] = (counter.gathered / total, counter.reduced / total)

    loss = TokenCrossEntropy()
    count("gradient", lambda: weighted_gradient(module, loss, theta, micros))
    count("no data here", lambda: weighted_gradient(module, loss, theta, micros if theta.layout.rank else []))
    count("gradient, kept", lambda: weighted_gradient(module, loss, theta, micros, keep=True))
    for m in (1, 3):
        count(f"GGN, {m}", lambda m=m: hvp_apply([v] * m, HVPConfig("GGN"), module, loss, theta, micros))
        count(f"exact, {m}", lambda m=m: hvp_apply([v] * m, HVPConfig("exact"), module, loss, theta, micros))
    keep = HVPConfig("GGN", keep_activations=True)
    count("GGN kept, 1", lambda: hvp_apply(v, keep, module, loss, theta, micros))
    count("fisher", lambda: hvp_apply(v, HVPConfig("fisher"), gradient=v))
    return found


def test_collectives_move_what_zero3_needs_and_no_more(ranks: Any) -> None:
    """p = the model, o = its outside (embedding, norm, head), gathered once; blocks are gathered again going back.

    A gradient under ZeRO-3 needs 2 gathers and 1 reduce-scatter of p. A product of m vectors gathers each tangent once
    and reduces m results; the Hessian also needs tangents of the parameters on the way back.
    """
    for found in ranks(2).run(traffic_job):
        o = found["outer"][0]
        expected = {
            "gradient": (2 - o, 1),
            "no data here": (2 - o, 1),
            "gradient, kept": (1, 1),
            "GGN, 1": (3 - o, 1),
            "GGN, 3": (5 - o, 3),
            "GGN kept, 1": (2, 1),
            "exact, 1": (4 - 2 * o, 1),
            "exact, 3": (8 - 4 * o, 3),
            "fisher": (0, 0),
        }
        for name, (gathered, reduced) in expected.items():
            assert found[name] == pytest.approx((gathered, reduced), abs=1e-9), name
