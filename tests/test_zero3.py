"""Logger, replay, reference and apply under native DeepSpeed ZeRO-3, on real ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import model_config

from lmc_dist.config import Config, DataConfig, ForgetConfig, LogConfig, ModelConfig, TrainConfig
from lmc_dist.errors import LmcError
from lmc_dist.runtime import Runtime
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 96}


def small_config(folder: Path, model: dict[str, Any] = LLAMA, **train: Any) -> Config:
    """24 invented samples in batches of 7, 7, 7 and 3, two epochs; at 2 ranks two passes a step, some of them empty."""
    settings = {"epochs": 2, "batch_size": 7, "micro_batch_size": 2, "learning_rate": 0.2, "weight_decay": 0.01}
    return Config(
        data=DataConfig(people=4, facts_per_person=6, max_length=96),
        model=ModelConfig(config=model, vocab_size=300, dropout=0.1 if model is GPT2 else None),
        train=TrainConfig(**{**settings, **train}),  # type: ignore[arg-type]
        log=LogConfig(save_interval=3),
        log_dir=str(folder / "log"),
    )


def this_runtime() -> Runtime:
    return Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def train_job(config: Config) -> dict[str, Any]:
    from lmc_dist.training import Trainer

    trainer = Trainer(config, this_runtime())
    summary = trainer.run()
    trainer.engine.destroy()
    return summary


def build_for_replay(config: Config) -> torch.nn.Module:
    from lmc_dist.training import build_config, build_model, build_tokenizer

    return build_model(config.model, build_config(config.model, build_tokenizer(config)), config.train.seed)


def engine_for(config: Config) -> tuple[Any, Any]:
    """(engine with the weights of the configuration's model, its dataset)."""
    from lmc_dist.training import build_dataset, build_engine

    return build_engine(build_for_replay(config), config.train, dist.get_world_size()), build_dataset(config)[0]


# --- shards of a live engine ---------------------------------------------------------------------------------------


def check_shards(folder: Path) -> None:
    import deepspeed
    from transformers import AutoModelForCausalLM

    from lmc_dist.shards.checkpoint import write_checkpoint

    for kind in ("llama-tied", "gpt2-untied"):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(model_config(kind))
        original = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # A threshold that makes some parameters persistent, and sub-groups of a few parameters each.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 20, "sub_group_size": 300}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        shards = engine_shards(engine)
        assert any(p.ds_persist for p in shards.parameters.values())
        assert not all(p.ds_persist for p in shards.parameters.values())
        assert len(shards.optimizer.fp32_partitioned_groups_flat) > 1
        expected = ShardedVector.from_full(shards.layout, original.__getitem__)
        for slot in shards.layout:
            parameter = shards.parameters[slot.spec.name]
            assert slot.padded == parameter.partition_numel()
            assert tuple(parameter.ds_shape) == slot.spec.shape
        assert checksum(shards.read()) == checksum(expected) == checksum(shards.working())

        changed = expected * 1.5
        changed.flat[changed.flat != 0] += 0.25
        shards.write(changed)
        assert shards.verify(changed) == checksum(changed)
        for name, parameter in shards.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                start, end = shards.layout.slots[name].start, shards.layout.slots[name].end
                assert torch.equal(parameter.detach().reshape(-1)[start:end], changed[name])
        target = folder / f"{kind}-{dist.get_world_size()}"
        if dist.get_rank() == 0:
            target.mkdir()
            model_config(kind).save_pretrained(target)
        dist.barrier()
        for size in (5 * 2**30, 2000):  # one file, then many with an index
            written = write_checkpoint(target, changed, dict.fromkeys(shards.layout.slots, torch.float32), size)
            assert written == checksum(changed)
            loaded = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
            assert checksum(ShardedVector.from_full(shards.layout, loaded.__getitem__)) == written
            dist.barrier()
            if dist.get_rank() == 0:
                for file in target.glob("model*"):
                    file.unlink()
            dist.barrier()
        engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_engine_shards_masters_working_copies_and_export_agree(ranks: Any, tmp_path: Path, world_size: int) -> None:
    ranks(world_size).run(check_shards, tmp_path)


# --- logging, replay, reference ------------------------------------------------------------------------------------


def replay_job(config: Config, counterfactual: Counterfactual | None) -> tuple[str, int, int, bool]:
    """(checksum of θ after replay, gradients, verified steps, whether exact)."""
    from lmc_dist.training import build_dataset

    log = TrajectoryLog(config.log_dir)
    engine = replay_engine(build_for_replay(config), log)
    result = replay(engine, log, DatasetBatches(build_dataset(config)[0]), counterfactual)
    engine.destroy()
    return checksum(result.theta), result.steps, result.verified, result.exact


def distance_job(log_a: str, log_b: str) -> float:
    """Relative distance of the final weights of two logs."""
    a, b = TrajectoryLog(log_a), TrajectoryLog(log_b)
    theta = a.theta(a.num_steps)
    return (theta - b.theta(b.num_steps)).norm() / theta.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replay_repeats_training_to_the_bit(ranks: Any, tmp_path: Path, optimizer: str) -> None:
    """ZeRO-3 on 2 ranks, dropout on, accumulation 2, short last batches."""
    config = small_config(tmp_path, GPT2, optimizer=optimizer, max_grad_norm=1.0, learning_rate=0.05)
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    assert log.num_steps == 8
    assert {m.micro_step for r in log.records() for m in r.micro_batches} == {0, 1}
    assert any(not m.sample_ids for r in log.records() for m in r.micro_batches)
    assert all(m.random_state for m in log.record(0).micro_batches)
    final = log.record(7).checksum
    assert ranks(2).run(replay_job, config, None) == [(final, 8, 8, True)] * 2
    # from a later snapshot, with the optimizer state it holds
    late = Counterfactual("skip", batch_ids=frozenset({7}))
    checksum_7, steps, verified, _ = ranks(2).run(replay_job, config, late)[0]
    assert (checksum_7, steps, verified) == (log.record(6).checksum, 1, 1)
    # a request whose first step is a snapshot starts one snapshot earlier, so that something is verified
    at_snapshot = Counterfactual("skip", batch_ids=frozenset({6}))
    _, steps, verified, _ = ranks(2).run(replay_job, config, at_snapshot)[0]
    assert (steps, verified) == (4, 3)


def plain_loop_job(folder: Path, by_hand: bool) -> tuple[str, str]:
    """A hand-written DeepSpeed loop whose loss is the plain mean over micro-batches; (logged, replayed) checksums."""
    import deepspeed

    from lmc_dist import TrainingLogger
    from lmc_dist.data import collate
    from lmc_dist.training import build_dataset
    from lmc_dist.trajectory.callback import training_log

    config = small_config(folder)
    dataset = build_dataset(config)[0]
    model = build_for_replay(config)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    mine = dataset.ids[dist.get_rank() :: 2]

    def batches() -> Any:
        for i in range(0, len(mine), 2):
            yield i // 2, collate(dataset.by_id(mine[i : i + 2]), dataset.pad_token_id)

    log_dir = str(folder / "log")
    if by_hand:
        logger = TrainingLogger(log_dir, save_interval=2, loss_normalization="micro_batch_token_mean")
        engine.train()
        logger.attach(engine, automatic=False)
        seen: list[list[int]] = []
        for i, batch in batches():
            seen.append(batch.pop("index").tolist())
            engine.backward(engine(**batch).loss)
            engine.step()
            if i % 2:
                logger.register_step(i // 2, 100 + i // 2, 0.2, engine, batch_data={"sample_ids": seen})
                seen = []
        logger.close()
    else:
        engine.train()
        with training_log(engine, log_dir, save_interval=2, loss_normalization="micro_batch_token_mean"):
            for _, batch in batches():
                engine.backward(engine(**batch).loss)
                engine.step()
    log = TrajectoryLog(log_dir)
    engine = replay_engine(model=build_for_replay(config), log=log)
    result = replay(engine, log, DatasetBatches(dataset))
    assert result.verified == log.num_steps == 3
    assert log.record(1).batch_id == (101 if by_hand else 1)
    return str(log.record(2).checksum), checksum(result.theta)


@pytest.mark.parametrize("by_hand", [False, True])
def test_hand_written_loop_with_mean_of_means_is_replayed_to_the_bit(ranks: Any, tmp_path: Path, by_hand: bool) -> None:
    for logged, replayed in ranks(2).run(plain_loop_job, tmp_path, by_hand):
        assert logged == replayed
    log = TrajectoryLog(tmp_path / "log")
    assert sorted(i for r in log.records() for i in r.sample_ids) == sorted(
        p * 100 + f for p in range(4) for f in range(6)
    )


def requests(log: TrajectoryLog) -> dict[str, Counterfactual]:
    middle = log.record(2).sample_ids
    return {
        "zero": Counterfactual("zero", sample_ids=frozenset(middle[:2])),
        "renormalize": Counterfactual("renormalize", sample_ids=frozenset(middle[:4])),
        "skip": Counterfactual("skip", batch_ids=frozenset({2, 5})),
        "whole batch, renormalize": Counterfactual("renormalize", sample_ids=frozenset(log.record(3).sample_ids)),
    }


def forget_config(config: Config, request: Counterfactual, log_dir: Path) -> Config:
    ids = ",".join(map(str, sorted(request.sample_ids or request.batch_ids)))
    forget = ForgetConfig(
        samples=ids if request.sample_ids else None,
        batches=ids if request.batch_ids else None,
        counterfactual=request.kind,
    )
    return replace(config, forget=forget, log_dir=str(log_dir), log=LogConfig("replay", None))


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2, dropout"])
def test_replay_and_retraining_agree_to_the_bit(ranks: Any, tmp_path: Path, model: dict[str, Any]) -> None:
    config = small_config(tmp_path, model)
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    for i, (name, request) in enumerate(requests(log).items()):
        retrained = forget_config(config, request, tmp_path / f"retrain-{i}")
        ranks(2).run(train_job, retrained)
        reference = TrajectoryLog(retrained.log_dir)
        forgotten = {r.step for r in log.records() if request.touches(r)}
        assert not any(request.touches(r) for r in reference.records() if r.micro_batches), name
        assert {r.step for r in reference.records() if not r.applied} == (
            forgotten if request.kind == "skip" else {3} if name.startswith("whole") else set()
        )
        expected = reference.record(7).checksum
        assert expected != log.record(7).checksum
        assert [r[0] for r in ranks(2).run(replay_job, config, request)] == [expected] * 2, name


def test_other_world_sizes_differ_by_rounding_only(ranks: Any, tmp_path: Path) -> None:
    logs = {}
    for world_size in (1, 2, 3):
        config = small_config(tmp_path / str(world_size))
        ranks(world_size).run(train_job, config)
        logs[world_size] = config.log_dir
    for world_size in (1, 3):
        assert ranks(2).run(distance_job, logs[2], logs[world_size])[0] <= 1e-6
    config = small_config(tmp_path / "2")
    request = requests(TrajectoryLog(logs[2]))["renormalize"]
    retrained = forget_config(config, request, tmp_path / "retrain")
    ranks(2).run(train_job, retrained)
    for world_size in (1, 3):
        close = ranks(world_size).run(replay_distance_job, config, request, retrained.log_dir)[0]
        assert close <= 1e-5


def replay_distance_job(config: Config, request: Counterfactual, reference: str) -> float:
    engine, dataset = engine_for(config)
    result = replay(engine, TrajectoryLog(config.log_dir), DatasetBatches(dataset), request)
    engine.destroy()
    assert not result.exact
    log = TrajectoryLog(reference)
    expected = log.theta(log.num_steps)
    return (result.theta - expected).norm() / expected.norm()


def update_from_record_job(config: Config) -> float:
    """Largest relative difference of −u_s/η − wθ_s from the gradient regenerated by the product engine's model."""
    from lmc_dist.curvature import TokenCrossEntropy
    from lmc_dist.curvature.products import weighted_gradient
    from lmc_dist.shards.module import ShardedModule, build_skeleton
    from lmc_dist.training import build_config, build_dataset
    from lmc_dist.trajectory.counterfactual import edit_step
    from lmc_dist.unlearn.source import micro_batches

    log = TrajectoryLog(config.log_dir)
    dataset, tokenizer = build_dataset(config)
    module = ShardedModule(build_skeleton(build_config(config.model, tokenizer)), log.layout)
    batches, worst = DatasetBatches(dataset), 0.0
    for step in range(log.num_steps):
        record, theta = log.record(step), log.theta(step)
        edited = edit_step(record, None, "global_token_mean", batches.num_targets)
        gradient = weighted_gradient(module, TokenCrossEntropy(), theta, micro_batches(edited, batches, module, "kept"))
        expected = log.update(step) * (-1 / record.lr[0])
        for row in log.manifest.parameters:
            decay = log.manifest.optimizer["groups"][row["group"]]["weight_decay"]
            expected[row["name"]].sub_(decay * theta[row["name"]])
        worst = max(worst, (gradient - expected).norm() / expected.norm())
    return worst


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2, dropout"])
def test_records_reproduce_the_updates(ranks: Any, tmp_path: Path, model: dict[str, Any]) -> None:
    """Ids, denominators, dropout masks, groups and learning rates together: u_s = −η (∇L + wθ), at 2 and 3 ranks."""
    config = small_config(tmp_path, model, weight_decay=0.1)
    ranks(2).run(train_job, config)
    for world_size in (2, 3):
        assert ranks(world_size).run(update_from_record_job, config)[0] < 1e-4


def wrong_scale_job(config: Config) -> str:
    """A loop that divides by the global tokens but lets DeepSpeed average: the log must not believe it."""
    import deepspeed

    from lmc_dist.data import collate
    from lmc_dist.training import build_dataset
    from lmc_dist.trajectory.callback import training_log

    dataset = build_dataset(config)[0]
    model = build_for_replay(config)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    settings["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.train()
    ids = dataset.ids[:4]
    batch = collate(dataset.by_id(ids[2 * dist.get_rank() :][:2]), dataset.pad_token_id)
    total = torch.tensor(float(sum(dataset.num_targets(i) for i in ids)))
    try:
        with training_log(engine, config.log_dir):
            engine.backward(engine(**batch, num_items_in_batch=total).loss)
            engine.step()
    except LmcError as error:
        return str(error)
    return ""


def test_a_loss_scaled_otherwise_than_declared_stops_training(ranks: Any, tmp_path: Path) -> None:
    for error in ranks(2).run(wrong_scale_job, small_config(tmp_path)):
        assert "entered the gradient multiplied by 1, its normalisation needs 2" in error


# --- the log itself ------------------------------------------------------------------------------------------------


def thetas_job(log_dir: str) -> list[str]:
    """Checksums of every θ_s, each followed from its nearest snapshot at this world size."""
    log = TrajectoryLog(log_dir)
    for step in range(log.num_steps):
        record, u = log.record(step), log.update(step)
        assert abs(u.norm() - (record.u_norm or 0.0)) <= 1e-5 * (record.u_norm or 1.0)
    return [checksum(log.theta(step)) for step in range(log.num_steps + 1)]


def test_log_is_complete_and_reads_the_same_at_any_world_size(ranks: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule="linear", warmup_steps=3)
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    ids = sorted(i for r in log.records() for i in r.sample_ids)
    dataset = sorted(p * 100 + f for p in range(4) for f in range(6))
    assert ids == sorted(dataset * 2)
    assert [len(r.sample_ids) for r in log.records()] == [7, 7, 7, 3] * 2
    for record in log.records():
        seen = [set(m.sample_ids) for m in record.micro_batches if m.sample_ids]
        assert len(set().union(*seen)) == sum(map(len, seen))  # the ranks saw different samples
        assert {m.denominator for m in record.micro_batches} == {record.denominator}
        assert all(m.random_state is None for m in record.micro_batches)  # no dropout, no random state
    # linear warm-up over 3 steps, then linear decay to 0 at step 8: the rate each step used, not the next one
    expected = [0.2 * min(s / 3, (8 - s) / 5) for s in range(8)]
    assert [r.lr[0] for r in log.records()] == pytest.approx(expected)
    assert log.record(0).u_norm == 0 and log.record(1).u_norm
    assert log.snapshots == [0, 3, 6, 8]
    manifest = json.loads((Path(config.log_dir) / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["engine"] == "deepspeed-zero3"
    expected_checksums = [checksum_of_start(log)] + [r.checksum for r in log.records()]
    for world_size in (1, 2, 3, 4):
        assert ranks(world_size).run(thetas_job, config.log_dir) == [expected_checksums] * world_size


def checksum_of_start(log: TrajectoryLog) -> str:
    return json.loads((log.path / "snapshots" / "step-0" / "meta.json").read_text())["checksum"]


def test_ring_deletes_what_falls_out_and_says_so(ranks: Any, tmp_path: Path) -> None:
    config = replace(small_config(tmp_path), log=LogConfig(save_interval=2, max_steps=3))
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    assert log.first_step == 4 and log.num_steps == 8
    assert sorted(p.name for p in (log.path / "steps").iterdir()) == [f"step-{s:08d}" for s in range(4, 8)]
    log.require(4)
    with pytest.raises(LmcError, match=r"step 1 fell out of the ring .* steps 4 to 7 remain .*larger max_steps"):
        log.require(1)
    assert len(log.record(0).sample_ids) == 7  # ids stay: they say what was lost


def test_replay_storage_has_no_updates_to_propagate(ranks: Any, tmp_path: Path) -> None:
    config = replace(small_config(tmp_path), log=LogConfig("replay", None))
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    assert not list((log.path / "steps").iterdir())
    log.require(0, updates=False)
    with pytest.raises(LmcError, match="keeps no updates"):
        log.require(0)


# --- apply ---------------------------------------------------------------------------------------------------------


def apply_job(config: Config, output: Path) -> tuple[float, str]:
    """Live engine at θ_τ → unlearn → engine, checkpoint and θ + v agree."""
    from transformers import AutoModelForCausalLM

    from lmc_dist import run_lmcleaner_sample_unlearning
    from lmc_dist.unlearn.correction import load_correction

    engine, dataset = engine_for(config)
    log = TrajectoryLog(config.log_dir)
    theta = log.theta(log.num_steps)
    with pytest.raises(LmcError, match="do not hold"):  # the engine is not at θ_τ yet
        run_lmcleaner_sample_unlearning(engine, config.log_dir, [3, 101], dataset=dataset)
    shards = engine_shards(engine)
    shards.write(theta)
    correction = run_lmcleaner_sample_unlearning(
        engine, config.log_dir, [3, 101], output_dir=str(output), dataset=dataset
    )
    expected = theta + correction.v
    assert correction.v.norm() > 0
    assert shards.verify(expected) == checksum(expected)
    assert checksum(load_correction(output / "correction", log.layout, theta)) == checksum(correction.v)
    exported = dict(AutoModelForCausalLM.from_pretrained(output / "model").named_parameters())
    assert checksum(ShardedVector.from_full(log.layout, exported.__getitem__)) == checksum(expected)
    engine.destroy()
    return correction.v.norm(), checksum(expected)


def test_correction_reaches_live_engine_and_checkpoint(ranks: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    ranks(2).run(train_job, config)
    results = ranks(2).run(apply_job, config, tmp_path / "out")
    assert results[0] == results[1]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "done" and result["model_checksum"] == results[0][1]
    (record,) = json.loads((tmp_path / "out" / "audit" / "audit_records.json").read_text())
    assert record["v_norm"] == pytest.approx(results[0][0])
    fields = "unit tz tau K_used v_norm v0_norm hvp_calls mode damping counterfactual replay_head stopped_by seconds"
    assert set(record) == {*fields.split(), "growth_max", "missed", "head_error", "update"}
    assert not (tmp_path / "out.part").exists()
