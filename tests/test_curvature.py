"""Curvature products on sharded parameters against dense float64 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MODELS, KeepDouble, model_config, token_batch
from torch.func import functional_call, jacfwd
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector

SAMPLES, MICROS = 5, [(0, 2), (2, 3), (3, 5)]  # three passes of 2, 1 and 2 samples: uneven over any number of ranks


def reference_model(kind: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(model_config(kind), attn_implementation="sdpa")
    return model.double().eval()


def dense(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient, GGN matrix) of the whole batch in float64, from the Jacobian of the unsharded model."""
    model = reference_model(kind)
    layout = ShardLayout.of_module(model)
    ids, labels, weights = token_batch(3, SAMPLES)
    theta = ShardedVector.from_full(layout, model.get_parameter).flat

    def logits(flat: torch.Tensor) -> torch.Tensor:
        named = {s.spec.name: flat[s.global_offset : s.global_offset + s.spec.numel].view(s.spec.shape) for s in layout}
        return functional_call(model, named, (), {"input_ids": ids}).logits

    with KeepDouble(), sdpa_kernel(SDPBackend.MATH):
        J = jacfwd(logits)(theta)
        z = logits(theta)
    gradient = torch.zeros_like(theta)
    ggn = theta.new_zeros(len(theta), len(theta))
    for i, t in (labels[:, 1:] != -100).nonzero().tolist():
        p = z[i, t].softmax(-1)
        residual = p.clone()
        residual[labels[i, t + 1]] -= 1
        gradient += weights[i] * J[i, t].T @ residual
        ggn += weights[i] * J[i, t].T @ (torch.diag(p) - torch.outer(p, p)) @ J[i, t]
    return gradient, ggn


def sharded(kind: str) -> tuple[ShardedModule, ShardedVector, list[MicroBatch]]:
    """The same on this rank: module, θ and the rank's own passes."""
    model = reference_model(kind)
    skeleton = build_skeleton(model_config(kind)).double()
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.from_full(layout, model.get_parameter)
    ids, labels, weights = token_batch(3, SAMPLES)
    micros = [
        MicroBatch({"input_ids": ids[a:b]}, labels[a:b], weights[a:b])
        for i, (a, b) in enumerate(MICROS)
        if i % layout.world_size == layout.rank
    ]
    return ShardedModule(skeleton, layout), theta, micros


def random_full(layout: ShardLayout, seed: int) -> torch.Tensor:
    return torch.randn(layout.total_numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shard_of(layout: ShardLayout, full: torch.Tensor) -> ShardedVector:
    slots = layout.slots
    return ShardedVector.from_full(
        layout, lambda n: full[slots[n].global_offset : slots[n].global_offset + slots[n].spec.numel]
    )


def check_products(kind: str, gradient: torch.Tensor, ggn: torch.Tensor) -> dict[str, float]:
    """Relative errors of this rank's shards against the dense oracle."""
    module, theta, micros = sharded(kind)
    layout = module.layout
    u, v = (shard_of(layout, random_full(layout, seed)) for seed in (5, 6))
    v_full = random_full(layout, 6)
    loss = TokenCrossEntropy()
    errors: dict[str, float] = {}

    def compare(name: str, got: ShardedVector, expected: torch.Tensor) -> None:
        errors[name] = (got - shard_of(layout, expected)).norm() / float(expected.norm())

    with KeepDouble():
        compare("gradient", weighted_gradient(module, loss, theta, micros), gradient)
        for damping in (0.0, 0.3):
            got = hvp_apply(v, HVPConfig("GGN", damping), module, loss, theta, micros)
            compare(f"GGN, damping {damping}", got, ggn @ v_full + damping * v_full)
        compare("none", hvp_apply(v, HVPConfig("none", 0.3), module, loss, theta, micros), 0.3 * v_full)
        Cu = hvp_apply(u, HVPConfig("GGN"), module, loss, theta, micros)
        Cv = hvp_apply(v, HVPConfig("GGN"), module, loss, theta, micros)
        errors["symmetry"] = abs(u.dot(Cv) - v.dot(Cu)) / abs(u.dot(Cv))
        errors["negative curvature"] = max(0.0, -v.dot(Cv))
        errors["linearity"] = (
            hvp_apply(u * 2.0 + v, HVPConfig("GGN"), module, loss, theta, micros) - Cu * 2.0 - Cv
        ).norm() / Cv.norm()
    return errors


@pytest.mark.parametrize("kind", MODELS)
def test_products_equal_dense_matrices_on_1_to_4_ranks(ranks: Any, kind: str) -> None:
    gradient, ggn = dense(kind)
    for world_size in (1, 2, 3, 4):
        for errors in ranks(world_size).run(check_products, kind, gradient, ggn):
            assert max(errors.values()) <= 1e-12, (world_size, errors)


@pytest.mark.parametrize("mode", ["exact", "fd", "fisher", "diag", "low_rank", "secant"])
def test_planned_modes_say_so(mode: str) -> None:
    with pytest.raises(LmcError, match="not available yet"):
        HVPConfig(mode)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(LmcError, match="unknown hessian_mode 'ggn'"):
        HVPConfig("ggn")
    with pytest.raises(LmcError, match="damping"):
        HVPConfig("GGN", damping=-1.0)
    with pytest.raises(LmcError, match="damping"):
        HVPConfig("GGN", damping=float("nan"))
