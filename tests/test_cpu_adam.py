"""DeepSpeedCPUAdam, compiled: logged under ZeRO-3, followed, replayed to the bit, corrected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_engine_logs import engine_config, replayed

from lmc_dist.curvature import HVPConfig
from lmc_dist.data import collate
from lmc_dist.trajectory.callback import training_log
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.store import TrajectoryLog

STEPS, CLIP = 8, 0.5


def cpu_adam_job(folder: Path) -> float:
    """Relative distance of the correction by a head through all steps from exact replay, on two ranks."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from test_zero3 import build_for_replay

    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.runtime import Runtime
    from lmc_dist.shards.engines.build import build_engine
    from lmc_dist.training import build_dataset, deepspeed_config
    from lmc_dist.unlearn.correction import compute_correction

    config = engine_config(folder, "zero3", "gradient", optimizer="adamw", learning_rate=1e-3, max_grad_norm=CLIP)
    dataset, world_size, rank = build_dataset(config)[0], dist.get_world_size(), dist.get_rank()

    def optimizer(model: torch.nn.Module) -> Any:
        return DeepSpeedCPUAdam(model.parameters(), lr=1e-3, weight_decay=0.01, adamw_mode=True)

    settings = deepspeed_config(config.train, world_size) | {"gradient_accumulation_steps": 1}
    engine = build_engine("deepspeed", build_for_replay(config), optimizer, settings)
    engine.train()
    run = {"config": {"train": {}}, "deepspeed": settings}
    with training_log(engine, config.log_dir, mode="gradient", save_interval=4, run=run):
        for step in range(STEPS):
            ids = dataset.ids[2 * step : 2 * step + 4]
            batch = collate(dataset.by_id(ids[rank::world_size]), dataset.pad_token_id)
            items = torch.tensor(float(sum(dataset.num_targets(i) for i in ids)))
            loss = engine(**batch, num_items_in_batch=items).loss
            engine.backward(loss * world_size, scale_wrt_gas=False)
            engine.step()
    engine.destroy()
    log = TrajectoryLog(config.log_dir)
    assert log.manifest.optimizer["class"].endswith("DeepSpeedCPUAdam")
    assert log.num_steps == STEPS and any(record.clip_coef < 1 for record in log.records())
    result = replayed(config)
    assert result.exact and result.verified == STEPS
    request = Counterfactual("renormalize", sample_ids=frozenset({dataset.ids[3]}))
    reference = replayed(config, request).theta
    opened = open_logged_run(config, Runtime(rank, world_size, torch.device("cpu")))
    theta = log.theta(STEPS)
    hvp = HVPConfig("none")
    correction = compute_correction(log, opened.module, opened.batches, request, hvp, replay_head=STEPS)
    return (correction.corrected(theta) - reference).norm() / (theta - reference).norm()


@pytest.mark.slow
def test_deepspeeds_compiled_adam_is_followed_and_replayed(ranks: Any, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: DeepSpeedCPUAdam is built when it is first used")
    build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, timeout=900)
    for distance in ranks(2).run(cpu_adam_job, tmp_path):
        print(f"head through all steps: {distance:.1e}")
        assert distance <= 1e-4
