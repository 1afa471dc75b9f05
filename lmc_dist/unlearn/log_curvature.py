"""The curvature of logged steps: its spectrum, and averages of it that are kept beside the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from lmc_dist.curvature import HVPConfig, Loss, TokenCrossEntropy, make_product
from lmc_dist.curvature.ggn import Product
from lmc_dist.curvature.low_rank import low_rank
from lmc_dist.curvature.spectrum import estimate_trace, lanczos
from lmc_dist.errors import LmcError
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import edit_step
from lmc_dist.trajectory.kept import KeptCurvature, KeptWindow
from lmc_dist.trajectory.record import Trajectory
from lmc_dist.unlearn.source import micro_batches


def step_product(
    trajectory: Trajectory,
    module: ShardedModule,
    batches: BatchSource,
    loss: Loss,
    step: int,
    mode: str,
    theta: ShardedVector,
) -> Product:
    """C_s of a logged step on the whole of its own batch, at θ_s. Collective when called."""
    record = trajectory.record(step)
    edited = edit_step(record, None, trajectory.manifest.loss_normalization, batches.num_targets)
    micros = micro_batches(edited, batches, module, "kept")
    return make_product(HVPConfig(mode), module, loss, theta, micros, None)


def mean_product(products: Sequence[Product]) -> Product:
    """The average of several curvatures."""

    def product(vectors: Sequence[ShardedVector]) -> list[ShardedVector]:
        sums = [v * 0.0 for v in vectors]
        for part in products:
            for total, image in zip(sums, part(vectors), strict=True):
                total.add_(image, alpha=1 / len(products))
        return sums

    return product


def step_spectrum(
    trajectory: Trajectory,
    module: ShardedModule,
    batches: BatchSource,
    step: int,
    mode: str = "GGN",
    count: int = 5,
    products: int = 32,
    probes: int = 16,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """The largest eigenvalues and the trace of C_s at a logged step. Collective.

    Args:
        trajectory: The logged run.
        module: The model on shards.
        batches: Samples by id.
        step: s.
        mode: `GGN`, `exact` or `fd`.
        count: Eigenvalues.
        products: Lanczos products behind them.
        probes: Products behind the trace.
        loss: None is next-token cross-entropy.

    Returns:
        {step, lr, mode, values, residuals, eta_lambda_max, trace, trace_standard_error, products}
    """
    theta = trajectory.theta(step)
    product = step_product(trajectory, module, batches, loss or TokenCrossEntropy(), step, mode, theta)
    spectrum = lanczos(product, theta, count, products)
    trace = estimate_trace(product, theta, probes)
    lr = max(trajectory.record(step).lr)
    return {
        "step": step,
        "lr": lr,
        "mode": mode,
        "values": spectrum.values,
        "residuals": spectrum.residuals,
        "eta_lambda_max": lr * max(spectrum.values, key=abs),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "products": spectrum.products + probes,
    }


def average_curvature(
    trajectory: Trajectory,
    module: ShardedModule,
    batches: BatchSource,
    name: str,
    base: str = "GGN",
    rank: int = 32,
    windows: int = 1,
    steps: int = 4,
    loss: Loss | None = None,
    progress: Callable[[int], None] = lambda window: None,
) -> KeptCurvature:
    """The `rank` largest eigenpairs of the curvature averaged over some steps of each window. Collective.

    The run is cut into `windows` equal spans, and C_s of up to `steps` applied steps, evenly spread over a span, is
    averaged, each at its own θ_s on its own batch. Memory: `steps` + 2 · (2·rank + 8) sharded vectors.

    Raises:
        LmcError: Settings out of bounds, steps whose tensors are gone.
    """
    first, tau = trajectory.first_step, trajectory.num_steps
    if base not in ("GGN", "exact"):
        raise LmcError(f"curvature of '{base}' is not kept; available: GGN, exact")
    if rank < 1 or steps < 1 or not 1 <= windows <= tau - first:
        raise LmcError(
            f"rank and steps must be at least 1 and windows between 1 and {tau - first}, got {rank}, {steps}, {windows}"
        )
    bounds = [first + (tau - first) * i // windows for i in range(windows + 1)]
    found, samples = [], 0
    for i, (start, stop) in enumerate(pairwise(bounds)):
        applied = [s for s in range(start, stop) if trajectory.record(s).applied]
        chosen = [applied[len(applied) * (2 * k + 1) // (2 * steps)] for k in range(steps)] if applied else []
        chosen = sorted(set(chosen))
        if not chosen:
            raise LmcError(f"no step of the window {start} to {stop - 1} changed the weights: use fewer windows")
        parts = [
            step_product(trajectory, module, batches, loss or TokenCrossEntropy(), s, base, trajectory.theta(s))
            for s in chosen
        ]
        like = trajectory.theta(chosen[0])
        curvature = low_rank(mean_product(parts), like.like(torch.zeros_like(like.flat)), rank)
        found.append(KeptWindow(start, stop, tuple(chosen), curvature))
        samples += sum(len(trajectory.record(s).sample_ids) for s in chosen)
        progress(i)
    return KeptCurvature(name, base, samples, tuple(found))
