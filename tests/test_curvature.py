"""Curvature products on sharded parameters against dense float64 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MODELS, OTHER_MODELS, KeepDouble, model_config, token_batch
from torch.func import functional_call, jacfwd
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.products import weighted_gradient
from lmc_dist.errors import LmcError
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector

SEEDS = (5, 6, 7)  # of the vectors that are multiplied
SAMPLES, MICROS = 5, [(0, 2), (2, 3), (3, 5)]  # three passes of 2, 1 and 2 samples: uneven over any number of ranks


def reference_model(kind: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(model_config(kind), attn_implementation="sdpa")
    return model.double().eval()


def dense(kind: str) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """(gradient, GGN matrix, Hessian products by seed) of the whole batch in float64, from the unsharded model."""
    model = reference_model(kind)
    layout = ShardLayout.of_module(model)
    ids, labels, weights = token_batch(3, SAMPLES)
    theta = ShardedVector.from_full(layout, model.get_parameter).flat

    def logits(flat: torch.Tensor) -> torch.Tensor:
        named = {s.spec.name: flat[s.global_offset : s.global_offset + s.spec.numel].view(s.spec.shape) for s in layout}
        return functional_call(model, named, (), {"input_ids": ids}).logits

    def total(flat: torch.Tensor) -> torch.Tensor:
        shifted, targets = logits(flat)[:, :-1], labels[:, 1:]
        nll = torch.nn.functional.cross_entropy(shifted.transpose(1, 2), targets, reduction="none")
        return (nll.sum(-1) * weights).sum()

    with KeepDouble(), sdpa_kernel(SDPBackend.MATH):
        J = jacfwd(logits)(theta)
        z = logits(theta)
        leaf = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        hessian = {
            seed: torch.autograd.grad(slope, leaf, random_full(layout, seed), retain_graph=True)[0] for seed in SEEDS
        }
    gradient = torch.zeros_like(theta)
    ggn = theta.new_zeros(len(theta), len(theta))
    for i, t in (labels[:, 1:] != -100).nonzero().tolist():
        p = z[i, t].softmax(-1)
        residual = p.clone()
        residual[labels[i, t + 1]] -= 1
        gradient += weights[i] * J[i, t].T @ residual
        ggn += weights[i] * J[i, t].T @ (torch.diag(p) - torch.outer(p, p)) @ J[i, t]
    return gradient, ggn, hessian


def sharded(kind: str, blocked: bool) -> tuple[ShardedModule, ShardedVector, list[MicroBatch]]:
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
    return ShardedModule(skeleton, layout, blocked=blocked), theta, micros


def random_full(layout: ShardLayout, seed: int) -> torch.Tensor:
    return torch.randn(layout.total_numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shard_of(layout: ShardLayout, full: torch.Tensor) -> ShardedVector:
    slots = layout.slots
    return ShardedVector.from_full(
        layout, lambda n: full[slots[n].global_offset : slots[n].global_offset + slots[n].spec.numel]
    )


def check_products(
    kind: str, gradient: torch.Tensor, ggn: torch.Tensor, hessian: dict[int, torch.Tensor], blocked: bool
) -> dict[str, float]:
    """Relative errors of this rank's shards against the dense oracle."""
    module, theta, micros = sharded(kind, blocked)
    assert len(module.segments.blocks) == (2 if blocked else 0)
    layout, loss = module.layout, TokenCrossEntropy()
    fulls = [random_full(layout, seed) for seed in SEEDS]
    u, v, w = (shard_of(layout, full) for full in fulls)
    errors: dict[str, float] = {}

    def product(x: Any, mode: str = "GGN", damping: float = 0.0, **options: Any) -> Any:
        return hvp_apply(x, HVPConfig(mode, damping, **options), module, loss, theta, micros)

    def compare(name: str, got: ShardedVector, expected: torch.Tensor) -> None:
        errors[name] = (got - shard_of(layout, expected)).norm() / float(expected.norm())

    with KeepDouble():
        g = weighted_gradient(module, loss, theta, micros)
        compare("gradient", g, gradient)
        compare("GGN", product(v), ggn @ fulls[1])
        compare("GGN, damped", product(v, damping=0.3), ggn @ fulls[1] + 0.3 * fulls[1])
        compare("GGN, kept", product(v, keep_activations=True), ggn @ fulls[1])
        compare("exact", product(v, "exact"), hessian[SEEDS[1]])
        ggn_products = [ggn @ full for full in fulls]
        for mode, expected, options in (
            ("GGN", ggn_products, {}),
            ("GGN", ggn_products, {"keep_activations": True}),
            ("exact", [hessian[seed] for seed in SEEDS], {}),
        ):
            for i, got in enumerate(product([u, v, w], mode, 0.1, **options)):
                compare(f"{mode}, vector {i} of 3 {options}", got, expected[i] + 0.1 * fulls[i])
        compare("none", product(v, "none", 0.3), 0.3 * fulls[1])
        fisher = hvp_apply([u, v], HVPConfig("fisher", 0.2), gradient=g)
        compare("fisher", fisher[1], gradient * (gradient @ fulls[1]) + 0.2 * fulls[1])
        compare("fd, 1e-6 of its tolerance", product(v, "fd"), hessian[SEEDS[1]])
        errors["fd, 1e-6 of its tolerance"] *= 1e-6
        for mode in ("GGN", "exact"):
            Cu, Cv = product(u, mode), product(v, mode)
            errors[f"symmetry, {mode}"] = abs(u.dot(Cv) - v.dot(Cu)) / (u.norm() * Cv.norm())
            errors[f"linearity, {mode}"] = (product(u * 2.0 + v, mode) - Cu * 2.0 - Cv).norm() / Cv.norm()
            if mode == "GGN":
                errors["negative curvature"] = max(0.0, -v.dot(Cv))
    return errors


@pytest.mark.parametrize("kind", MODELS + OTHER_MODELS)
def test_products_equal_dense_matrices_on_1_to_4_ranks(ranks: Any, kind: str) -> None:
    oracle = dense(kind)
    for world_size in (1, 2, 3, 4) if kind in MODELS else (2,):
        for blocked in (True, False) if world_size == 2 else (True,):
            for errors in ranks(world_size).run(check_products, kind, *oracle, blocked):
                assert max(errors.values()) <= 1e-12, (world_size, blocked, errors)


def check_dropout() -> dict[str, float]:
    """Two passes on this rank with dropout: every way to compute a product must draw the same masks."""
    config = model_config("gpt2-tied", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    ids, labels, weights = token_batch(3, SAMPLES)
    results: dict[str, Any] = {}
    for blocked in (False, True):
        skeleton = build_skeleton(config).double()
        module = ShardedModule(skeleton, ShardLayout.of_module(skeleton), blocked=blocked)
        full = random_full(module.layout, 8) * 0.3
        theta, vectors = (
            shard_of(module.layout, full),
            [shard_of(module.layout, random_full(module.layout, s)) for s in SEEDS],
        )
        micros = [
            MicroBatch({"input_ids": ids[a:b]}, labels[a:b], weights[a:b], torch.Generator().manual_seed(a).get_state())
            for a, b in MICROS[:2]
        ]
        before = torch.get_rng_state()
        with KeepDouble():
            loss = TokenCrossEntropy()
            results[f"gradient {blocked}"] = [weighted_gradient(module, loss, theta, micros)]
            for mode, keep in (("GGN", False), ("GGN", True), ("exact", False)):
                hvp = HVPConfig(mode, keep_activations=keep)
                results[f"{mode} {keep} {blocked}"] = hvp_apply(vectors, hvp, module, loss, theta, micros)
                results[f"{mode} {keep} {blocked}, one"] = [hvp_apply(vectors[0], hvp, module, loss, theta, micros)]
        assert torch.equal(before, torch.get_rng_state())  # the program's own random numbers are left alone
    errors = {}
    for name, got in results.items():
        kind = name.split()[0]
        reference = results["gradient False"] if kind == "gradient" else results[f"{kind} False False"]
        errors[name] = max((a - b).norm() / b.norm() for a, b in zip(got, reference, strict=False))
    return errors


def test_products_draw_the_same_dropout_however_they_are_computed(ranks: Any) -> None:
    for errors in ranks(2).run(check_dropout):
        assert max(errors.values()) <= 1e-12, errors


FROZEN = {  # what is not trained, by name
    "embeddings and a block": lambda name: "embed_tokens" in name or ".layers.0." in name,
    "all but adapters": lambda name: "q_proj" not in name and "up_proj" not in name,
}


def check_frozen(kind: str, oracle: tuple[Any, ...]) -> dict[str, float]:
    """Products with frozen parameters against rows and columns of the whole model's dense matrices."""
    gradient, ggn, _ = oracle
    errors = {}
    for case, is_frozen in FROZEN.items():
        model = reference_model(kind)
        whole = ShardLayout.of_module(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen(name))
        skeleton = skeleton_of(model)
        layout = ShardLayout.of_module(skeleton)
        assert all(p.is_meta for p in skeleton.parameters())
        theta = ShardedVector.from_full(layout, model.get_parameter)
        spans = [whole.slots[s.spec.name] for s in layout]
        trained = torch.cat([torch.arange(s.global_offset, s.global_offset + s.spec.numel) for s in spans])
        ids, labels, weights = token_batch(3, SAMPLES)
        micros = [
            MicroBatch({"input_ids": ids[a:b]}, labels[a:b], weights[a:b])
            for i, (a, b) in enumerate(MICROS)
            if i % layout.world_size == layout.rank
        ]
        fulls = [random_full(layout, seed) for seed in SEEDS[:2]]
        vectors = [shard_of(layout, full) for full in fulls]
        loss = TokenCrossEntropy()
        # the Hessian has no dense matrix here: its oracle is the whole model's product on vectors padded with zeros
        padded = [torch.zeros(whole.total_numel, dtype=torch.float64).index_put_((trained,), full) for full in fulls]
        everything = sharded(kind, True)
        with KeepDouble():
            exact = hvp_apply(
                [shard_of(whole, x) for x in padded], HVPConfig("exact"), everything[0], loss, *everything[1:]
            )
            for blocked in (True, False):
                module = ShardedModule(skeleton, layout, blocked=blocked, frozen=read_frozen(model, layout))
                assert len(module.segments.blocks) == (2 if blocked else 0)
                g = weighted_gradient(module, loss, theta, micros)
                found = {"gradient": ([g], [gradient[trained]])}
                expected = [ggn[trained][:, trained] @ full for full in fulls]
                for keep in (False, True):
                    for mode in ("GGN", "exact"):
                        hvp = HVPConfig(mode, keep_activations=keep)
                        found[f"{mode} {keep}"] = (hvp_apply(vectors, hvp, module, loss, theta, micros), expected)
                for name, (got, oracles) in found.items():
                    for k, x in enumerate(got):
                        want = shard_of(layout, oracles[k])
                        if name.startswith("exact"):
                            want = ShardedVector.from_shards(layout, {n: exact[k][n] for n in layout.slots})
                        errors[f"{case} {blocked} {name} {k}"] = (x - want).norm() / want.norm()
    return errors


def test_frozen_parameters_are_constants(ranks: Any) -> None:
    oracle = dense("llama-untied")
    for world_size in (1, 3):
        for errors in ranks(world_size).run(check_frozen, "llama-untied", oracle):
            assert max(errors.values()) <= 1e-12, (world_size, errors)


def test_frozen_parameters_need_values() -> None:
    skeleton = build_skeleton(model_config("llama-untied"))
    skeleton.get_parameter("lm_head.weight").requires_grad_(False)
    with pytest.raises(LmcError, match="frozen parameters need values"):
        ShardedModule(skeleton, ShardLayout.of_module(skeleton))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(LmcError, match="unknown hessian_mode 'ggn'"):
        HVPConfig("ggn")
    with pytest.raises(LmcError, match="damping"):
        HVPConfig("GGN", damping=-1.0)
    with pytest.raises(LmcError, match="damping"):
        HVPConfig("GGN", damping=float("nan"))
