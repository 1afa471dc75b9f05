"""Models as a training script has set them up: its attention kernel, its autocast, its matrix precision, its process group."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import Forks
from test_engine_logs import engine_config
from test_zero3 import train_job
from transformers import BloomConfig

from lmc_dist import run_lmcleaner_sample_unlearning
from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.torch_loop import counter_device
from lmc_dist.shards.frozen import skeleton_of
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.precision import float32_matmuls, matmul_precision
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

MODES = ("GGN", "exact", "fd", "secant")


def llama(attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def batch(rows: int, padding: int) -> MicroBatch:
    ids = torch.randint(0, 97, (rows, 16), generator=torch.Generator().manual_seed(rows))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padding:
        mask[-1, -padding:], labels[-1, -padding:] = 0, -100
    return MicroBatch({"input_ids": ids, "attention_mask": mask}, labels, torch.full((rows,), 1 / 60))


def products(live: Any, values: Any, micro: MicroBatch) -> dict[str, torch.Tensor]:
    """C v by mode, of a live model's skeleton at another one's weights."""
    skeleton = skeleton_of(live)
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.from_full(layout, values.get_parameter)
    v = theta.like(torch.randn(layout.flat_numel, generator=torch.Generator().manual_seed(1)))
    module = ShardedModule(skeleton, layout)
    return {mode: hvp_apply(v, HVPConfig(mode), module, TokenCrossEntropy(), theta, [micro]).flat for mode in MODES}


@pytest.fixture
def flash() -> str:
    """A kernel like flash attention's, of masks its own, and not for float32. (Names with `flash` are looked up in a hub.)"""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def refuse(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"only fp16 and bf16, not {query.dtype}")

    AttentionInterface.register("unlike_others", refuse)
    AttentionMaskInterface.register("unlike_others", flash_attention_mask)
    return "unlike_others"


@pytest.mark.parametrize(("rows", "padding"), [(4, 5), (16, 5), (3, 0)])
def test_products_of_a_model_with_flash_attention(flash: str, rows: int, padding: int) -> None:
    """16 rows of 16 tokens: a mask of padding alone would fit, and be wrong."""
    micro, values = batch(rows, padding), llama()
    expected, found = products(values, values, micro), products(llama(flash), values, micro)
    for mode in MODES:
        assert torch.equal(found[mode], expected[mode]), mode


def test_products_of_a_model_under_accelerates_autocast() -> None:
    from accelerate import Accelerator

    micro, values, live = batch(4, 5), llama(), llama()
    expected = products(values, values, micro)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(live)
    inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)
    assert hasattr(inner, "_original_forward")
    with torch.autocast("cpu", torch.bfloat16):
        found = products(inner, values, micro)
    for mode in MODES:
        assert torch.equal(found[mode], expected[mode]), mode
    assert hasattr(inner, "_original_forward")  # the live one keeps its own


def test_the_attention_kernel_is_logged_and_used_again(ranks: Any, tmp_path: Path) -> None:
    from lmc_dist.logged_run import logged_skeleton, starting_model
    from lmc_dist.training import build_config, build_dataset

    config = engine_config(tmp_path, "single", "update")
    eager = replace(config, model=replace(config.model, attn_implementation="eager"))
    ranks(1).run(train_job, eager)
    log = TrajectoryLog(config.log_dir)
    assert log.manifest.run["attention"] == "eager" and config.model.attn_implementation is None
    dataset, tokenizer = build_dataset(config)
    for given, used in (
        (config, "eager"),
        (replace(config, model=replace(config.model, attn_implementation="sdpa")), "sdpa"),
    ):
        model_config = build_config(given.model, tokenizer)
        model = starting_model(given, model_config, log)
        assert isinstance(model, Unloaded) and model.module.config._attn_implementation == used
        skeleton = logged_skeleton(given, model_config, log, "cpu")
        assert skeleton.config._attn_implementation == used  # type: ignore[union-attr]
        if used == "eager":
            assert replay(replay_engine(model, log), log, DatasetBatches(dataset)).exact
            continue
        with pytest.raises(LmcError, match=r"model\.attn_implementation"):
            replay(replay_engine(model, log), log, DatasetBatches(dataset))


def test_a_kernel_that_a_model_lacks_is_named_with_the_setting() -> None:
    with pytest.raises(LmcError, match=r"Bloom.*: choose another kernel, --model\.attn_implementation eager"):
        build_skeleton(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20))
    skeleton = build_skeleton(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20), "cpu", None)
    assert skeleton.config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


class Noting:
    """Batches that note the precision in which they are asked for."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.seen = batches, set[str]()

    def inputs(self, ids: Sequence[int]) -> Any:
        self.seen.add(matmul_precision())
        return self.batches.inputs(ids)

    def num_targets(self, ids: Sequence[int]) -> list[int]:
        return self.batches.num_targets(ids)

    def unknown(self, ids: Any) -> list[int]:
        return self.batches.unknown(ids)


def test_training_in_tf32_is_logged_and_repeated_so(tf32: None, ranks: Any, tmp_path: Path) -> None:
    from test_zero3 import build_for_replay

    from lmc_dist.training import build_dataset

    config = engine_config(tmp_path, "single", "update")
    ranks(1).run(train_in_tf32, config)
    log = TrajectoryLog(config.log_dir)
    assert log.manifest.run["matmul"] == "tf32"
    torch.set_float32_matmul_precision("highest")
    batches = Noting(DatasetBatches(build_dataset(config)[0]))
    replay(replay_engine(build_for_replay(config), log), log, batches)
    assert batches.seen == {"tf32"} and matmul_precision() == "ieee"


def train_in_tf32(config: Any) -> None:
    with float32_matmuls("tf32"):
        train_job(config)


def test_products_are_in_float32_whatever_training_has_turned_on(tf32: None) -> None:
    class Watched(TokenCrossEntropy):
        def outputs(self, model_output: Any) -> torch.Tensor:
            seen.add(matmul_precision())
            return super().outputs(model_output)

    seen: set[str] = set()
    skeleton = skeleton_of(model := llama())
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.from_full(layout, model.get_parameter)
    hvp_apply(theta, HVPConfig("GGN"), ShardedModule(skeleton, layout), Watched(), theta, [batch(2, 0)])
    assert seen == {"ieee"} and matmul_precision() == "tf32"
    torch.backends.cuda.matmul.fp32_precision = (
        "ieee"  # torch's newer switch, after which the older one does not answer
    )
    assert matmul_precision() == "ieee"
    with float32_matmuls("tf32"):
        assert matmul_precision() == "tf32"
    assert matmul_precision() == "ieee"


def test_a_fused_optimizers_counter_lies_with_its_parameter() -> None:
    parameter = torch.empty(3, device="meta")  # stands for a GPU's
    assert counter_device({"fused": True}, parameter).type == "meta"
    assert counter_device({"fused": None, "capturable": True}, parameter).type == "meta"
    assert counter_device({"fused": None, "foreach": True}, parameter).type == "cpu"


def alone_on_gpus(config: Any, store: str) -> None:
    """A deletion where the launcher's only group moves tensors of GPUs, as NCCL alone does."""
    from lmc_dist.training import build_config, build_dataset

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    dataset, tokenizer = build_dataset(config)
    model = build_config(config.model, tokenizer)
    correction = run_lmcleaner_sample_unlearning(model, config.log_dir, [dataset.ids[0]], dataset=dataset)
    print(f"v: {correction.v.norm():.9g}")


def test_a_deletion_under_nccl_alone(forks: Forks, ranks: Any, tmp_path: Path) -> None:
    config = engine_config(tmp_path, "ddp", "update")
    ranks(2).run(train_job, config)
    group = forks.start(tmp_path / "out", 2, alone_on_gpus, config, str(tmp_path / "store"))
    assert group.wait() == [0, 0], group.output()
    norms = re.findall(r"v: (\S+)", group.output())
    assert len(norms) == 2 and len(set(norms)) == 1 and float(norms[0]) > 0
