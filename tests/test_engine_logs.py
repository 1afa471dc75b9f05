"""Every engine logged in every tier: replayed to the bit, unlearned from like a log of one process, corrected live."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_fd_engines import fsdp2_engine, my_micros, oracle, reference_model, shard_of, zero3_engine
from test_zero3 import GPT2, LLAMA, build_for_replay, forget_config, small_config, this_runtime, train_job

from lmc_dist import TrainingLogger
from lmc_dist.config import Config, LogConfig
from lmc_dist.curvature import TokenCrossEntropy
from lmc_dist.data import collate
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import EngineShards, engine_shards
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.callback import training_log
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.replay import ReplayResult, replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

TIERS = ("replay", "update", "gradient", "full")
OFFLOAD = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}

# Name → DeepSpeed's configuration; the others are torch's.
DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}},
    "zero1-round-robin": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
    "zero0-bf16": {"zero_optimization": {"stage": 0}} | BF16,
    "zero1-bf16": {"zero_optimization": {"stage": 1}} | BF16,
    "zero1-bf16-fp32": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}} | BF16,
    "zero2-bf16": {"zero_optimization": {"stage": 2}} | BF16,
    "zero2-bf16-fp32": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}} | BF16,
    "zero3-bf16": {"zero_optimization": {"stage": 3}} | BF16,
}
FLOAT32 = {engine: TIERS for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2", "ddp")}
FLOAT32 |= {"zero2-offload": ("gradient",), "zero1-round-robin": ("gradient",)}
IN_BF16 = [name for name in DEEPSPEED if "bf16" in name]
FORGOTTEN = frozenset({3, 101, 204})


def engine_config(folder: Path, engine: str, tier: str = "update", model: Any = LLAMA, **train: Any) -> Config:
    """24 samples in steps of 7, 7, 7 and 3, under the engine; one epoch unless told otherwise."""
    settings = {"epochs": 1, **train}
    if engine in DEEPSPEED:
        file = folder / f"{engine}.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():  # ranks share the folder
            file.write_text(json.dumps(DEEPSPEED[engine]))
        settings["deepspeed"] = str(file)
    else:
        settings["engine"] = engine
    return replace(small_config(folder, model, **settings), log=LogConfig(tier, 2))  # type: ignore[arg-type]


def replayed(config: Config, counterfactual: Counterfactual | None = None) -> ReplayResult:
    from lmc_dist.training import build_dataset

    log = TrajectoryLog(config.log_dir)
    engine = replay_engine(build_for_replay(config), log)
    result = replay(engine, log, DatasetBatches(build_dataset(config)[0]), counterfactual)
    engine.destroy()
    return result


def check_replay(config: Config) -> TrajectoryLog:
    """The whole run, and its last steps from a snapshot, come out to the bit."""
    log = TrajectoryLog(config.log_dir)
    result = replayed(config)
    assert result.exact and result.verified == sum(1 for _ in log.records())
    assert checksum(result.theta) == log.record(log.num_steps - 1).checksum
    late = Counterfactual("skip", batch_ids=frozenset({log.num_steps - 1}))
    result = replayed(config, late)
    assert result.verified >= 1 and checksum(result.theta) == log.record(log.num_steps - 2).checksum
    return log


def request() -> Counterfactual:
    return Counterfactual("renormalize", sample_ids=FORGOTTEN)


def deletion(config: Config, live: Any = None, output: Path | None = None) -> ShardedVector:
    """v of the request: by GGN, or by replay where the tier keeps no updates."""
    from lmc_dist import run_lmcleaner_sample_unlearning
    from lmc_dist.training import build_config, build_dataset

    log = TrajectoryLog(config.log_dir)
    if config.log.storage == "replay":
        return replayed(config, request()).theta - log.theta(log.num_steps)
    dataset, tokenizer = build_dataset(config)
    model = build_config(config.model, tokenizer) if live is None else live
    output_dir = None if output is None else str(output)
    return run_lmcleaner_sample_unlearning(model, config.log_dir, FORGOTTEN, output_dir=output_dir, dataset=dataset).v


# --- every engine, every tier --------------------------------------------------------------------------------------


def single_job(folder: Path) -> None:
    """Logs of one process, and what two deletions from them are."""
    from lmc_dist.unlearn.correction import Correction

    for tier in TIERS:
        config = engine_config(folder / tier, "single", tier)
        shards = trained(config)
        log = check_replay(config)
        assert (log.manifest.engine, log.manifest.world_size) == ("single", 1)
        v = deletion(config, shards if tier == "update" else None)
        if tier == "update":
            shards.verify(log.theta(log.num_steps) + v)
        Correction(v, (), 0.0).save(folder / f"v-{tier}")


def trained(config: Config) -> EngineShards:
    """The engine after a logged run."""
    from lmc_dist.training import Trainer

    trainer = Trainer(config, this_runtime())
    trainer.run()
    return trainer.shards


def tiers_job(folder: Path, engine: str, tiers: tuple[str, ...], single: Path) -> dict[str, tuple[float, float]]:
    """By tier: relative distance of the corrected weights, and of v, from those of the single process."""
    from transformers import AutoModelForCausalLM

    from lmc_dist.unlearn.correction import load_correction

    found = {}
    for tier in tiers:
        config = engine_config(folder / tier, engine, tier)
        shards = trained(config)
        log = check_replay(config)
        assert log.manifest.partition == ("fsdp2" if engine == "fsdp2" else "zero3")
        theta = log.theta(log.num_steps)
        assert checksum(theta) == log.record(log.num_steps - 1).checksum
        shards.verify(relayout(theta, shards.layout))
        output = folder / "out" if tier == "full" else None
        live = shards if tier in ("update", "full") else None
        v = deletion(config, live, output)
        if live is not None:  # masters, working weights and checkpoint hold θ + v
            shards.verify(relayout(theta + v, shards.layout))
        if output is not None:
            exported = dict(AutoModelForCausalLM.from_pretrained(output / "model").named_parameters())
            stored = ShardedVector.from_full(log.layout, exported.__getitem__)
            assert checksum(stored) == checksum((theta + v).to(stored.flat.dtype))
        expected = load_correction(single / f"v-{tier}", log.layout, theta)
        single_log = TrajectoryLog(single / tier / "log")
        corrected = single_log.theta(log.num_steps) + expected
        distance = ((theta + v) - corrected).norm() / corrected.norm(), (v - expected).norm() / expected.norm()
        found[tier] = distance
        shards.destroy()
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def single_logs(ranks: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("single")
    ranks(1).run(single_job, folder)
    return folder


@pytest.mark.parametrize("engine", FLOAT32)
def test_deletion_from_any_log_is_that_from_one_process(
    ranks: Any, tmp_path: Path, single_logs: Path, engine: str
) -> None:
    for tier, (weights, v) in ranks(2).run(tiers_job, tmp_path, engine, FLOAT32[engine], single_logs)[0].items():
        # in tier `replay` v is the difference of two runs' weights, and carries the rounding of both
        assert weights <= 1e-6 and v <= (1e-5 if tier == "replay" else 1e-6), (tier, weights, v)


@pytest.mark.parametrize("engine", IN_BF16)
def test_bfloat16_engines_are_replayed_to_the_bit(ranks: Any, tmp_path: Path, single_logs: Path, engine: str) -> None:
    """Gradients carry bfloat16's 2⁻⁸: a deletion is as far from the float32 run's as the training itself is."""
    tiers = ("replay", "full")
    for tier, (weights, v) in ranks(2).run(tiers_job, tmp_path, engine, tiers, single_logs)[0].items():
        assert weights <= 2**-10 and v <= (0.05 if tier == "replay" else 0.01), (tier, weights, v)


def replay_refused(config: Config) -> str:
    with pytest.raises(LmcError) as caught:
        replayed(config)
    return str(caught.value)


def test_a_log_of_one_process_is_replayed_in_one(ranks: Any, tmp_path: Path) -> None:
    config = engine_config(tmp_path, "single", "replay")
    ranks(1).run(train_job, config)
    for told in ranks(2).run(replay_refused, config):
        assert "trained by one process and here are 2 ranks: replay it in one" in told and "Wrap it" not in told


# --- frozen parameters ---------------------------------------------------------------------------------------------


def frozen_job(folder: Path, engine: str) -> None:
    config = engine_config(folder, engine, "gradient", max_grad_norm=0.05, optimizer="adamw", learning_rate=0.01)
    config = replace(config, model=replace(config.model, trainable=r"layers\.1\.|norm"))
    shards = trained(config)
    assert {name.split(".")[1] for name in shards.parameters} == {"layers", "norm"}
    shards.destroy()
    log = check_replay(config)
    assert [row["name"] for row in log.manifest.parameters] == list(shards.parameters)
    assert all(r.clip_coef < 1 for r in log.records())
    dist.barrier()


def test_frozen_parameters_are_left_out(ranks: Any, tmp_path: Path) -> None:
    for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2", "ddp", "zero1-bf16-fp32"):
        ranks(2).run(frozen_job, tmp_path / engine, engine)


def train_lora(config: Config, targets: list[str], steps: int, interval: int) -> tuple[EngineShards, Any, Any]:
    """(live engine, what makes its model anew, dataset) of a logged run on two ranks under LoRA."""
    from peft import LoraConfig, get_peft_model

    from lmc_dist.training import build_dataset, build_engine

    dataset = build_dataset(config)[0]

    def fresh() -> Any:
        torch.manual_seed(4)
        return get_peft_model(build_for_replay(config), LoraConfig(r=2, target_modules=targets))

    shards = engine_shards(build_engine(fresh(), config.train, dist.get_world_size()))
    logger = TrainingLogger(config.log_dir, save_interval=interval)
    logger.attach(shards)
    for step in range(steps):
        ids = dataset.ids[4 * step : 4 * step + 4]
        batch = collate(dataset.by_id(ids[dist.get_rank() :: 2]), dataset.pad_token_id)
        items = sum(dataset.num_targets(i) for i in ids)
        shards.module.train()
        shards.run_pass(dict(batch), items, 2.0, True, False)
        shards.step()
    logger.close()
    return shards, fresh, dataset


def lora_job(folder: Path, engine: str) -> list[str]:
    """Names of what is logged of a model under LoRA, replayed to the bit."""
    config = engine_config(folder, engine)
    shards, fresh, dataset = train_lora(config, ["q_proj", "v_proj"], steps=3, interval=2)
    shards.destroy()
    log = TrajectoryLog(config.log_dir)
    engine_again = replay_engine(fresh(), log)
    result = replay(engine_again, log, DatasetBatches(dataset))
    engine_again.destroy()
    assert result.exact and result.verified == 3 and log.record(2).u_norm
    return [row["name"] for row in log.manifest.parameters]


def test_lora_alone_is_logged(ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for engine in ("ddp", "zero2", "fsdp2"):
        names = ranks(2).run(lora_job, tmp_path / engine, engine)[0]
        assert names and all("lora_" in name for name in names)


# --- three ranks, dropout, accumulation ----------------------------------------------------------------------------


def wide_job(folder: Path, engine: str) -> None:
    config = engine_config(folder, engine, "replay", GPT2, epochs=2, max_grad_norm=1.0, optimizer="adamw")
    trained(replace(config, train=replace(config.train, learning_rate=0.01))).destroy()
    log = check_replay(config)
    assert all(m.random_state for m in log.record(0).micro_batches)
    assert {m.micro_step for m in log.record(0).micro_batches} == {0, 1}
    for batch in (3, 5):  # from snapshots in the middle
        late = Counterfactual("skip", batch_ids=frozenset({batch}))
        assert replayed(config, late).verified >= 1
    dist.barrier()


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "fsdp2", "ddp", "zero2-bf16"])
def test_replay_repeats_training_on_three_ranks_to_the_bit(ranks: Any, tmp_path: Path, engine: str) -> None:
    """Sums over three ranks depend on their order: DDP's buckets, ZeRO's partitions, FSDP2's units must be the same."""
    ranks(3).run(wide_job, tmp_path, engine)


def resumed_job(config: Config) -> None:
    from lmc_dist.training import Trainer

    class Cut(Exception):
        pass

    trainer = Trainer(config, this_runtime())
    step = trainer._step

    def cut(number: int, ids: list[int]) -> float | None:
        if number == 3:
            raise Cut
        return step(number, ids)

    trainer._step = cut  # type: ignore[method-assign]
    with pytest.raises(Cut):
        trainer.run()
    trainer.shards.destroy()
    train_job(replace(config, resume=True))


def test_a_run_that_was_cut_off_continues_to_the_bit(ranks: Any, tmp_path: Path) -> None:
    for engine in ("zero1", "fsdp2", "ddp"):
        whole = engine_config(tmp_path / engine, engine, optimizer="adamw", learning_rate=0.01)
        cut = engine_config(tmp_path / f"{engine}-cut", engine, optimizer="adamw", learning_rate=0.01)
        ranks(3).run(train_job, whole)
        ranks(3).run(resumed_job, cut)
        expected, found = (TrajectoryLog(c.log_dir) for c in (whole, cut))
        assert [r.checksum for r in found.records()] == [r.checksum for r in expected.records()]


def test_retraining_uses_the_logged_engine(ranks: Any, tmp_path: Path) -> None:
    """A run without the data, trained by the same engine, is what replay gives."""
    for engine in ("zero2", "ddp"):
        config = engine_config(tmp_path / engine, engine)
        ranks(2).run(train_job, config)
        reference = forget_config(config, request(), tmp_path / f"{engine}-retrain")
        ranks(2).run(train_job, reference)
        log = TrajectoryLog(reference.log_dir)
        assert ranks(2).run(replay_checksum, config) == [log.record(log.num_steps - 1).checksum] * 2


def replay_checksum(config: Config) -> str:
    return checksum(replayed(config, request()).theta)


# --- loops written by hand -----------------------------------------------------------------------------------------


def wrap(engine: str, model: torch.nn.Module, lr: float = 0.1) -> tuple[Any, torch.optim.Optimizer]:
    """(what the loop calls, its optimizer)."""
    make = partial(torch.optim.SGD, lr=lr)
    if engine == "fsdp2":
        return fsdp2_engine(model, make)
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), make(model.parameters())
    return model, make(model.parameters())


def keep_local(engine: str, model: Any, is_local: bool) -> Any:
    if engine == "fsdp2":
        model.set_requires_gradient_sync(not is_local)
    return model.no_sync() if engine == "ddp" and is_local else nullcontext()


def hand_job(folder: Path, engine: str, accumulation: str, clip: float, dtype: str) -> None:
    """Three steps of two passes, plain mean of the passes' losses."""
    from lmc_dist.training import build_dataset

    config = small_config(folder, GPT2)
    dataset = build_dataset(config)[0]
    world_size = dist.get_world_size()

    def fresh() -> torch.nn.Module:
        return build_for_replay(config).to(getattr(torch, dtype))

    model, optimizer = wrap(engine, fresh())
    mine = dataset.ids[dist.get_rank() :: world_size]
    settings: dict[str, Any] = {"max_grad_norm": clip} if clip else {}
    settings |= {"mode": "gradient", "save_interval": 2, "loss_normalization": "micro_batch_token_mean"}
    model.train()
    inner = getattr(model, "module", model)  # what a trainer's callback would be given
    with training_log(inner, config.log_dir, optimizer, **settings):
        for i in range(6):
            batch = collate(dataset.by_id(mine[i : i + 1]), dataset.pad_token_id)
            with keep_local(engine, model, accumulation == "local" and i % 2 == 0):
                (model(**batch).loss / 2).backward()
            if i % 2:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    log = TrajectoryLog(config.log_dir)
    assert log.manifest.engine == engine and log.manifest.dtype == dtype and log.manifest.max_grad_norm == clip
    replayed_engine = replay_engine(fresh(), log)
    result = replay(replayed_engine, log, DatasetBatches(dataset))
    assert result.exact and result.verified == log.num_steps == 3
    for step, record in enumerate(log.records()):
        assert [m.is_local for m in record.micro_batches] == [
            accumulation == "local" and engine != "single" and m.micro_step == 0 for m in record.micro_batches
        ]
        gradient = log.gradient(step)
        assert record.grad_norm == pytest.approx(gradient.norm(), rel=1e-5)
        assert (record.clip_coef < 1) == bool(clip and gradient.norm() > clip)
        explained = gradient * (-record.lr[0] * record.clip_coef)
        assert (log.update(step) - explained).norm() <= 1e-6 * log.theta(step).norm()
    assert not clip or any(r.clip_coef < 1 for r in log.records())
    dist.barrier()


HAND = [
    ("single", 1, "local", 0.0, "float32"),
    ("single", 1, "local", 0.5, "float64"),
    ("ddp", 2, "reduced", 0.5, "float32"),
    ("ddp", 3, "local", 0.0, "float32"),
    ("ddp", 3, "reduced", 0.5, "float64"),
    ("fsdp2", 2, "local", 0.5, "float32"),
    ("fsdp2", 3, "reduced", 0.5, "float32"),
    ("fsdp2", 2, "local", 0.0, "float64"),
]


@pytest.mark.parametrize(("engine", "world_size", "accumulation", "clip", "dtype"), HAND)
def test_hand_written_loops_are_replayed_to_the_bit(
    ranks: Any, tmp_path: Path, engine: str, world_size: int, accumulation: str, clip: float, dtype: str
) -> None:
    ranks(world_size).run(hand_job, tmp_path, engine, accumulation, clip, dtype)


# --- steps that are not applied ------------------------------------------------------------------------------------


def skipped_job(folder: Path, engine: str, how: str) -> None:
    """Four steps, the second with a gradient that is not a number."""
    from lmc_dist.training import build_dataset, build_engine

    config = engine_config(folder, engine, "gradient", learning_rate=0.1, batch_size=4)
    dataset, world_size = build_dataset(config)[0], dist.get_world_size()
    autocast = torch.bfloat16 if how == "autocast" else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if how in ("scaler", "autocast") else None
    shards: Any = engine_shards(build_engine(build_for_replay(config), config.train, world_size))
    torch_loop = engine in ("single", "ddp", "fsdp2")
    clip = 0.5 if how == "scaler" else 0.0
    logger = TrainingLogger(
        config.log_dir,
        mode="gradient",
        save_interval=2,
        max_grad_norm=clip or None,
        autocast=None if autocast is None else "bfloat16",
    )
    if torch_loop:
        logger.attach(shards.wrapper, shards.base, scaler=scaler)
    else:
        logger.attach(shards)
    shards.module.train()
    for step in range(4):
        ids = dataset.ids[3 * step : 3 * step + 3]
        batch = collate(dataset.by_id(ids[dist.get_rank() :: world_size]), dataset.pad_token_id)
        items = torch.tensor(float(sum(dataset.num_targets(i) for i in ids)))
        poison = float("nan") if step == 1 else 1.0
        if not torch_loop:
            loss = shards.engine(**batch, num_items_in_batch=items).loss
            shards.engine.backward(loss * world_size * poison, scale_wrt_gas=False)
            shards.engine.step()
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = shards.wrapper(**batch, num_items_in_batch=items).loss * world_size * poison
        if scaler is None:
            loss.backward()
            if step == 1 and how == "by hand":
                logger.skip_step()
            else:
                shards.base.step()
        else:
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(shards.base)
                torch.nn.utils.clip_grad_norm_(shards.module.parameters(), clip)
            scaler.step(shards.base)
            scaler.update()
        shards.base.zero_grad()
    logger.close()
    shards.destroy()
    log = TrajectoryLog(config.log_dir)
    assert [r.applied for r in log.records()] == [True, False, True, True]
    assert log.record(1).u_norm == 0 and len(log.record(1).sample_ids) == 3
    result = replayed(config)
    assert result.exact and result.verified == 4
    assert log.gradient(1).norm() == 0 and log.gradient(2).norm() == pytest.approx(log.record(2).grad_norm, rel=1e-4)
    dist.barrier()


SKIPPED = [("zero1", ""), ("zero2", ""), ("zero3", ""), ("zero2-offload", ""), *((name, "") for name in IN_BF16)]
SKIPPED += [("ddp", "scaler"), ("ddp", "autocast"), ("ddp", "by hand"), ("fsdp2", "scaler"), ("zero2", "")]


def test_steps_that_are_not_applied_are_logged_as_such(ranks: Any, tmp_path: Path) -> None:
    for i, (engine, how) in enumerate(SKIPPED):
        ranks(2).run(skipped_job, tmp_path / str(i), engine, how)
    ranks(1).run(skipped_job, tmp_path / "single", "single", "scaler")


# --- what is refused -----------------------------------------------------------------------------------------------


def refusal(folder: Path, change: str) -> str:
    """The error of a loop of one step under DDP."""
    from lmc_dist.training import build_dataset

    config = small_config(folder)
    dataset = build_dataset(config)[0]
    model = build_for_replay(config)
    if change == "bfloat16":
        model = model.bfloat16()
    if change == "plain":
        wrapper: Any = model
    else:
        wrapper = torch.nn.parallel.DistributedDataParallel(model)
    make: Any = torch.optim.Adafactor if change == "adafactor" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=0.1)
    declared = 1.0 if change in ("never clipped", "other norm") else None
    mine = dataset.ids[dist.get_rank() :: 2][:2]
    batch = collate(dataset.by_id(mine), dataset.pad_token_id)
    settings = {"loss_normalization": "micro_batch_token_mean", "max_grad_norm": declared}
    model.train()
    try:
        with training_log(wrapper, config.log_dir, optimizer, **settings):
            with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
                loss = wrapper(**batch).loss
            (loss * (float("nan") if change == "nan" else 1.0)).backward()
            if change == "clamped" and dist.get_rank() == 1:  # what one rank alone sees is an error on all
                with torch.no_grad():
                    next(model.parameters()).clamp_(-0.01, 0.01)
            if change == "clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if change == "other norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=1.0)
            if change == "a part":
                torch.nn.utils.clip_grad_norm_(list(model.parameters())[1:], 1.0)
            optimizer.step(lambda: loss) if change == "closure" else optimizer.step()
            assert change != "adafactor", "its state is found at the first step, not at the next snapshot"
    except LmcError as error:
        return str(error)
    return ""


REFUSED = {
    "plain": "nothing reduces its gradients",
    "bfloat16": "the log needs masters in float32",
    "autocast": "computed under autocast bfloat16, declared is None",
    "nan": "the weights are lost",
    "clipped": "clips gradients to 1.0, declared is no clipping: pass max_grad_norm=1.0",
    "never clipped": "max_grad_norm=1.0 was declared, but nothing clipped",
    "other norm": "other norms cannot be logged",
    "a part": "a part of the gradients was clipped on its own",
    "closure": "runs its passes inside the step",
    "clamped": "step 0: the weights were changed outside the optimizer",
    "adafactor": "Adafactor keeps 'row_var' of shape",
}


def test_loops_that_would_be_logged_wrongly_are_stopped(ranks: Any, tmp_path: Path) -> None:
    for change, message in REFUSED.items():
        for error in ranks(2).run(refusal, tmp_path / change.replace(" ", "-"), change):
            assert message in error, (change, error)


# --- gradients at other points -------------------------------------------------------------------------------------


def gradient_job(engine_name: str, gradient: torch.Tensor) -> float:
    """Relative error of the engine's gradient at θ, taken inside a window; training is not disturbed."""
    model = reference_model("llama-tied", torch.float32)
    if engine_name == "ddp":
        engine, optimizer = wrap("ddp", model)
    else:
        engine, optimizer = zero3_engine(model, partial(torch.optim.SGD, lr=0.1), stage=int(engine_name[-1])), None
    shards = engine_shards(engine, optimizer)
    theta, layout = shards.read(), shards.layout
    expected = shard_of(layout, gradient)
    shards.write(theta * 1.5)
    found = shards.gradient(theta, my_micros(layout.rank, layout.world_size), TokenCrossEntropy())
    shards.verify(theta * 1.5)
    shards.destroy()
    return (found.to(torch.float64) - expected).norm() / expected.norm()


@pytest.mark.parametrize("world_size", [1, 3])
def test_replicated_engines_give_gradients_at_any_point(ranks: Any, world_size: int) -> None:
    numel = sum(p.numel() for p in reference_model("llama-tied").parameters())
    gradient = oracle("llama-tied", torch.zeros(numel, dtype=torch.float64))[0]
    for engine in ("ddp", "zero0", "zero1", "zero2"):
        for error in ranks(world_size).run(gradient_job, engine, gradient):
            assert error < 1e-6, engine


# --- accelerate ----------------------------------------------------------------------------------------------------


def accelerate_job(folder: Path, engine: str) -> tuple[str, str]:
    """A loop as accelerate's documentation writes it; (logged, replayed) checksums."""
    import os

    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    from lmc_dist.data import Collator
    from lmc_dist.training import build_dataset

    config = small_config(folder, GPT2)
    dataset = build_dataset(config)[0]
    extra: dict[str, Any] = {"cpu": True}
    if engine in DEEPSPEED:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        settings = DEEPSPEED[engine] | {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "zero_allow_untested_optimizer": True,
        }
        extra = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)}
    accelerator = Accelerator(
        gradient_accumulation_steps=2, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **extra
    )
    assert accelerator.num_processes == dist.get_world_size() == 2
    model = build_for_replay(config)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=Collator(dataset.pad_token_id))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    logger = TrainingLogger(
        config.log_dir, save_interval=1, loss_normalization="micro_batch_token_mean", max_grad_norm=0.5
    )
    logger.attach(model, optimizer)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    logger.close()
    log = TrajectoryLog(config.log_dir)
    assert log.num_steps == 2 and all(r.clip_coef < 1 for r in log.records())
    assert log.manifest.engine == ("ddp" if engine == "ddp" else f"deepspeed-{engine.split('-')[0]}")
    again = replay_engine(build_for_replay(config), log)
    result = replay(again, log, DatasetBatches(dataset))
    assert result.exact and result.verified == 2
    return str(log.record(1).checksum), checksum(result.theta)


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero2-bf16"])
def test_accelerate_loops_are_replayed_to_the_bit(tmp_path: Path, engine: str) -> None:
    pool = Pool(2)
    try:
        for logged, again in pool.run(accelerate_job, tmp_path, engine):
            assert logged == again
    finally:
        pool.close()
