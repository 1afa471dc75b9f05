"""The library's two front doors: forget batches, forget samples, from a log and the data it was trained on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lmc_dist.config import Counterfactual as Kind
from lmc_dist.curvature import HVPConfig
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, check_replaceable, cpu_group, promoted
from lmc_dist.shards.engines import engine_shards, is_engine
from lmc_dist.shards.engines.build import own_device
from lmc_dist.shards.fingerprint import model_fingerprint
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.relayout import relayout
from lmc_dist.trajectory.batches import BatchSource, DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.manifest import logged_attention
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import Correction, Update, apply_correction, compute_correction
from lmc_dist.unlearn.head import Length
from lmc_dist.unlearn.request import make_request
from lmc_dist.unlearn.results import library_result, write_results


def run_lmcleaner_batch_unlearning(
    model: Any,
    training_log_dir: str,
    forget_batch_ids: Iterable[int],
    K: int | None = None,
    hessian_mode: str = "GGN",
    damping: float = 0.0,
    output_dir: str | None = None,
    *,
    dataset: SampleDataset | BatchSource,
    apply_immediately: bool = True,
    tokenizer: Any = None,
    replay_head: Length = 0,
    update: Update = "auto",
) -> Correction:
    """Removes whole batches (counterfactual `skip`: those steps do not happen). Collective.

    Args:
        model: The live engine at θ_τ, a DeepSpeed engine or `engine_shards(model, optimizer)` of any, or a Hugging Face
            model or config of the architecture (then only files are written).
        training_log_dir: The trajectory log.
        forget_batch_ids: Batch ids of the log.
        K: Steps each source is propagated; None is all.
        hessian_mode: Any of `lmc_dist.curvature.MODES`.
        damping: λ ≥ 0.
        output_dir: Where model/, correction/, audit/ and result.json go; None writes nothing.
        dataset: The training data, by sample id.
        apply_immediately: Add v to a live engine's weights.
        tokenizer: Saved with the model.
        replay_head: Steps replayed before the recursion takes over, or `auto` (`compute_correction`).
        update: How the optimizer's steps are carried: `tangent`, `finite` or `auto` (`compute_correction`).

    Returns:
        The correction.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """
    request = make_request(batch_ids=forget_batch_ids)
    hvp = HVPConfig(hessian_mode, damping)
    return _run(
        model, training_log_dir, request, K, hvp, output_dir, dataset, apply_immediately, tokenizer, replay_head, update
    )


def run_lmcleaner_sample_unlearning(
    model: Any,
    training_log_dir: str,
    forget_sample_ids: Iterable[int],
    K: int | None = None,
    hessian_mode: str = "GGN",
    damping: float = 0.0,
    output_dir: str | None = None,
    *,
    dataset: SampleDataset | BatchSource,
    counterfactual: Kind = "renormalize",
    apply_immediately: bool = True,
    tokenizer: Any = None,
    replay_head: Length = 0,
    update: Update = "auto",
) -> Correction:
    """Removes samples wherever they occur; see `run_lmcleaner_batch_unlearning`. Collective.

    Args:
        model: As there.
        training_log_dir: The trajectory log.
        forget_sample_ids: The dataset's own ids.
        K: As there.
        hessian_mode: As there.
        damping: As there.
        output_dir: As there.
        dataset: As there.
        counterfactual: `renormalize` or `zero`.
        apply_immediately: As there.
        tokenizer: As there.
        replay_head: As there.
        update: As there.
    """
    request = make_request(sample_ids=forget_sample_ids, kind=counterfactual)
    hvp = HVPConfig(hessian_mode, damping)
    return _run(
        model, training_log_dir, request, K, hvp, output_dir, dataset, apply_immediately, tokenizer, replay_head, update
    )


def _run(
    model: Any,
    training_log_dir: str,
    request: Counterfactual,
    K: int | None,
    hvp: HVPConfig,
    output_dir: str | None,
    dataset: SampleDataset | BatchSource,
    apply_immediately: bool,
    tokenizer: Any,
    replay_head: Length,
    update: Update,
) -> Correction:
    shards = engine_shards(model) if is_engine(model) else None
    device = own_device() if shards is None else shards.device
    group = cpu_group()  # launchers other than ours start NCCL alone
    with agreement(group):
        if output_dir is not None:
            check_replaceable(Path(output_dir), "result.json", overwrite=False)
        log = TrajectoryLog(training_log_dir, group)
        inner = model if shards is None else shards.module
        is_module = isinstance(inner, torch.nn.Module)
        attention = logged_attention(log.manifest)
        skeleton = skeleton_of(inner) if is_module else build_skeleton(inner, device, attention)
        if model_fingerprint(skeleton) != log.manifest.model_fingerprint:
            raise LmcError(f"the model is not the one logged in {training_log_dir}: other config or parameters")
        if isinstance(dataset, SampleDataset):
            if log.manifest.dataset_fingerprint not in (None, dataset.fingerprint):
                raise LmcError(f"the dataset is not the one logged in {training_log_dir}: other fingerprint")
            batches: BatchSource = DatasetBatches(dataset, device)
        else:
            batches = dataset
    theta = log.theta(log.num_steps)
    if shards is not None and apply_immediately:
        shards.verify(relayout(theta, shards.layout))
    like = log.layout if shards is None else shards.layout
    frozen = read_frozen(inner, like) if is_module else None
    module = ShardedModule(skeleton, log.layout, device, frozen=frozen)
    started = time.perf_counter()
    correction = compute_correction(log, module, batches, request, hvp, K, replay_head=replay_head, update=update)
    seconds = time.perf_counter() - started
    result = library_result(log, correction, request, hvp, K, replay_head, update, seconds)
    if output_dir is not None:
        with promoted(Path(output_dir)) as part:
            write_results(part, log, module, theta + correction.v, correction, result, tokenizer)
    if shards is not None and apply_immediately:
        apply_correction(shards, correction)
    return correction
