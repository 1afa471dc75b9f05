"""Trained under one engine, corrected under another: logged by ZeRO-3 and applied to a live FSDP2 model, and the reverse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_engine_logs import FORGOTTEN, engine_config, this_runtime

from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.store import TrajectoryLog


def mixed_job(folder: Path) -> dict[str, dict[str, float]]:
    """By the engine that trained: relative distance of the other engine, corrected live, from the one that trained."""
    from lmc_dist import run_lmcleaner_sample_unlearning
    from lmc_dist.training import Trainer, build_config, build_dataset, build_engine, build_model

    found = {}
    for engine, other in (("zero3", "fsdp2"), ("fsdp2", "zero3")):
        config = engine_config(folder / engine, engine, "gradient", optimizer="adamw", learning_rate=1e-3)
        trainer = Trainer(config, this_runtime())
        trainer.run()
        log = TrajectoryLog(config.log_dir)
        dataset, tokenizer = build_dataset(config)
        elsewhere = engine_config(folder / f"{engine}-on-{other}", other, optimizer="adamw", learning_rate=1e-3)
        model = build_model(elsewhere.model, build_config(elsewhere.model, tokenizer), 1)
        live = engine_shards(build_engine(model, replace(elsewhere.train, seed=1), 2))
        vectors, scalars = log.snapshot(log.num_steps)
        placed = {key: relayout(vector, live.layout) for key, vector in vectors.items()}
        live.write(placed.pop("theta"))
        live.write_state(placed, scalars)
        corrections = [
            run_lmcleaner_sample_unlearning(shards, config.log_dir, FORGOTTEN, dataset=dataset)
            for shards in (trainer.shards, live)
        ]
        assert corrections[0].v.norm() > 0
        trained, moved = ({"theta": shards.read()} | shards.read_state()[0] for shards in (trainer.shards, live))
        live.verify(live.read())
        assert trained.keys() == moved.keys() and len(trained) == 3
        before = relayout(vectors["theta"], trainer.shards.layout)
        assert checksum(trained["theta"]) != checksum(before)

        def distance(a: ShardedVector, b: ShardedVector) -> float:
            return (relayout(b, a.layout) - a).norm() / a.norm()

        found[engine] = {key: distance(vector, moved[key]) for key, vector in trained.items()}
        for shards in (trainer.shards, live):
            shards.destroy()
        torch.distributed.barrier()
    return found


def test_a_log_of_one_engine_corrects_another(ranks: Any, tmp_path: Path) -> None:
    for engine, distances in ranks(2).run(mixed_job, tmp_path)[0].items():
        print(engine, distances)
        assert all(distance <= 1e-6 for distance in distances.values()), (engine, distances)
