"""Models whose weights come one parameter at a time: the same as transformers loads, under every engine, and never whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import model_config
from measure import LiveBytes
from test_engine_logs import DEEPSPEED, engine_config
from test_zero3 import this_runtime, train_job

from lmc_dist.config import Config, DataConfig, ForgetConfig, ModelConfig, UnlearnConfig
from lmc_dist.errors import LmcError
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.engines.build import build_engine
from lmc_dist.shards.engines.loading import load_whole
from lmc_dist.shards.frozen import read_frozen
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.module import build_skeleton
from lmc_dist.shards.pretrained import CheckpointWeights
from lmc_dist.shards.unloaded import Unloaded, trained_later, zeros
from lmc_dist.training import freeze, open_model

KINDS = ["llama-tied", "llama-untied", "gpt2-tied", "qwen3-untied", "gemma-tied", "mistral-untied"]


def checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Any:
    """Writes a fresh model as transformers does; its config as read back."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(model_config(kind), dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return AutoConfig.from_pretrained(folder)


def loaded(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_by_name_are_those_that_transformers_loads(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = checkpoint(tmp_path, kind, dtype, shard="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = open_model(ModelConfig(path=str(tmp_path)), config, seed=0)
    assert isinstance(model, Unloaded)
    expected = loaded(tmp_path, config)
    assert model.module.generation_config.to_dict() == expected.generation_config.to_dict()
    names = [name for name, _ in expected.named_parameters()]
    assert names == [name for name, _ in model.module.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.weights(name).float(), parameter), name
        assert model.module.get_parameter(name).dtype == torch.float32
    for (name, buffer), (other, found) in zip(expected.named_buffers(), model.module.named_buffers(), strict=True):
        assert name == other and torch.equal(buffer, found)


def test_what_transformers_converts_is_left_to_it(tmp_path: Path) -> None:
    import transformers

    small = {"vocab_size": 29, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    for kind, config in (
        ("neox", transformers.GPTNeoXConfig(**small)),
        ("mixtral", transformers.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2)),
        ("base", model_config("gpt2-tied")),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config)
        (model.base_model if kind == "base" else model).save_pretrained(tmp_path / kind)
        found = transformers.AutoConfig.from_pretrained(tmp_path / kind)
        opened: Any = open_model(ModelConfig(path=str(tmp_path / kind)), found, seed=0)
        assert isinstance(opened, torch.nn.Module), kind
        expected = loaded(tmp_path / kind, found).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items()), kind
    config = checkpoint(tmp_path / "none", "llama-tied")
    (tmp_path / "none" / "model.safetensors").rename(tmp_path / "none" / "else.safetensors")
    assert "has no model.safetensors" in CheckpointWeights(tmp_path / "none", build_skeleton(config)).why_not


def hub_job(folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained("some/model")
    model = open_model(ModelConfig(path="some/model"), config, seed=0)
    assert isinstance(model, Unloaded)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.weights(name), parameter), name
    with pytest.raises(OSError, match="some/other"):
        open_model(ModelConfig(path="some/other"), config, seed=0)


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    """The hub is not reached here: its cache is laid out by hand, and everything is told to be offline."""
    cache = tmp_path / "hub" / "models--some--model"
    folder = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    checkpoint(folder, "llama-tied", shard="4KB")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(folder.name)
    code = f"import test_unloaded; test_unloaded.hub_job({str(folder)!r})"
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    config = checkpoint(tmp_path, "llama-untied", shard="4KB")
    skeleton, index = build_skeleton(config), tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text("{}")
    with pytest.raises(LmcError, match=r"index\.json is damaged: it has no weight_map"):
        CheckpointWeights(tmp_path, skeleton)
    found = json.loads(text)
    files = sorted(set(found["weight_map"].values()))
    name = next(n for n, file in found["weight_map"].items() if file == files[0])
    found["weight_map"][name] = files[1]
    index.write_text(json.dumps(found))
    with pytest.raises(LmcError, match=f"{files[1]} lacks {name}"):
        CheckpointWeights(tmp_path, skeleton)
    index.write_text(text)
    (tmp_path / files[0]).write_bytes(b"nothing")
    with pytest.raises(LmcError, match=f"cannot read .*{files[0]}"):
        CheckpointWeights(tmp_path, skeleton)


# --- under engines -----------------------------------------------------------------------------------------------------

PIECES = ["zero3", "zero3-bf16", "fsdp2", "hsdp-2"]
WHOLE = ["zero1", "zero2", "ddp"]


def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


def deepspeed_settings(name: str) -> dict[str, Any]:
    """{} for engines of torch."""
    plain = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
    }
    return deepcopy(DEEPSPEED[name]) | plain if name in DEEPSPEED else {}


def engines_job(folder: Path, names: list[str]) -> dict[str, bool]:
    """Whether an engine of weights by name has the bits of one that was given the whole model, frozen ones too."""
    from transformers import AutoConfig

    config, found = AutoConfig.from_pretrained(folder), {}
    for name in names:
        settings = deepspeed_settings(name)
        for trainable in (None, "layers.1|norm"):
            whole: Any = loaded(folder, config)
            freeze(whole, trainable)
            model = open_model(ModelConfig(path=str(folder), trainable=trainable), config, seed=0)
            assert isinstance(model, Unloaded)
            engines = [build_engine("deepspeed" if settings else name, m, sgd, settings) for m in (whole, model)]
            (a, b) = [engine_shards(engine) for engine in engines]
            same = torch.equal(a.read().flat, b.read().flat)
            frozen = [read_frozen(shards.module, shards.layout) for shards in (a, b)]
            assert (frozen[0] is None) == (trainable is None)
            if frozen[0] is not None:
                same = same and torch.equal(frozen[0].flat, frozen[1].flat)
            found[f"{name} {trainable}"] = same
            for shards in (a, b):
                shards.destroy()
    return found


def test_engines_take_the_weights_of_a_checkpoint(ranks: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama-tied", torch.bfloat16)
    for found in ranks(2).run(engines_job, tmp_path, [*PIECES, *WHOLE]):
        assert len(found) == 14 and all(found.values()), found
    for found in ranks(3).run(engines_job, tmp_path, ["zero3", "fsdp2"]):
        assert len(found) == 4 and all(found.values()), found


def another_job(folder: Path) -> None:
    """A second model beside one that ZeRO-3 has partitioned: frozen weights gathered one at a time, trained ones empty."""
    from deepspeed import zero
    from transformers import AutoConfig

    from lmc_dist.trainers.weights import another

    whole, module = (loaded(folder, AutoConfig.from_pretrained(folder)) for _ in range(2))
    for model in (whole, module):
        freeze(model, "layers.1")
    zero.Init(module=module, config_dict_or_path=deepspeed_settings("zero3"))
    second = load_whole(another(module))
    assert [name for name, _ in second.named_parameters()] == [name for name, _ in whole.named_parameters()]
    for name, parameter in second.named_parameters():
        expected = whole.get_parameter(name)
        assert parameter.requires_grad == expected.requires_grad
        assert torch.equal(parameter, torch.zeros_like(expected) if expected.requires_grad else expected), name
    assert second.lm_head.weight is second.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_second_model_beside_a_partitioned_one(ranks: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama-tied")
    ranks(2).run(another_job, tmp_path)


def peaks_job(names: list[str]) -> dict[str, tuple[int, int, int]]:
    """(peak of live bytes while the engine is built, the model's, the largest parameter's), of each engine."""
    found = {}
    for name in names:
        model = build_skeleton(model_config("llama-untied", num_hidden_layers=24))
        sizes = [4 * p.numel() for p in model.parameters()]
        settings = deepspeed_settings(name)
        if settings:  # its buckets are of fixed sizes, 2 GB unless told otherwise
            settings["zero_optimization"] |= {"reduce_bucket_size": max(sizes) // 4, "stage3_prefetch_bucket_size": 0}
        with LiveBytes() as live:
            engine = build_engine("deepspeed" if settings else name, Unloaded(model, zeros(model)), sgd, settings)
        found[name] = (live.peak, sum(sizes), max(sizes))
        engine_shards(engine).destroy()
    return found


def test_no_rank_holds_the_model(ranks: Any) -> None:
    for found in ranks(4).run(peaks_job, ["zero3", "fsdp2"]):
        print(found)
        for name, (peak, whole, largest) in found.items():
            copies = 3 if name == "zero3" else 1  # DeepSpeed: the parts, their flat buffer, the masters
            assert peak <= copies * whole / 4 + 4 * largest, (name, found)


def test_frozen_weights_are_read_by_shards(tmp_path: Path) -> None:
    config = checkpoint(tmp_path, "llama-untied")
    model = open_model(ModelConfig(path=str(tmp_path), trainable="layers.1"), config, seed=0)
    whole = loaded(tmp_path, config)
    freeze(whole, "layers.1")
    for rank in range(3):
        trained = [ParamSpec(name, tuple(p.shape)) for name, p in whole.named_parameters() if p.requires_grad]
        like = ShardLayout(trained, rank, 3)
        found, expected = read_frozen(model, like), read_frozen(whole, like)
        assert found is not None and expected is not None and torch.equal(found.flat, expected.flat)


def test_trained_weights_are_left_empty(tmp_path: Path) -> None:
    whole = loaded(tmp_path, checkpoint(tmp_path, "llama-untied"))
    freeze(whole, "layers.1")
    weights = trained_later(whole, lambda name: whole.get_parameter(name))
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights(name), torch.zeros_like(parameter) if parameter.requires_grad else parameter)
    assert not zeros(whole)("lm_head.weight").any()


# --- from end to end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_checkpoint_published_in_bfloat16(ranks: Any, test_data: Path, tmp_path: Path, engine: str) -> None:
    """Its config says bfloat16; training is in float32, and so is replay."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    source, folder = test_data / "models" / "stories260K", tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    for file in source.glob("token*"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0.5, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))  # which transformers would not save
    config = engine_config(tmp_path, engine)
    config = replace(
        config,
        data=DataConfig(people=3, max_length=96),
        model=ModelConfig(path=str(folder)),
        forget=ForgetConfig(samples="1"),
        unlearn=UnlearnConfig(replay_head="all"),
        reference="retrain",
        output_dir=str(tmp_path / "clean"),
        progress="none",
    )
    ranks(2).run(train_job, replace(config, forget=ForgetConfig(), model_dir=str(tmp_path / "trained")))
    result = ranks(2).run(run_unlearn, config)[0]
    assert result["rel_error"] == 0, result
    for written in (tmp_path / "trained", tmp_path / "clean" / "model"):
        found = GenerationConfig.from_pretrained(written)
        assert (found.temperature, found.max_new_tokens) == (0.5, 7)


def run_unlearn(config: Config) -> dict[str, Any]:
    from lmc_dist.unlearn.run import unlearn

    result = unlearn(config, this_runtime())
    dist.barrier()
    return result
