"""Models of which a part is frozen: read from live engines, logged, corrected, exported whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import model_config
from test_engine_logs import train_lora
from test_zero3 import build_for_replay, small_config, this_runtime, train_job

from lmc_dist.config import Config, ForgetConfig, UnlearnConfig
from lmc_dist.errors import LmcError
from lmc_dist.shards.fingerprint import model_fingerprint
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.trajectory.store import TrajectoryLog


def partly_frozen() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("llama-tied"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    return model


def check_live_engines() -> None:
    """Skeletons and frozen weights of ZeRO-3 and FSDP2 models are those of the whole model."""
    import deepspeed
    from torch.distributed.fsdp import fully_shard

    whole = partly_frozen()
    expected = read_frozen(whole, ShardLayout.of_module(whole))
    assert expected is not None and len(expected.layout) == len(list(whole.parameters())) - 2
    fingerprint = model_fingerprint(skeleton_of(whole))

    fsdp = partly_frozen()
    for block in fsdp.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(fsdp)
    zero = partly_frozen()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    trained = [p for p in zero.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=zero,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        config={**settings, "zero_allow_untested_optimizer": True},
    )
    for module, rule in ((fsdp, "fsdp2"), (engine.module, "zero3")):
        kind = type(module)
        skeleton = skeleton_of(module)
        assert type(module) is kind  # a copy was made, the engine's module is what it was
        assert all(p.is_meta for p in skeleton.parameters()) and not skeleton._forward_pre_hooks
        assert model_fingerprint(skeleton) == fingerprint
        frozen = read_frozen(module, ShardLayout.of_module(module, rule=rule))  # type: ignore[arg-type]
        assert frozen is not None and frozen.norm() == pytest.approx(expected.norm(), rel=1e-12)
        if rule == "zero3":
            assert torch.equal(frozen.flat, expected.flat)
    engine.destroy()


def test_frozen_parts_of_live_engines(ranks: Any) -> None:
    ranks(2).run(check_live_engines)


def unlearn_job(config: Config) -> dict[str, Any]:
    from lmc_dist.unlearn.run import unlearn

    return unlearn(config, this_runtime())


def test_fine_tuning_of_a_part_is_corrected_and_exported_whole(ranks: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, seed=3)
    config = replace(
        config,
        model=replace(config.model, trainable="q_proj|up_proj"),
        output_dir=str(tmp_path / "out"),
        model_dir=str(tmp_path / "model"),
    )
    ranks(2).run(train_job, config)
    log = TrajectoryLog(config.log_dir)
    assert {row["name"].split(".")[-2] for row in log.manifest.parameters} == {"q_proj", "up_proj"}
    ids = log.record(2).sample_ids[:2]
    config = replace(
        config,
        forget=ForgetConfig(samples=",".join(map(str, ids))),
        unlearn=UnlearnConfig(hessian_mode="exact"),
        reference="replay",
        compare="tim,ggn",
    )
    result = ranks(2).run(unlearn_job, config)[0]
    errors = {row["method"]: row["rel_error"] for row in result["rows"]}
    assert errors["exact"] < 0.05 and errors["exact"] < errors["ggn"] < errors["tim"], errors
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rel_error"] == errors["exact"]
    from transformers import AutoModelForCausalLM

    start = dict(build_for_replay(config).named_parameters())
    for folder in (tmp_path / "model", tmp_path / "out" / "model"):
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for name, parameter in loaded.items():
            is_trained = "q_proj" in name or "up_proj" in name
            assert torch.equal(parameter, start[name]) == (not is_trained), name


def lora_job(folder: Path) -> dict[str, float]:
    """LoRA under DDP: trained with a log, corrected in the live engine, written as an adapter; relative errors of v."""
    import torch.distributed as dist
    from peft import PeftModel

    from lmc_dist import run_lmcleaner_sample_unlearning
    from lmc_dist.shards.checksum import checksum
    from lmc_dist.trajectory.batches import DatasetBatches
    from lmc_dist.trajectory.replay import replay, replay_engine
    from lmc_dist.unlearn.request import make_request

    config = small_config(folder)
    config = replace(config, train=replace(config.train, engine="ddp"))
    shards, fresh, dataset = train_lora(config, ["q_proj", "up_proj"], steps=6, interval=3)
    log = TrajectoryLog(config.log_dir)
    theta, forgotten = log.theta(log.num_steps), log.record(1).sample_ids[:2]
    engine = replay_engine(fresh(), log)
    batches = DatasetBatches(dataset)
    retrained = replay(engine, log, batches, make_request(sample_ids=forgotten)).theta
    engine.destroy()
    errors = {}
    for mode in ("none", "exact"):
        is_last = mode == "exact"
        found = run_lmcleaner_sample_unlearning(
            shards,
            config.log_dir,
            forgotten,
            hessian_mode=mode,
            dataset=dataset,
            output_dir=str(folder / "out") if is_last else None,
            apply_immediately=is_last,
        )
        errors[mode] = (theta + found.v - retrained).norm() / (theta - retrained).norm()
    corrected = shards.read()
    assert checksum(corrected) == checksum(theta + found.v)
    adapted = PeftModel.from_pretrained(build_for_replay(config), folder / "out" / "model")
    loaded = dict(adapted.named_parameters())
    for slot in corrected.layout:
        whole = loaded[slot.spec.name].detach().reshape(-1)
        assert torch.equal(whole[slot.start : slot.end], corrected[slot.spec.name])
    dist.barrier()
    return errors


def test_lora_is_corrected_live_and_written_as_an_adapter(ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    errors = ranks(2).run(lora_job, tmp_path)[0]
    assert errors["exact"] < 0.05 and errors["exact"] < errors["none"], errors


def test_a_pattern_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    for pattern, message in (("lora_", "finds no parameter"), ("(", "no regular expression")):
        with pytest.raises(LmcError, match=message):
            build_for_replay(replace(config, model=replace(config.model, trainable=pattern)))
