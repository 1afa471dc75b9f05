"""Diagonal estimates and eigenvalues against the dense Gauss-Newton matrix, on 1 and 3 ranks."""

from __future__ import annotations

from typing import Any

import torch
from cases import KeepDouble
from test_curvature import dense, shard_of, sharded

from lmc_dist.curvature import HVPConfig, TokenCrossEntropy, hvp_apply
from lmc_dist.curvature.diagonal import estimate_diagonal, rademacher
from lmc_dist.curvature.ggn import make_ggn_product
from lmc_dist.curvature.spectrum import lanczos
from lmc_dist.shards.checksum import checksum

KIND = "llama-tied"


def check(ggn: torch.Tensor, top: torch.Tensor) -> dict[str, Any]:
    module, theta, micros = sharded(KIND, blocked=True)
    with KeepDouble():
        product = make_ggn_product(module, TokenCrossEntropy(), theta, micros)
        estimate = estimate_diagonal(product, theta, probes=48)
        spectrum = lanczos(product, theta, count=3, steps=40, block=1)
        image = product([spectrum.vectors[0]])[0]
        config = HVPConfig("diag", damping=0.5, probes=48)
        applied = hvp_apply(theta, config, module, TokenCrossEntropy(), theta, micros)
    expected = shard_of(module.layout, ggn.diagonal())
    error = estimate.diagonal - expected
    torch.testing.assert_close(applied.flat, (estimate.diagonal.flat + 0.5) * theta.flat)
    return {
        "values": spectrum.values,
        "residuals": spectrum.residuals,
        "true residual": (image - spectrum.vectors[0] * spectrum.values[0]).norm(),
        "errors in standard errors": error.norm() / estimate.standard_error.norm(),
        "relative standard error": estimate.standard_error.norm() / expected.norm(),
        "signs": checksum(rademacher(theta, 3)),
        "diagonal": estimate.diagonal.norm(),
    }


def test_diagonal_and_eigenvalues_against_the_dense_matrix(ranks: Any) -> None:
    _, ggn, _ = dense(KIND)
    top = torch.linalg.eigvalsh(ggn).flip(0)[:3]
    found = [ranks(world_size).run(check, ggn, top)[0] for world_size in (1, 3)]
    for result in found:
        torch.testing.assert_close(torch.tensor(result["values"][:2], dtype=torch.float64), top[:2], rtol=1e-6, atol=0)
        assert result["true residual"] <= 2 * result["residuals"][0] + 1e-10
        assert 0.7 < result["errors in standard errors"] < 1.4  # the stated standard error is the real one
        assert result["relative standard error"] < 1
    assert found[0]["signs"] == found[1]["signs"]
    assert abs(found[0]["diagonal"] - found[1]["diagonal"]) <= 1e-12 * found[0]["diagonal"]
