"""Replays that are of another run than the log: told before anything is computed from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_engine_logs import engine_config
from test_zero3 import GPT2, LLAMA, build_for_replay

from lmc_dist import TrainingLogger, run_lmcleaner_sample_unlearning
from lmc_dist.config import Config
from lmc_dist.data import SampleDataset, collate
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines.build import build_engine
from lmc_dist.trajectory.batches import IGNORED, DatasetBatches, as_wide
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def same(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def narrow(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Padded to the longest sample."""
    width = int(batch["attention_mask"].sum(1).max())
    return {name: x[:, :width] if x.dim() == 2 else x for name, x in batch.items()}


def wide(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Padded to 80 tokens."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found, labels = as_wide(
        inputs, batch["labels"], 80, pad_token_id=int(batch["input_ids"][batch["attention_mask"] == 0][0])
    )
    return {**batch, **found, "labels": labels}


def unmasked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if name != "attention_mask"}


def trained(config: Config, dataset: SampleDataset, change: Change = same, penalty: float = 0.0) -> TrajectoryLog:
    """Five steps of four samples, in one process."""
    model = build_for_replay(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    logger = TrainingLogger(config.log_dir, save_interval=2)
    logger.attach(model, optimizer)
    model.train()
    for step in range(5):
        batch = change(collate(dataset.by_id(dataset.ids[4 * step : 4 * step + 4]), dataset.pad_token_id))
        items = (batch["labels"][:, 1:] != IGNORED).sum()
        loss = model(**batch, num_items_in_batch=items.float()).loss
        (loss + penalty * sum(p.square().sum() for p in model.parameters())).backward()
        optimizer.step()
        optimizer.zero_grad()
    logger.close()
    return TrajectoryLog(config.log_dir)


def dataset_of(config: Config) -> SampleDataset:
    from lmc_dist.training import build_dataset

    return build_dataset(config)[0]


def replayed(config: Config, dataset: SampleDataset, sample: int) -> Any:
    log = TrajectoryLog(config.log_dir)
    request = Counterfactual("renormalize", frozenset({sample}))
    return replay(replay_engine(build_for_replay(config), log), log, DatasetBatches(dataset), request)


@pytest.mark.parametrize("change", [narrow, wide, unmasked])
def test_other_collators_are_replayed_to_the_bit(tmp_path: Path, change: Change) -> None:
    """Dropout draws as many numbers as a batch has elements, padding included."""
    config = engine_config(tmp_path, "single", "update", model=GPT2)
    dataset = dataset_of(config)
    log = trained(config, dataset, change)
    result = replay(replay_engine(build_for_replay(config), log), log, DatasetBatches(dataset))
    assert result.exact and result.verified == 5
    assert checksum(result.theta) == log.record(4).checksum
    assert replayed(config, dataset, dataset.ids[0]).steps == 6  # the first step once more, as it was


def test_a_wider_pass_is_cut_where_it_is_padding_alone() -> None:
    inputs = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], IGNORED)
    cut, targets = as_wide(inputs, labels, 3)
    assert cut["input_ids"].shape == targets.shape == (2, 3)
    with pytest.raises(LmcError, match="a pass was 2 tokens wide, its samples have 4"):
        as_wide(inputs, labels, 2)


def test_a_loss_that_is_not_the_models_is_told(tmp_path: Path) -> None:
    """Also where the first step is the one that changes, so that no step before it could be compared."""
    config = engine_config(tmp_path, "single", "update")
    dataset = dataset_of(config)
    trained(config, dataset, penalty=0.1)
    for sample in (dataset.ids[0], dataset.ids[17]):
        with pytest.raises(
            LmcError, match=r"does not reproduce its checksum: .* a loss that was not the model's own alone"
        ):
            replayed(config, dataset, sample)


def test_other_data_is_told(tmp_path: Path) -> None:
    config = engine_config(tmp_path, "single", "update", model=LLAMA)
    dataset = dataset_of(config)
    trained(config, dataset)
    items = [dict(item) for item in dataset.by_id(dataset.ids)]
    items[1]["input_ids"] = [*items[1]["input_ids"][:-1], 5]
    other = SampleDataset(items, dataset.pad_token_id)
    said = r"the data gives another batch than the model saw for samples 0, 1, 2, 3: .*`lmc log doctor`"
    with pytest.raises(LmcError, match=said):
        replayed(config, other, dataset.ids[0])
    with pytest.raises(LmcError, match=said):
        run_lmcleaner_sample_unlearning(
            build_for_replay(config), config.log_dir, [dataset.ids[0]], dataset=DatasetBatches(other)
        )


def two_ranks(config: Config, penalty: float) -> None:
    """A run of DDP whose loss has a regulariser."""
    dataset = dataset_of(config)
    engine = build_engine("ddp", build_for_replay(config), lambda m: torch.optim.AdamW(m.parameters(), lr=0.003), {})
    logger = TrainingLogger(config.log_dir, save_interval=2)
    logger.attach(engine)
    engine.module.train()
    for step in range(3):
        ids = dataset.ids[4 * step : 4 * step + 4]
        batch = collate(dataset.by_id(ids[dist.get_rank() :: 2]), dataset.pad_token_id)
        items = sum(dataset.num_targets(i) for i in ids)
        loss = engine.wrapper(**batch, num_items_in_batch=torch.tensor(float(items))).loss
        (loss * 2 + penalty * sum(p.square().sum() for p in engine.module.parameters())).backward()
        engine.base.step()
        engine.base.zero_grad()
    logger.close()
    engine.destroy()


def on_one_rank(config: Config) -> int:
    return replayed(config, dataset_of(config), dataset_of(config).ids[9]).verified


def test_another_number_of_ranks_is_certified_by_the_gradients_norm(ranks: Any, tmp_path: Path) -> None:
    good, bad = (engine_config(tmp_path / name, "ddp", "update") for name in ("good", "bad"))
    for config, penalty in ((good, 0.0), (bad, 0.1)):
        ranks(2).run(two_ranks, config, penalty)
    assert ranks(1).run(on_one_rank, good) == [0]
    with pytest.raises(
        AssertionError, match=r"comes out otherwise .its gradient has norm .*: the loss, the model or the data"
    ):
        ranks(1).run(on_one_rank, bad)
