"""Eigenpairs, low-rank curvature and curvature kept beside a log, against dense float64 matrices and recursions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KeepDouble
from test_curvature import dense, random_full, shard_of, sharded
from test_sweep import REQUESTS, Regression, linear_module, train

from lmc_dist.curvature import HVPConfig, SquaredError, TokenCrossEntropy, hvp_apply, low_rank_basis
from lmc_dist.curvature.diagonal import exact_diagonal
from lmc_dist.curvature.ggn import Product, make_ggn_product
from lmc_dist.curvature.low_rank import LowRank, low_rank
from lmc_dist.curvature.spectrum import estimate_trace, lanczos
from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ParamSpec, ShardLayout, group_rank
from lmc_dist.shards.vector import ShardedVector, gram
from lmc_dist.trajectory.counterfactual import Counterfactual, edit_step
from lmc_dist.trajectory.kept import KeptCurvature, KeptWindow, kept_names, load_curvature, save_curvature
from lmc_dist.unlearn.correction import compute_correction
from lmc_dist.unlearn.log_curvature import average_curvature, step_product
from lmc_dist.unlearn.source import micro_batches

SHAPES = {"a": (7, 5), "b": (3,), "c": (1,), "d": (4, 4)}  # 55 parameters, uneven over any number of ranks
EIGENVALUES = {
    "spread": torch.logspace(0, -6, 55, dtype=torch.float64),
    "clusters": torch.tensor([3.0] * 4 + [2.0] * 12 + [0.1] * 10 + [0.0] * 29, dtype=torch.float64),
    "indefinite": torch.linspace(-4, 2.5, 55, dtype=torch.float64),
    "rank three": torch.tensor([5.0, 4.0, 3.0] + [0.0] * 52, dtype=torch.float64),
    "zero": torch.zeros(55, dtype=torch.float64),
}


def small_layout() -> ShardLayout:
    rank, world_size = group_rank(None)
    return ShardLayout([ParamSpec(name, shape) for name, shape in SHAPES.items()], rank, world_size)


def whole(vector: ShardedVector) -> torch.Tensor:
    """All elements, on every rank: shards lie apart in a zero vector, which is summed."""
    full = torch.zeros(vector.layout.total_numel, dtype=vector.flat.dtype)
    for slot in vector.layout:
        full[slot.global_offset + slot.start : slot.global_offset + slot.end] = vector[slot.spec.name]
    if vector.layout.world_size > 1:
        torch.distributed.all_reduce(full)
    return full


def dense_product(matrix: torch.Tensor, layout: ShardLayout) -> Product:
    return lambda vectors: [shard_of(layout, matrix @ whole(v)) for v in vectors]


def symmetric(name: str) -> torch.Tensor:
    turn, _ = torch.linalg.qr(torch.randn(55, 55, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return turn @ torch.diag(EIGENVALUES[name]) @ turn.T


def check_lanczos(name: str) -> None:
    layout, matrix = small_layout(), symmetric(name)
    product, like = dense_product(matrix, layout), ShardedVector.zeros(layout, torch.float64)
    expected = EIGENVALUES[name][EIGENVALUES[name].abs().argsort(descending=True)]
    scale = max(float(expected.abs()[0]), 1.0)
    for block in (1, 4, 8):
        found = lanczos(product, like, 55, 55, block=block)  # the whole space: everything there is
        values, count = torch.tensor(found.values, dtype=torch.float64), len(found.values)
        if block == 8:  # a block finds clusters up to its size, a single vector one copy of each eigenvalue
            k = min(count, 8)
            torch.testing.assert_close(values[:k], expected[:k], rtol=0, atol=1e-10 * scale)
        unit = gram(found.basis, found.basis, layout)
        assert (unit - torch.eye(count, dtype=torch.float64)).abs().max() <= 1e-12
        for value, residual, q in zip(found.values, found.residuals, found.vectors, strict=True):
            image = product([q])[0] - q * value
            assert image.norm() <= residual + 1e-10 * scale  # the stated residual is the true one
            assert (expected - value).abs().min() <= residual + 1e-10 * scale
    part = lanczos(product, like, 3, 16)
    assert len(part.values) <= 3 and part.products <= 16
    for value, residual, q in zip(part.values, part.residuals, part.vectors, strict=True):
        true = (product([q])[0] - q * value).norm()
        assert abs(true - residual) <= 1e-9 * scale
    trace = estimate_trace(product, like, probes=200)
    assert abs(trace.value - float(expected.sum())) <= 4 * trace.standard_error + 1e-10 * scale
    full = low_rank(product, like, 55)
    v = shard_of(layout, random_full(layout, 4))
    if name != "clusters":  # 12 equal eigenvalues in blocks of 8: the Krylov space ends before the whole space
        assert (full([v])[0] - product([v])[0]).norm() <= 1e-9 * scale * v.norm()
        assert full.missed <= 1e-8


@pytest.mark.parametrize("name", EIGENVALUES)
def test_lanczos_against_dense_symmetric_matrices(ranks: Any, name: str) -> None:
    for world_size in (1, 3):
        ranks(world_size).run(check_lanczos, name)


def check_propagation() -> None:
    """Closed form = step by step, with damping and weight decay."""
    layout = small_layout()
    part = low_rank(dense_product(symmetric("spread"), layout), ShardedVector.zeros(layout, torch.float64), 6)
    v, lrs, damping, decay = shard_of(layout, random_full(layout, 5)), [0.3, 0.1, 0.9, 0.05], 0.02, 0.1
    stepped = v
    for lr in lrs:
        stepped = stepped - (part([stepped])[0] + stepped * (damping + decay)) * lr
    assert (part.propagate(v, lrs, damping, decay) - stepped).norm() <= 1e-13 * v.norm()
    assert (part.propagate(v, [], damping, decay) - v).norm() <= 1e-15 * v.norm()


def test_a_span_of_steps_is_closed_form(ranks: Any) -> None:
    ranks(3).run(check_propagation)


def check_model_modes(ggn: torch.Tensor, hessian: dict[int, torch.Tensor]) -> dict[str, float]:
    """`low_rank` of two bases of a Llama."""
    module, theta, micros = sharded("llama-tied", blocked=True)
    loss, layout = TokenCrossEntropy(), module.layout
    fulls = {seed: random_full(layout, seed) for seed in hessian}
    errors: dict[str, float] = {}
    with KeepDouble():
        values = torch.linalg.eigvalsh(ggn).flip(0)
        config = HVPConfig("low_rank", damping=0.1, rank=24)
        basis = low_rank_basis(config, module, loss, theta, micros)
        gap = float(values[0] - values[1])  # a Ritz value is off by at most residual² / gap (Parlett 1998, §11.7)
        assert abs(basis.values[0] - float(values[0])) <= basis.residuals[0] ** 2 / gap + 1e-12
        for value, residual in zip(basis.values, basis.residuals, strict=True):
            assert float((values - value).abs().min()) <= residual + 1e-12
        v = shard_of(layout, fulls[5])
        given = hvp_apply(v, config, module, loss, theta, micros, basis=basis)
        own = hvp_apply(v, config, module, loss, theta, micros)
        errors["a basis given or found"] = (given - own).norm() / own.norm()
        coefficients = gram(basis.basis, v.flat[None], layout)[:, 0] * torch.tensor(basis.values, dtype=torch.float64)
        by_hand = v.like(coefficients.to(v.flat) @ basis.basis) + v * 0.1
        errors["the product"] = (given - by_hand).norm() / by_hand.norm()
        # a Lanczos basis of a Hessian: its Ritz pairs satisfy the stated residuals
        indefinite = low_rank_basis(HVPConfig("low_rank", rank=4, base="exact"), module, loss, theta, micros)
        q = theta.like(indefinite.basis[0].clone())
        image = hvp_apply(q, HVPConfig("exact"), module, loss, theta, micros)
        true = (image - q * indefinite.values[0]).norm()
        errors["residual of the Hessian's first pair"] = abs(true - indefinite.residuals[0]) / abs(indefinite.values[0])
    return errors


def test_low_rank_of_a_language_model(ranks: Any) -> None:
    _, ggn, hessian = dense("llama-tied")
    for world_size in (1, 3):
        for errors in ranks(world_size).run(check_model_modes, ggn, hessian):
            assert max(errors.values()) <= 1e-10, errors


def check_exact_diagonal() -> None:
    layout, matrix = small_layout(), symmetric("indefinite")
    found = exact_diagonal(dense_product(matrix, layout), ShardedVector.zeros(layout, torch.float64))
    assert (whole(found.diagonal) - matrix.diagonal()).norm() <= 1e-14 * matrix.norm()
    module = linear_module()
    log, _ = train(module, None)
    theta, v = log.theta(2), log.update(5)
    micros = micro_batches(
        edit_step(log.record(2), None, "global_token_mean", Regression().num_targets), Regression(), module, "kept"
    )
    product = make_ggn_product(module, SquaredError(), theta, micros)
    ggn = torch.stack([whole(c) for c in product([shard_of(log.layout, e) for e in torch.eye(15).double()])])
    applied = hvp_apply(v, HVPConfig("diag", damping=0.5, probes=0), module, SquaredError(), theta, micros)
    assert (whole(applied) - (ggn.diagonal() + 0.5) * whole(v)).norm() <= 1e-12 * applied.norm()


def test_the_exact_diagonal(ranks: Any) -> None:
    for world_size in (1, 2, 4):
        ranks(world_size).run(check_exact_diagonal)


def check_sweep_modes() -> dict[str, float]:
    """Corrections on a quadratic of 15 parameters: with r = p, `low_rank` is the GGN."""
    module = linear_module()
    log, trained = train(module, None)
    errors: dict[str, float] = {}
    for name, request in REQUESTS.items():
        _, retrained = train(module, request)

        def correct(K: int | None = None, request: Counterfactual = request, **options: Any) -> ShardedVector:
            return compute_correction(
                log, module, Regression(), request, HVPConfig(**options), K, loss=SquaredError()
            ).v

        size = (trained - retrained).norm()
        full = correct(mode="low_rank", rank=15, refresh=1)
        errors[name] = (trained + full - retrained).norm() / size
        errors[f"{name}, K=3"] = (
            correct(K=3, mode="low_rank", rank=15, refresh=1) - correct(K=3, mode="GGN")
        ).norm() / size
    return errors


def test_low_rank_of_full_rank_is_the_ggn(ranks: Any) -> None:
    for world_size in (1, 2, 4):
        for errors in ranks(world_size).run(check_sweep_modes):
            assert max(errors.values()) <= 1e-10, errors


def check_kept(log_dir: str) -> None:
    """Kept curvature against the dense recursion with the same matrices; groups with and without a common decay."""
    module = linear_module()
    batches, loss = Regression(), SquaredError()
    log, _ = train(module, None)
    layout = log.layout
    kept = average_curvature(log, module, batches, "c", rank=15, windows=3, steps=2, loss=loss)
    assert [(w.start, w.stop) for w in kept.windows] == [(0, 3), (3, 6), (6, 10)]
    dense_windows = []
    for window in kept.windows:
        mean = torch.zeros(15, 15, dtype=torch.float64)
        for step in window.steps:
            product = step_product(log, module, batches, loss, step, "GGN", log.theta(step))
            images = product([shard_of(layout, row) for row in torch.eye(15, dtype=torch.float64)])
            mean += torch.stack([whole(image) for image in images]) / len(window.steps)
        approximation = torch.stack(
            [whole(image) for image in window.curvature([shard_of(layout, r) for r in torch.eye(15).double()])]
        )
        assert (approximation - mean).norm() <= 1e-11 * mean.norm()  # r = p: nothing is missed
        dense_windows.append(mean)
    for K in (None, 2):
        for same in (False, True):  # equal rates and decays take the closed form
            for i, group in enumerate(log.manifest.optimizer["groups"]):
                group["weight_decay"] = 0.05 if same or i == 0 else 0.0
            for i, record in enumerate(log.records()):
                rate = 0.2 / (1 + 0.1 * i)
                object.__setattr__(record, "lr", (rate, rate if same else 0.1))
            request = Counterfactual("skip", batch_ids=frozenset({1, 4}))
            # batches that are forgotten as a whole need neither data nor model
            found = compute_correction(log, None, None, request, HVPConfig("low_rank", 0.01), K, kept=kept)
            expected = torch.zeros(15, dtype=torch.float64)
            for source in (1, 4):
                v = -whole(log.update(source))
                for step in range(source + 1, 10 if K is None else min(10, source + 1 + K)):
                    if step in (1, 4):
                        continue
                    lr = log.record(step).lr
                    rates = by_group(layout, lr[0], lr[0] if same else lr[1])
                    matrix = next(
                        m for w, m in zip(kept.windows, dense_windows, strict=True) if w.start <= step < w.stop
                    )
                    decays = by_group(layout, 0.05, 0.05 if same else 0.0)
                    v = v - rates * (matrix @ v + 0.01 * v + decays * v)
                expected += v
            assert (found.v - shard_of(layout, expected)).norm() <= 1e-12 * float(expected.norm()), (K, same)
            assert found.gradients_equivalent == 0 and found.audit[0].mode == "low_rank:c"
            assert found.audit[0].missed is not None and found.audit[0].missed <= 1e-9
    # samples need their gradients
    request = REQUESTS["one sample, zero"]
    sampled = compute_correction(log, module, batches, request, HVPConfig("low_rank"), kept=kept, loss=loss)
    assert sampled.gradients_equivalent > 0 and sampled.v.norm() > 0
    save_curvature(Path(log_dir), kept, "fingerprint")


def by_group(layout: ShardLayout, matrices: float, vectors: float) -> torch.Tensor:
    """A value a parameter group, for every element."""
    pieces = [
        torch.full((slot.spec.numel,), matrices if len(slot.spec.shape) > 1 else vectors, dtype=torch.float64)
        for slot in layout
    ]
    return torch.cat(pieces)


def read_kept(log_dir: str) -> list[tuple[torch.Tensor, Any]]:
    """Whole bases of a kept curvature, read at this world size, with what is known of each."""
    kept = load_curvature(Path(log_dir), "c", linear_module().layout, "fingerprint")
    found = []
    for window in kept.windows:
        c = window.curvature
        rows = torch.stack([whole(ShardedVector(c.layout, row)) for row in c.basis])
        found.append((rows, (window.start, window.stop, window.steps, c.values, c.residuals, c.missed, c.products)))
    return found


def test_curvature_is_kept_and_used_without_data_and_model(ranks: Any, tmp_path: Path) -> None:
    ranks(3).run(check_kept, str(tmp_path))
    assert kept_names(tmp_path) == ["c"]
    readers = [ranks(world_size).run(read_kept, str(tmp_path))[0] for world_size in (3, 2, 1, 4)]
    for other in readers[1:]:  # written at 3 ranks: bit-identical at 2, 1 and 4
        for (rows, known), (rows0, known0) in zip(other, readers[0], strict=True):
            assert torch.equal(rows, rows0) and known == known0


def check_refusals(log_dir: str) -> None:
    module = linear_module()
    log, _ = train(module, None)
    layout = module.layout
    basis = torch.zeros(1, layout.flat_numel, dtype=torch.float64)
    curvature = LowRank(basis, (1.0,), (0.0,), 0.0, 1, layout)
    late = KeptCurvature("late", "GGN", 1, (KeptWindow(6, 10, (7,), curvature),))
    request = REQUESTS["one batch"]

    def correct(**options: Any) -> None:
        compute_correction(log, module, Regression(), request, loss=SquaredError(), **options)

    with pytest.raises(LmcError, match="covers steps 6 to 9, the request needs 4 to 9"):
        correct(config=HVPConfig("low_rank"), kept=late)
    with pytest.raises(LmcError, match="serves hessian_mode 'low_rank', not 'GGN'"):
        correct(config=HVPConfig("GGN"), kept=late)
    with pytest.raises(LmcError, match="need neither module nor batches"):
        compute_correction(log, None, None, request, HVPConfig("GGN"))
    with pytest.raises(LmcError, match="rank and refresh must be at least 1"):
        HVPConfig("low_rank", rank=0)
    with pytest.raises(LmcError, match="low_rank of 'fisher' is not available"):
        HVPConfig("low_rank", base="fisher")
    with pytest.raises(LmcError, match="serves hessian_mode 'low_rank'"):
        hvp_apply(log.theta(3), HVPConfig("GGN"), basis=curvature)
    with pytest.raises(LmcError, match="curvature of 'fd' is not kept"):
        average_curvature(log, module, Regression(), "x", base="fd")
    with pytest.raises(LmcError, match="windows between 1 and 10"):
        average_curvature(log, module, Regression(), "x", windows=11)
    with pytest.raises(LmcError, match=r"no curvature 'none' beside .* \(there: c\)"):
        load_curvature(Path(log_dir), "none", layout, "fingerprint")
    with pytest.raises(LmcError, match="without slashes"):
        load_curvature(Path(log_dir), "../c", layout, "fingerprint")
    with pytest.raises(LmcError, match="belongs to another run"):
        load_curvature(Path(log_dir), "c", layout, "other")
    with pytest.raises(LmcError, match="the exact diagonal of 20,000 parameters"):
        wide = ShardLayout([ParamSpec("w", (20_000,))], layout.rank, layout.world_size)
        exact_diagonal(lambda v: list(v), ShardedVector.zeros(wide))


def test_low_rank_refusals(ranks: Any, tmp_path: Path) -> None:
    ranks(3).run(check_kept, str(tmp_path))
    ranks(2).run(check_refusals, str(tmp_path))


def check_refresh() -> None:
    """A basis serves `refresh` steps: products are counted, and a later basis is another one."""
    module = linear_module()
    log, _ = train(module, None)
    request = REQUESTS["one batch"]  # step 4 of 10: steps 5 to 9 are propagated through
    calls, results = [], []
    for refresh in (1, 2, 5, 99):
        config = HVPConfig("low_rank", rank=2, refresh=refresh)
        found = compute_correction(log, module, Regression(), request, config, loss=SquaredError())
        calls.append(found.audit[0].hvp_calls)
        results.append(found.v)
        assert found.audit[0].missed is not None and 0 < found.audit[0].missed < 1
        assert found.gradients_equivalent > 0
    assert calls[0] > calls[1] > calls[2] == calls[3] > 0
    assert (results[2] - results[3]).norm() == 0 and (results[0] - results[2]).norm() > 0


def test_a_basis_serves_refresh_steps(ranks: Any) -> None:
    ranks(2).run(check_refresh)
