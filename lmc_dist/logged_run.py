"""A log with all that is needed to compute on it: the data it was trained on and the model, checked against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lmc_dist.config import Config, ModelConfig
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.runtime import Runtime
from lmc_dist.shards.fingerprint import model_differences, model_fingerprint
from lmc_dist.shards.frozen import read_frozen
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.unloaded import Unloaded, zeros
from lmc_dist.training import build_config, build_dataset, freeze, generate_as_published, open_model
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.manifest import logged_attention
from lmc_dist.trajectory.record import TrajectoryManifest
from lmc_dist.trajectory.store import TrajectoryLog


@dataclass(frozen=True)
class LoggedRun:
    """The log of a configuration, its dataset, and its model on shards without weights."""

    log: TrajectoryLog
    dataset: SampleDataset
    tokenizer: Any
    model_config: Any
    module: ShardedModule
    batches: DatasetBatches


def open_logged_run(config: Config, runtime: Runtime) -> LoggedRun:
    """Opens what `config` names. Local; a rank's error must be agreed on by the caller.

    Raises:
        LmcError: No log, or a model or dataset that is not the logged one.
    """
    log = TrajectoryLog(config.log_dir)
    dataset, tokenizer = build_dataset(config)
    model_config = build_config(config.model, tokenizer)
    skeleton = logged_skeleton(config, model_config, log, runtime.device)
    check_fingerprints(log, dataset, skeleton)
    module = on_shards(skeleton, config, model_config, log, runtime.device)
    return LoggedRun(log, dataset, tokenizer, model_config, module, DatasetBatches(dataset, runtime.device))


def as_logged(model: ModelConfig, log: TrajectoryLog) -> ModelConfig:
    """The settings of a model with the log's attention kernel where they name none. Local."""
    return replace(model, attn_implementation=model.attn_implementation or logged_attention(log.manifest))


def logged_skeleton(
    config: Config, model_config: Any, log: TrajectoryLog, device: torch.device | str
) -> torch.nn.Module:
    """The model without weights, what is not trained frozen. Local."""
    model = as_logged(config.model, log)
    skeleton = build_skeleton(model_config, device, model.attn_implementation)
    generate_as_published(skeleton, model)
    freeze(skeleton, model.trainable)
    return skeleton


def on_shards(
    skeleton: torch.nn.Module, config: Config, model_config: Any, log: TrajectoryLog, device: torch.device
) -> ShardedModule:
    """A skeleton on the log's shards. Local."""
    frozen = None
    if config.model.trainable is not None:  # the log holds trained weights only
        frozen = read_frozen(starting_model(config, model_config, log), log.layout)
    return ShardedModule(skeleton, log.layout, device, frozen=frozen)


def starting_model(config: Config, model_config: Any, log: TrajectoryLog) -> torch.nn.Module | Unloaded:
    """The model that training started from, as far as a log does not bring it: what is frozen has its value. Local.

    Trained weights may be anything, since the log has them.
    """
    model = as_logged(config.model, log)
    if model.trainable is None:
        skeleton = build_skeleton(model_config, "cpu", model.attention)
        return Unloaded(skeleton, zeros(skeleton))
    seed = log.manifest.run.get("config", {}).get("train", {}).get("seed", config.train.seed)
    return open_model(model, model_config, seed)


def other_model(manifest: TrajectoryManifest, skeleton: torch.nn.Module) -> tuple[str, str] | None:
    """(how a model differs from the logged one, what to do about it); None where it is the same. Local."""
    if (found := model_fingerprint(skeleton)) == manifest.model_fingerprint:
        return None
    if adapters := [row["name"] for row in manifest.parameters if "lora_" in row["name"]]:
        return (
            f"the log is of adapters ({adapters[0][:100]}), which lmc does not build from a model's settings",
            "pass the model with its adapters to run_lmcleaner_sample_unlearning or run_lmcleaner_batch_unlearning in Python",
        )
    differing = model_differences(skeleton, manifest.model_config, manifest.parameters)
    return (
        f"the model is not the logged one: fingerprint {found[:12]} against {manifest.model_fingerprint[:12]}, {differing}",
        "give model.path or model.config of training",
    )


def check_fingerprints(log: TrajectoryLog, dataset: SampleDataset, skeleton: torch.nn.Module) -> None:
    """Checks that model and dataset are those of the log.

    Raises:
        LmcError: They are not.
    """
    manifest = log.manifest
    if (other := other_model(manifest, skeleton)) is not None:
        raise LmcError(f"{log.path}: {other[0]}: {other[1]}")
    if manifest.dataset_fingerprint not in (None, dataset.fingerprint):
        raise LmcError(
            f"the dataset is not the logged one: fingerprint {dataset.fingerprint[:12]} against "
            f"{manifest.dataset_fingerprint[:12]}; data settings, tokenizer or files changed since training"  # type: ignore[index]
        )
