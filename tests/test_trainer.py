"""The Hugging Face Trainer on CPU ranks, under several engines, logged by the callback and replayed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from test_zero3 import GPT2, small_config

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.trajectory.store import TrajectoryLog

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# Arguments of a Trainer that leaves nothing behind but the log.
QUIET: dict[str, Any] = {
    "remove_unused_columns": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
ENGINES: dict[str, dict[str, Any] | None] = {
    "deepspeed-zero3": DEEPSPEED | {"zero_optimization": {"stage": 3}},
    "deepspeed-zero2": DEEPSPEED | {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "deepspeed-zero0": DEEPSPEED | {"zero_optimization": {"stage": 0}},
    "ddp": None,
}


def make_trainer(
    folder: Path, configured: bool, optimizer: str = "sgd", engine: str = "deepspeed-zero3"
) -> tuple[Any, Any, Any]:
    """(Trainer, dataset, logger); `configured` applies the cure for Trainer's silent single process."""
    import os

    from accelerate import PartialState
    from transformers import Trainer, TrainingArguments

    from lmc_dist import TrainingLogger, TrainingLoggerCallback
    from lmc_dist.data import Collator
    from lmc_dist.training import build_config, build_dataset, build_model

    extra: dict[str, Any] = {}
    if configured:
        if ENGINES[engine] is None:
            PartialState(cpu=True, backend="gloo")
        else:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
        extra["accelerator_config"] = {"use_configured_state": True}
    config = small_config(folder, GPT2)
    dataset, tokenizer = build_dataset(config)
    model = build_model(config.model, build_config(config.model, tokenizer), seed=0)
    logger = TrainingLogger(config.log_dir, save_interval=3, dataset_fingerprint=dataset.fingerprint)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        optim=optimizer,
        learning_rate=0.1,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=configured,
        deepspeed=ENGINES[engine],
        bf16=engine == "deepspeed-zero2",
        **extra,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(dataset.pad_token_id),
        callbacks=[TrainingLoggerCallback(logger)],
    )
    return trainer, dataset, logger


def trainer_job(folder: Path, engine_name: str) -> tuple[str, str, int]:
    """Trains, then replays the log on a fresh engine: (logged, replayed) checksums and the steps verified."""
    from test_zero3 import build_for_replay

    from lmc_dist.shards.checksum import checksum
    from lmc_dist.trajectory.batches import DatasetBatches
    from lmc_dist.trajectory.replay import replay, replay_engine

    trainer, dataset, _ = make_trainer(folder, configured=True, engine=engine_name)
    trainer.train()
    log = TrajectoryLog(folder / "log")
    assert log.manifest.engine == engine_name and log.manifest.max_grad_norm == 1.0
    engine = replay_engine(build_for_replay(small_config(folder, GPT2)), log)
    result = replay(engine, log, DatasetBatches(dataset))
    return str(log.record(log.num_steps - 1).checksum), checksum(result.theta), result.verified


@pytest.mark.parametrize("engine", ENGINES)
def test_trainer_run_is_logged_and_replayed_to_the_bit(tmp_path: Path, engine: str) -> None:
    pool = Pool(2)
    try:
        for logged, replayed, verified in pool.run(trainer_job, tmp_path, engine):
            assert logged == replayed and verified == 4
    finally:
        pool.close()
    log = TrajectoryLog(tmp_path / "log")
    assert log.num_steps == 4  # 24 samples, 2 ranks x 3 samples x 2 passes, 2 epochs
    epochs = [sorted(i for s in (a, a + 1) for i in log.record(s).sample_ids) for a in (0, 2)]
    assert epochs[0] == epochs[1] == sorted(p * 100 + f for p in range(4) for f in range(6))
    for record in log.records():
        by_rank = [{i for m in record.micro_batches if m.rank == r for i in m.sample_ids} for r in range(2)]
        assert by_rank[0] and by_rank[1] and not by_rank[0] & by_rank[1]
    assert [r.lr[0] for r in log.records()] == pytest.approx([0.0, 0.05, 0.1, 0.05])  # the rate used, not the next
    assert [r.epoch for r in log.records()] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert all(r.grad_norm and 0 < r.clip_coef <= 1 for r in log.records())
    assert all(
        r.loss is not None and 5 < r.loss < 7 for r in log.records()
    )  # of one token, whatever the number of ranks


def second_training_job(folder: Path, engine_name: str) -> tuple[bool, bool, int]:
    """Trains twice, a log each: whether the second log begins where the first ended, and its replay."""
    from test_zero3 import build_for_replay

    from lmc_dist import TrainingLogger, TrainingLoggerCallback
    from lmc_dist.shards.checksum import checksum
    from lmc_dist.trajectory.batches import DatasetBatches
    from lmc_dist.trajectory.replay import replay, replay_engine

    trainer, dataset, _ = make_trainer(folder, configured=True, optimizer="adamw_torch", engine=engine_name)
    trainer.train()
    trainer.remove_callback(TrainingLoggerCallback)
    trainer.add_callback(TrainingLoggerCallback(TrainingLogger(str(folder / "second"), save_interval=3)))
    with pytest.raises(LmcError, match=r"set trainer\.model_wrapped = trainer\.model"):
        trainer.train()  # on an engine that is destroyed: it fails without a logger too
    assert not (folder / "second").exists()
    trainer.model_wrapped = trainer.model
    trainer.train()
    first, second = TrajectoryLog(folder / "log"), TrajectoryLog(folder / "second")
    follows = checksum(second.theta(0)) == checksum(first.theta(first.num_steps))
    result = replay(
        replay_engine(build_for_replay(small_config(folder, GPT2)), second), second, DatasetBatches(dataset)
    )
    return follows, checksum(result.theta) == second.record(3).checksum, result.verified


@pytest.mark.parametrize("engine", ["deepspeed-zero3", "deepspeed-zero0"])
def test_a_second_training_is_told_what_to_do_and_then_logged(tmp_path: Path, engine: str) -> None:
    pool = Pool(2)
    try:
        assert pool.run(second_training_job, tmp_path, engine) == [(True, True, 4)] * 2
    finally:
        pool.close()


def silent_single_process_job(folder: Path) -> str:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no half a minute of compiling
    trainer, _, _ = make_trainer(folder, configured=False)
    with pytest.raises(LmcError, match="the Trainer counts 1 processes, the launcher started 2") as caught:
        trainer.train()
    return str(caught.value)


def test_trainer_that_ignores_the_launcher_is_stopped(tmp_path: Path) -> None:
    pool = Pool(2, join=False)
    try:
        assert len(pool.run(silent_single_process_job, tmp_path)) == 2
    finally:
        pool.close()
    assert not (tmp_path / "log").exists()


# --- one process ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    """In place of a signal."""


def single_trainer(
    folder: Path, logger: dict[str, Any], dies_at: int | None = None, loss: str = "", **arguments: Any
) -> Any:
    """A Trainer of eight steps in this process, its log in `folder`; `loss` is a way to compute it elsewhere."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lmc_dist import TrainingLogger, TrainingLoggerCallback
    from lmc_dist.data import Collator
    from lmc_dist.training import build_config, build_dataset, build_model

    class Death(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == dies_at:
                raise Killed

    class OwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    config = small_config(folder, GPT2)
    dataset, tokenizer = build_dataset(config)
    settings = {
        "output_dir": str(folder / "hf"),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        **QUIET,
    }
    return (OwnLoss if loss == "own" else Trainer)(
        model=build_model(config.model, build_config(config.model, tokenizer), seed=0),
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=Collator(dataset.pad_token_id),
        callbacks=[TrainingLoggerCallback(TrainingLogger(folder / "log", **logger)), Death()],
        compute_loss_func=(lambda outputs, labels, **_: outputs.logits.sum()) if loss == "func" else None,
    )


REFUSED: dict[str, dict[str, Any]] = {
    r"label_smoothing_factor=0\.1.: only the model's own token cross entropy": {"label_smoothing_factor": 0.1},
    r"the Trainer computes the loss itself .compute_loss_func.": {"loss": "func"},
    r"neftune_noise_alpha=5\.0 adds noise": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_log_would_not_hold_is_refused_before_training(tmp_path: Path, message: str) -> None:
    with pytest.raises(LmcError, match=message):
        single_trainer(tmp_path, {}, **REFUSED[message]).train()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("save_batch_data", [False, True])
def test_a_loss_that_the_model_does_not_compute_is_refused(tmp_path: Path, save_batch_data: bool) -> None:
    trainer = single_trainer(tmp_path, {"save_batch_data": save_batch_data}, loss="own")
    with pytest.raises(
        LmcError, match="no `labels` reach the model, so the loss is not computed by the model"
    ) as caught:
        trainer.train()
    assert "given" not in str(caught.value)


def test_the_best_checkpoint_is_not_taken_for_the_end(tmp_path: Path, caplog: Any) -> None:
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    best |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = single_trainer(tmp_path, {"save_interval": None}, **best)
    trainer.train()
    assert trainer.state.best_global_step == 3  # the highest loss
    log = TrajectoryLog(tmp_path / "log")
    assert log.num_steps == 8 and log.snapshots == [0, 3, 6, 8]
    assert checksum(log.theta(8)) == log.record(7).checksum != log.record(2).checksum
    first, last = (record.getMessage() for record in caplog.records if record.name == "lmc_dist")
    assert first.startswith("load_best_model_at_end: what is deployed is the best checkpoint")
    assert f"the best checkpoint {trainer.state.best_model_checkpoint}, not the end" in last and "step 8" in last


def test_a_trainer_that_was_killed_goes_on_with_its_log(tmp_path: Path, caplog: Any) -> None:
    from lmc_dist.unlearn.run import warn_of_unfinished

    saving = {"save_strategy": "steps", "save_steps": 4}
    single_trainer(tmp_path / "whole", {"save_interval": 3}, **saving).train()
    whole = TrajectoryLog(tmp_path / "whole" / "log")
    warn_of_unfinished(whole)
    assert "no snapshot of its end" not in caplog.text

    killed = single_trainer(tmp_path, {"save_interval": 3}, dies_at=7, **saving)
    with pytest.raises(Killed):
        killed.train()
    for callback in killed.callback_handler.callbacks:
        if hasattr(callback, "logger"):
            callback.logger.flush()
            callback.logger.detach()
    log = TrajectoryLog(tmp_path / "log")
    assert (log.num_steps, log.snapshots) == (7, [0, 3, 4, 6])
    warn_of_unfinished(log)
    assert "no snapshot of its end, step 7" in caplog.text

    checkpoint = str(tmp_path / "hf" / "checkpoint-4")
    with pytest.raises(LmcError, match=r"goes on at step 4 .resume_from_checkpoint., the log would begin at step 0"):
        single_trainer(tmp_path, {"save_interval": 3}, **saving).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(LmcError, match=r"begins at step 0, the log in .* goes on at step 6: .* .0, 3, 4, 6."):
        single_trainer(tmp_path, {"save_interval": 3, "resume": True}, **saving).train()
    state = tmp_path / "hf" / "checkpoint-4" / "trainer_state.json"
    kept = state.read_text()
    state.write_text(kept.replace('"global_step": 4', '"global_step": 5'))
    with pytest.raises(
        LmcError, match=r"goes on at step 5, and the log in .* has no snapshot of it .there are 0, 3, 4, 6."
    ):
        single_trainer(tmp_path, {"save_interval": 3, "resume": True}, **saving).train(
            resume_from_checkpoint=checkpoint
        )
    state.write_text(kept)
    assert TrajectoryLog(tmp_path / "log").num_steps == 7  # none of them has touched it

    single_trainer(tmp_path, {"save_interval": 3, "resume": True}, **saving).train(resume_from_checkpoint=checkpoint)
    log = TrajectoryLog(tmp_path / "log")
    facts = [[(r.sample_ids, r.lr, r.checksum) for r in each.records()] for each in (log, whole)]
    assert len(facts[0]) == 8 and facts[0] == facts[1]  # to the bit
