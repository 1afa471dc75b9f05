"""LMCleaner as Hugging Face Trainers, on real ranks: corrected in train() or at init, then fine-tuned on what stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from test_trainer import ENGINES, QUIET
from test_zero3 import small_config

import lmc_dist
from lmc_dist.config import Config
from lmc_dist.data import IGNORED, Collator, SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.frozen import read_weights
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trainers.weights import write_weights
from lmc_dist.trajectory.store import TrajectoryLog

FORGOTTEN = frozenset({3, 101, 204})


def configured(engine: str) -> None:
    """What a script without a GPU does first, or the Trainer would run as one process."""
    from accelerate import PartialState

    if engine.startswith("deepspeed"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    elif engine == "ddp":
        PartialState(cpu=True, backend="gloo")
    else:  # plain python, without a launcher's environment
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)


def deepspeed(engine: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration for an engine, one that lets the Trainer save a model."""
    given = ENGINES[engine]
    if given is None:
        return None
    return given | {
        "zero_optimization": given["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": True}
    }


def arguments(folder: Path, engine: str, **changes: Any) -> Any:
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    AcceleratorState._reset_state()  # accelerate takes a DeepSpeed configuration once in a process
    given = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        **QUIET,
        "bf16": engine == "deepspeed-zero2",
        "deepspeed": None if engine == "single" else deepspeed(engine),
    }
    if engine != "single":
        given["accelerator_config"] = {"use_configured_state": True}
    return TrainingArguments(output_dir=str(folder), **{**given, **changes})


def data_of(config: Config) -> SampleDataset:
    from lmc_dist.training import build_dataset

    return build_dataset(config)[0]


def masked(dataset: SampleDataset) -> SampleDataset:
    """The dataset whose forgotten samples have no targets: the Trainer's own retraining, in the same order."""
    items = dataset.by_id(dataset.ids)
    for item in items:
        if item["index"] in FORGOTTEN:
            item["labels"] = [IGNORED] * len(item["labels"])
    return SampleDataset(items, dataset.pad_token_id)


def model_at(config: Config, theta: ShardedVector | None = None) -> torch.nn.Module:
    """The configured model, at given weights."""
    from lmc_dist.training import build_config, build_model, build_tokenizer

    model = build_model(config.model, build_config(config.model, build_tokenizer(config)), seed=0)
    if theta is not None:
        write_weights(model, theta)
    return model


def logged_training(config: Config, folder: Path, engine: str, dataset: SampleDataset, log: str, **changes: Any) -> Any:
    """A Trainer after a logged run; all start from the weights of the one whose log is `log`."""
    from transformers import Trainer

    logger = lmc_dist.TrainingLogger(str(folder / log), save_interval=2)
    trainer = Trainer(
        # while a Trainer with ZeRO-3 lives, transformers partitions new models and draws their weights otherwise
        model=model_at(config, None if log == "log" else TrajectoryLog(folder / "log").theta(0)),
        args=arguments(folder / f"hf-{log}", engine, **changes),
        train_dataset=dataset,
        data_collator=Collator(dataset.pad_token_id),
        callbacks=[lmc_dist.TrainingLoggerCallback(logger)],
    )
    trainer.train()
    return trainer


def cleaner(
    config: Config, folder: Path, name: str, engine: str, model: torch.nn.Module, callbacks: Any = (), **changes: Any
) -> lmc_dist.LMCleanerSampleLevel:
    dataset = data_of(config)
    named = ("replay_head", "apply_immediately", "K", "hessian_mode", "update")
    own = {key: changes.pop(key) for key in named if key in changes}
    return lmc_dist.LMCleanerSampleLevel(
        model=model,
        args=arguments(folder / name, engine, **{"num_train_epochs": 0, **changes}),
        train_dataset=dataset,
        data_collator=Collator(dataset.pad_token_id),
        callbacks=list(callbacks),
        training_log_dir=str(folder / "log"),
        forget_sample_ids=FORGOTTEN,
        **own,
    )


def engine_weights(trainer: Any, layout: Any) -> ShardedVector:
    """θ of the live engine, whose working weights hold it too."""
    shards = engine_shards(trainer.model_wrapped, trainer.optimizer)
    theta = shards.read()
    shards.verify(theta)
    return relayout(theta, layout)


def engine_job(folder: Path, engine: str) -> None:
    """Everything under one engine; the Trainer's processes keep its state, so they serve one engine only."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from lmc_dist import run_lmcleaner_sample_unlearning

    configured(engine)
    config = small_config(folder)
    dataset = data_of(config)
    logged_training(config, folder, engine, dataset, "log", num_train_epochs=2)
    logged_training(config, folder, engine, masked(dataset), "retrained", num_train_epochs=2)
    log, retrained = TrajectoryLog(folder / "log"), TrajectoryLog(folder / "retrained")
    theta, gold = log.theta(log.num_steps), retrained.theta(retrained.num_steps)
    batch = 6 if engine == "single" else 12
    assert log.num_steps == retrained.num_steps == 2 * 24 // batch and (gold - theta).norm() > 0

    # in train(), by replay: the model that the Trainer itself retrains, to the bit
    replayed = cleaner(config, folder, "replayed", engine, model_at(config, theta), replay_head="all")
    assert replayed.correction is None and checksum(read_weights(replayed.model, log.layout)) == checksum(theta)
    output = replayed.train()
    assert output.global_step == 0 and "train_loss" not in output.metrics
    assert checksum(engine_weights(replayed, log.layout)) == checksum(gold)
    if engine == "deepspeed-zero2":  # in 16 bits: the masters hold it all the same
        return
    replayed.save_model(str(folder / "saved"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert checksum(read_weights(saved, log.layout)) == checksum(gold)

    # at init, by the recursion: what the library's front door finds
    expected = run_lmcleaner_sample_unlearning(model_at(config), str(folder / "log"), FORGOTTEN, dataset=dataset)
    corrected = expected.corrected(theta)
    unset_hf_deepspeed_config()  # so that this model is whole
    immediate = cleaner(config, folder, "immediate", engine, model_at(config, theta), apply_immediately=True)
    held = read_weights(immediate.model, log.layout)
    assert (held - corrected).norm() <= 1e-6 * corrected.norm() and immediate.correction is not None
    assert (held - gold).norm() < 0.5 * (theta - gold).norm()
    with pytest.raises(LmcError, match="corrected already: a checkpoint would replace"):
        immediate.train(resume_from_checkpoint=str(folder / "nowhere"))
    immediate.train()
    assert checksum(engine_weights(immediate, log.layout)) == checksum(held)
    records = json.loads((folder / "immediate" / "audit" / "audit_records.json").read_text())
    assert [r["mode"] for r in records] == ["GGN"] and records[0]["v_norm"] == immediate.correction.v.norm()
    result = json.loads((folder / "immediate" / "result.json").read_text())
    assert result["log_fingerprint"] == log.fingerprint

    # then fine-tuning, on what stays alone, logged from the corrected weights on
    callback = lmc_dist.TrainingLoggerCallback(str(folder / "tuning"))
    tuned = cleaner(config, folder, "tuned", engine, model_at(config, theta), [callback], num_train_epochs=1)
    output = tuned.train()
    tuning = TrajectoryLog(folder / "tuning")
    assert output.global_step == tuning.num_steps == -(-21 // batch) and output.training_loss > 0
    assert checksum(tuning.theta(0)) == checksum(held)  # the same correction, and the logger saw its result
    seen = [i for record in tuning.records() for i in record.sample_ids]
    assert set(seen) == set(dataset.ids) - FORGOTTEN
    assert checksum(engine_weights(tuned, log.layout)) == tuning.record(tuning.num_steps - 1).checksum

    for changes, message in (
        ({}, "is of an earlier correction: choose another output_dir"),
        ({"K": -1}, "K must be ≥ 0"),
        ({"replay_head": -1}, "replay_head must be"),
        ({"update": "exact"}, "unknown update 'exact': one of tangent, finite, auto"),
        ({"update": "finite", "K": 2}, "not linear in what is forgotten: use K=null"),
    ):
        with pytest.raises(LmcError, match=message):
            cleaner(config, folder, "tuned" if not changes else "other", engine, model_at(config), **changes)
    with pytest.raises(LmcError, match="does not hold the weights that the training in"):
        cleaner(config, folder, "wrong", engine, model_at(config), apply_immediately=True)
    wrong = cleaner(config, folder, "wrong-engine", engine, model_at(config))
    with pytest.raises(LmcError, match="the engine does not hold the weights"):
        wrong.train()


def optimizer_job(folder: Path) -> None:
    """AdamW: the optimizer's state of a loaded checkpoint is corrected together with the weights."""
    configured("single")
    config = small_config(folder)
    dataset = data_of(config)
    changes = {"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    saving = {**changes, "save_strategy": "epoch"}
    trainer = logged_training(config, folder, "single", dataset, "log", **saving)
    again = logged_training(config, folder, "single", masked(dataset), "retrained", **changes)
    checkpoint = str(folder / "hf-log" / f"checkpoint-{trainer.state.global_step}")
    log, retrained = TrajectoryLog(folder / "log"), TrajectoryLog(folder / "retrained")
    theta = log.theta(log.num_steps)
    replayed = cleaner(config, folder, "replayed", "single", model_at(config), replay_head="all", optim="adamw_torch")
    output = replayed.train(resume_from_checkpoint=checkpoint)
    assert output.global_step == trainer.state.global_step == 8
    shards, expected = engine_shards(replayed.model, replayed.optimizer), engine_shards(again.model, again.optimizer)
    assert checksum(shards.read()) == checksum(expected.read()) == retrained.record(7).checksum
    vectors, scalars = shards.read_state()
    golds, gold_scalars = expected.read_state()
    assert scalars == gold_scalars
    for key, vector in vectors.items():  # σ + dσ, which rounds
        assert (vector - golds[key]).norm() <= 1e-6 * golds[key].norm(), key
    # weights alone, from the model and a fresh optimizer
    fresh = cleaner(config, folder, "fresh", "single", model_at(config, theta), replay_head=2, optim="adamw_torch")
    fresh.train()
    assert not engine_shards(fresh.model, fresh.optimizer).has_state
    assert fresh.correction is not None and fresh.correction.audit[0].update == "finite"  # by itself, under AdamW


class Plain(torch.utils.data.Dataset):
    """A dataset of somebody else's."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.items[position]


def batch_job(folder: Path) -> None:
    """Whole batches, from datasets of other kinds, and what is refused."""
    import datasets

    from lmc_dist import run_lmcleaner_batch_unlearning

    configured("single")
    config = small_config(folder)
    dataset = data_of(config)
    logged_training(config, folder, "single", dataset, "log", num_train_epochs=1)
    log = TrajectoryLog(folder / "log")
    theta, items = log.theta(log.num_steps), dataset.by_id(dataset.ids)
    expected = run_lmcleaner_batch_unlearning(model_at(config), str(folder / "log"), [1], 2, dataset=dataset)

    def make(name: str, data: Any, **changes: Any) -> lmc_dist.LMCleanerBatchLevel:
        own = {"forget_batch_ids": [1], "K": 2, "apply_immediately": True, **changes}
        return lmc_dist.LMCleanerBatchLevel(
            model_at(config, theta),
            arguments(folder / name, "single"),
            Collator(dataset.pad_token_id),
            data,
            training_log_dir=str(folder / "log"),
            **own,
        )

    for name, data in (("plain", Plain(items)), ("datasets", datasets.Dataset.from_list(items))):
        trainer = make(name, data)
        assert (read_weights(trainer.model, log.layout) - expected.corrected(theta)).norm() <= 1e-6 * theta.norm()
        ids = {int(trainer.retained[i]["index"]) for i in range(len(trainer.retained))}
        assert ids == set(dataset.ids) - set(log.record(1).sample_ids)
        assert trainer.train().global_step == 3  # 18 samples in batches of 6
    unnamed = Plain([{k: v for k, v in item.items() if k != "index"} for item in items])
    for data, changes, message in (
        (unnamed, {}, "items of train_dataset need an integer `index`"),
        (Plain([*items, items[0]]), {}, "sample ids repeat in train_dataset"),
        (Plain(items[1:]), {}, "samples the dataset lacks"),
        (None, {}, "train_dataset must be the map-style dataset"),
        (dataset, {"forget_batch_ids": [99]}, "batch ids are not in the log: 99"),
        (dataset, {"forget_batch_ids": [0, 1, 2, 3]}, "all samples are forgotten, nothing is left to fine-tune on"),
        (dataset, {"hessian_mode": "magic"}, "unknown hessian_mode 'magic'"),
        (dataset, {"damping": 0.1, "curvature": lmc_dist.HVPConfig()}, "leave hessian_mode and damping out"),
        (dataset, {"model_init": lambda: model_at(config)}, "model_init makes a new model"),
    ):
        with pytest.raises(LmcError, match=message):
            make("refused", data, **changes)
    assert not (folder / "refused" / "result.json").exists()
    alone = arguments(folder / "refused", "single")
    os.environ["WORLD_SIZE"] = "2"  # a launcher that this Trainer has not seen
    with pytest.raises(LmcError, match="the Trainer counts 1 processes, the launcher started 2"):
        lmc_dist.LMCleanerBatchLevel(
            model_at(config), alone, train_dataset=dataset, training_log_dir=str(folder / "log"), forget_batch_ids=[1]
        )


# Processes that transformers and accelerate leave their state in are not shared with other tests.
JOBS: dict[str, tuple[int, bool, list[tuple[Any, ...]]]] = {
    "deepspeed": (2, True, [(engine_job, "deepspeed-zero2"), (engine_job, "deepspeed-zero3")]),
    "ddp": (2, True, [(engine_job, "ddp")]),
    "one process": (1, False, [(engine_job, "single"), (optimizer_job,), (batch_job,)]),
}


@pytest.mark.parametrize("kind", JOBS)
def test_corrected_in_train_at_init_and_fine_tuned(tmp_path: Path, kind: str) -> None:
    world_size, join, jobs = JOBS[kind]
    pool = Pool(world_size, join)
    try:
        for i, (job, *arguments) in enumerate(jobs):
            pool.run(job, tmp_path / str(i), *arguments)
    finally:
        pool.close()
