"""The log's storage: tiers, rounded updates, compression, the writer thread, the commands on it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_zero3 import GPT2, small_config, train_job

from lmc_dist.config import Config, LogConfig
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory import codec
from lmc_dist.trajectory.background import BackgroundWriter
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.store import TrajectoryLog

# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("compression", codec.COMPRESSIONS)
def test_codec_gives_back_every_bit(dtype: torch.dtype, compression: Any) -> None:
    for numel in (0, 1, 7, 1000):
        tensor = (torch.randn(numel, dtype=torch.float64) * 1e-3).to(dtype)
        if numel > 3 and dtype.is_floating_point:
            tensor[1], tensor[2], tensor[3] = float("nan"), float("-inf"), -0.0
        back = codec.decode(codec.encode(tensor, compression), dtype, numel, compression)
        assert back.dtype == dtype and codec.digest(back) == codec.digest(tensor)
        if numel:
            flipped = tensor.clone()
            codec.raw_bytes(flipped)[numel // 2, 0] ^= 1
            assert codec.digest(flipped) != codec.digest(tensor)
    shrunk = codec.encode(torch.linspace(1, 2, 4096), "zstd")
    assert shrunk.numel() < 0.8 * 4 * 4096
    with pytest.raises(LmcError, match="damaged"):
        codec.decode(shrunk[5:].clone(), torch.float32, 4096, "zstd")


def test_background_writer_bounds_memory_keeps_order_and_stops_at_an_error() -> None:
    gate, done = threading.Event(), []
    writer = BackgroundWriter(limit_bytes=100)

    def job(number: int) -> Any:
        return lambda: (gate.wait(), done.append(number))

    writer.submit(job(0), 60)
    writer.submit(job(1), 40)
    blocked = threading.Thread(target=lambda: writer.submit(job(2), 1000))  # more than the limit: waits to be alone
    blocked.start()
    time.sleep(0.1)
    assert blocked.is_alive() and done == []
    gate.set()
    blocked.join(5)
    writer.drain()
    assert done == [0, 1, 2] and writer.error is None

    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    writer.submit(job(3))
    writer.drain()
    writer.submit(job(4), 1000)  # dropped, and does not block
    assert isinstance(writer.error, OSError) and done == [0, 1, 2]
    writer.close()


def check_relayout() -> None:
    shapes = [(7, 3), (2, 5), (1,), (), (64,), (5, 2, 2)]
    params = [ParamSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rules: tuple[Any, Any] = ("zero3", "fsdp2")
    layouts = [ShardLayout(params, rank, world_size, rule) for rule in rules]
    whole = {p.name: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(params)}
    first, second = (ShardedVector.from_full(layout, whole.__getitem__) for layout in layouts)
    assert torch.equal(relayout(first, layouts[1]).flat, second.flat)
    assert torch.equal(relayout(second, layouts[0]).flat, first.flat)


def test_relayout_moves_every_element(ranks: Any) -> None:
    for world_size in (1, 2, 3, 4):
        ranks(world_size).run(check_relayout)


# --- tiers ---------------------------------------------------------------------------------------------------------


def log_config(folder: Path, model: Any = None, **settings: Any) -> Config:
    config = small_config(folder, **({} if model is None else {"model": model}))
    return replace(config, log=LogConfig(**({"save_interval": 3} | settings)))


def tier_facts(log_dir: str) -> dict[str, Any]:
    """Checksums and norms of what a log gives at every step, at this world size."""
    log = TrajectoryLog(log_dir)
    facts: dict[str, Any] = {"theta": [checksum(log.theta(s)) for s in range(log.num_steps + 1)]}
    facts["update"] = [checksum(log.update(s)) for s in range(log.num_steps)]
    facts["gradient"] = None
    if log.manifest.storage in ("gradient", "full"):
        facts["gradient"] = [checksum(log.gradient(s)) for s in range(log.num_steps)]
        facts["grad_norm"] = [log.gradient(s).norm() for s in range(log.num_steps)]
    theta = log.theta(2)
    facts["advance"] = []
    for step in range(2, log.num_steps):
        update = log.advance(theta, step)
        facts["advance"].append((checksum(theta), checksum(update)))
    return facts


def test_tiers_agree_to_the_bit_at_any_world_size(ranks: Any, tmp_path: Path) -> None:
    """u_s and θ_s are the same whichever tier and compression keep them; g_s explains u_s: u = −η (g + wθ)."""
    stored = {
        "update": {"storage": "update"},
        "gradient": {"storage": "gradient", "compression": "zstd"},
        "full": {"storage": "full"},
    }
    facts = {}
    for name, settings in stored.items():
        config = log_config(tmp_path / name, **settings)
        ranks(2).run(train_job, config)
        facts[name] = [ranks(w).run(tier_facts, config.log_dir)[0] for w in (1, 2, 3)]
        log = TrajectoryLog(config.log_dir)
        assert facts[name][0]["theta"][1:] == [r.checksum for r in log.records()]
        if name != "update":
            assert facts[name][2]["grad_norm"] == pytest.approx([r.grad_norm for r in log.records()], rel=1e-5)
        log.require(0)
    for key in ("theta", "update", "advance"):
        values = [f[key] for found in facts.values() for f in found]
        assert all(value == values[0] for value in values), key
    assert facts["gradient"][0]["gradient"] == facts["full"][2]["gradient"]
    ranks(2).run(check_gradient_explains_update, str(tmp_path / "gradient" / "log"))
    with pytest.raises(LmcError, match="storage 'update', which keeps no gradients"):
        TrajectoryLog(tmp_path / "update" / "log").gradient(1)


def check_gradient_explains_update(log_dir: str) -> None:
    log = TrajectoryLog(log_dir)
    for step in range(log.num_steps):
        theta, expected = log.theta(step), log.gradient(step)
        for row in log.manifest.parameters:
            decay = log.manifest.optimizer["groups"][row["group"]]["weight_decay"]
            expected[row["name"]].add_(decay * theta[row["name"]])
        expected.scale_(-log.record(step).lr[0])
        # θ' − θ carries the rounding of θ'
        assert (log.update(step) - expected).norm() <= 1e-6 * theta.norm()


def rounding_facts(log_dir: str, exact_dir: str) -> list[tuple[float, float, float]]:
    """(distance of θ_s from the exact log's, ‖u_{s−1}‖, ‖θ_s‖) for each s ≥ 1."""
    log, exact = TrajectoryLog(log_dir), TrajectoryLog(exact_dir)
    found = []
    for s in range(1, log.num_steps + 1):
        theta = exact.theta(s)
        found.append(((log.theta(s) - theta).norm(), exact.update(s - 1).norm(), theta.norm()))
    return found


@pytest.mark.parametrize("interval", [3, None])
def test_rounded_updates_never_add_up(ranks: Any, tmp_path: Path, interval: int | None) -> None:
    """bf16 u_s: θ_s is off by the rounding of one update (2⁻⁸ of it, elementwise), and exact at snapshots."""
    exact = log_config(tmp_path / "exact")
    config = log_config(tmp_path / "bf16", update_dtype="bfloat16", save_interval=interval)
    for each in (exact, config):
        ranks(2).run(train_job, each)
    log = TrajectoryLog(config.log_dir)
    assert [r.checksum for r in log.records()] == [r.checksum for r in TrajectoryLog(exact.log_dir).records()]
    assert log.record(0).log_checksum != log.record(0).checksum
    for world_size in (1, 2, 3):
        found = ranks(world_size).run(rounding_facts, config.log_dir, exact.log_dir)[0]
        for s, (distance, update, theta) in enumerate(found, 1):
            # bf16 rounds by at most 2⁻⁸ of what is stored: u_s and the error before it, which is as small beside an
            # update of about the same length; 2⁻²³ θ is the rounding of the float32 addition.
            assert distance <= 2**-8 * (1 + 2**-6) * update + 2**-23 * theta, (s, distance / update)
            assert (distance == 0) == (s in log.snapshots), s


def samples_job(config: Config) -> None:
    """The log's own samples are the dataset's, and give every logged pass again."""
    from lmc_dist.training import build_dataset
    from lmc_dist.trajectory.passes import batch_digest

    log, dataset = TrajectoryLog(config.log_dir), build_dataset(config)[0]
    kept = log.samples()
    assert kept.fingerprint == dataset.fingerprint == log.manifest.dataset_fingerprint
    batches = DatasetBatches(kept)
    for record in log.records():
        for micro in record.micro_batches:
            assert (micro.digest is None) == (not micro.sample_ids)
            if micro.sample_ids:
                inputs, labels = batches.inputs(micro.sample_ids)
                assert batch_digest({**inputs, "labels": labels}) == micro.digest


def test_log_with_batch_data_replaces_the_dataset(ranks: Any, tmp_path: Path) -> None:
    config = log_config(tmp_path, GPT2, storage="replay", save_batch_data=True)
    ranks(2).run(train_job, config)
    ranks(2).run(samples_job, config)
    config = log_config(tmp_path / "without")
    ranks(2).run(train_job, config)
    with pytest.raises(LmcError, match="ids of its samples, not their tokens"):
        TrajectoryLog(config.log_dir).samples()


BAD_SETTINGS = {
    "unknown log storage 'all'; available: replay, update, gradient, full": {"mode": "all"},
    "unknown update_dtype 'float16'": {"update_dtype": "float16"},
    "update_dtype=bfloat16 has no effect: log storage 'full' keeps no updates": {
        "mode": "full",
        "update_dtype": "bfloat16",
    },
    "gradient_dtype=bfloat16 has no effect: log storage 'update' keeps no gradients": {"gradient_dtype": "bfloat16"},
    "unknown compression 'gzip'; available: none, zstd": {"compression": "gzip"},
    "buffer_mb must be above 0": {"buffer_mb": 0},
    "a ring .max_steps. needs save_interval": {"max_steps": 3, "save_interval": None},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, message: str) -> None:
    from lmc_dist import TrainingLogger

    with pytest.raises(LmcError, match=message):
        TrainingLogger(tmp_path, **BAD_SETTINGS[message])  # type: ignore[arg-type]


# --- what reaches the model ----------------------------------------------------------------------------------------

ROWS = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "labels")}
BAD_INDEX: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "a batch has 2 sample ids and 1 rows: .* Turn packing off": ([3, 4], {name: t[:1] for name, t in ROWS.items()}),
    "a batch has 3 sample ids and 2 rows": (torch.tensor([3, 4, 5]), {"labels": ROWS["labels"]}),
    "row 1 of a batch has -1 as `index`, .* and has targets": (torch.tensor([0, -1]), ROWS),
    "holds the sample id -2: sample ids are integers ≥ 0": (torch.tensor([0, -2]), ROWS),
    "holds float32: sample ids are integers ≥ 0": (torch.tensor([0.0, 1.5]), ROWS),
    "holds .'a', 'b'.: sample ids are integers ≥ 0": (["a", "b"], ROWS),
}


@pytest.mark.parametrize("message", BAD_INDEX)
def test_ids_that_do_not_name_the_rows_are_refused(message: str) -> None:
    from lmc_dist.trajectory.index import read_index

    with pytest.raises(LmcError, match=message):
        read_index(*BAD_INDEX[message])


def test_ids_name_the_rows() -> None:
    from lmc_dist.trajectory.batches import blank_rows
    from lmc_dist.trajectory.index import read_index

    assert read_index(torch.tensor([[7], [0]]), ROWS) == read_index([7, 0], ROWS) == [7, 0]
    assert read_index(torch.tensor([7, -1]), blank_rows(ROWS, [1])) == [7, -1]
    assert read_index(None, ROWS) == []  # registered by hand


def test_an_auxiliary_loss_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    from lmc_dist import TrainingLogger

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=16, num_key_value_heads=2, num_local_experts=2, output_router_logits=True, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    logger = TrainingLogger(tmp_path / "log")
    with pytest.raises(LmcError, match=r"set model\.config\.output_router_logits = False before training"):
        logger.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not (tmp_path / "log").exists()


def test_bit_sum_sees_a_change_of_one_bit() -> None:
    from lmc_dist.shards.checksum import bit_sum

    for dtype in (torch.float32, torch.float64):
        tensors = [torch.randn(1000, dtype=dtype), torch.randn(0, dtype=dtype)]
        before = bit_sum(tensors)
        assert before == bit_sum([torch.cat([*tensors, torch.zeros(3, dtype=dtype)])])
        tensors[0][17] = torch.nextafter(tensors[0][17], torch.tensor(9.0, dtype=dtype))
        assert bit_sum(tensors) != before and bit_sum([]) == 0
