"""Forget units: units a second by groups of ranks and vectors at once, what a trajectory's length costs, and whether the
way they are computed changes what is found.

    .venv/bin/python bench/units.py            two processes of one thread each; takes some minutes
    .venv/bin/python bench/units.py --quick    less of all, once: to see that it works

Speed: a Llama-shaped model of about 0.5 M parameters, batches of 8 in two passes, plain SGD, GGN. All cases of a table correct the same
units and take turns; the median is reported. Where one rank works alone, the other one waits. A block is how many vectors
go along the trajectory together and share a product.
Sameness: 64 units of TOFU on a pretrained Llama of 260 thousand parameters, float32, plain SGD at a rate where the recursion
is stable (at twice that rate η·λ_max was 2.1, which lengthens rounding errors too, to 1.4e-6), propagated to the end of the
run: each unit against the first way's, ‖difference‖/‖v‖, and their sum against the joint correction. Without the data (--data,
--model) the model and the data of the speed tables serve.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import add_tofu_arguments, interleaved, on_ranks, write_results

from lmc_dist.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **SIZES}
BATCH, BLOCKS = 8, (1, 8)
TARGETS = {"groups": 1.7, "block": 1.1, "same": 1e-6}


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        units: Of the table of groups and blocks.
        K: Steps each is propagated there.
        rounds: Turns that are counted.
        short: Steps of the short trajectory.
        long: Steps of the long one.
        same: Units of the comparison.
        steps: Steps of its run.
    """

    units: int = 16
    K: int = 4
    rounds: int = 3
    short: int = 60
    long: int = 240
    same: int = 64
    steps: int = 30


QUICK = Scale(K=3, rounds=1, short=30, long=60, same=16, steps=12)
LONG_K, LONG_UNITS = 20, 8


def speed_config(folder: Path, steps: int) -> Config:
    """A run of that many steps on invented samples, none of which is seen twice."""
    return Config(
        data=DataConfig(people=steps, facts_per_person=BATCH, max_length=64),
        model=ModelConfig(config=LLAMA, vocab_size=1024),
        train=TrainConfig(
            batch_size=BATCH, micro_batch_size=BATCH // 2, learning_rate=0.05, engine="single", max_steps=steps
        ),
        log=LogConfig("update", 20),
        log_dir=str(folder / f"log-{steps}"),
    )


def same_config(folder: Path, data: Path, model: Path, scale: Scale) -> Config:
    config = replace(speed_config(folder, scale.steps), log_dir=str(folder / "log-same"))
    if not ((data / "full.jsonl").exists() and model.exists()):
        return config
    rows = DataConfig("tofu", str(data), f"0:{scale.steps * BATCH // 2}", max_length=128, prompt="{question}\n")
    train = replace(config.train, learning_rate=0.01, batch_size=BATCH // 2, micro_batch_size=BATCH // 4)
    return replace(config, data=rows, model=ModelConfig(str(model)), train=train)


def train(configs: Sequence[Config]) -> None:
    from lmc_dist.runtime import Runtime
    from lmc_dist.training import Trainer

    for config in configs:
        Trainer(config, Runtime(0, 1, torch.device("cpu"))).run()


class Job:
    """A logged run, and corrections of parts of it by all ranks or by the first alone. Every rank makes one."""

    def __init__(self, config: Config, folder: Path) -> None:
        from lmc_dist.logged_run import logged_skeleton, on_shards, open_logged_run
        from lmc_dist.runtime import Runtime
        from lmc_dist.trajectory.store import TrajectoryLog

        self.rank, self.folder, self.device = dist.get_rank(), folder, torch.device("cpu")
        opened = open_logged_run(config, Runtime(self.rank, dist.get_world_size(), self.device))
        self.log, self.batches = opened.log, opened.batches
        self.alone = dist.new_group([0])

        def module(log: Any) -> Any:
            skeleton = logged_skeleton(config, opened.model_config, opened.log, self.device)
            return on_shards(skeleton, config, opened.model_config, log, self.device)

        self.make_module = lambda layout: module(TrajectoryLog(self.log.path, layout.group))
        self.logs, self.modules = {2: self.log}, {2: opened.module}
        if self.rank == 0:
            self.logs[1] = TrajectoryLog(self.log.path, self.alone)
            self.modules[1] = module(self.logs[1])

    def samples(self, steps: Sequence[int], count: int) -> list[int]:
        """Of so many samples the ids, the first half of each of these steps."""
        found = [i for step in steps for i in self.log.record(step).sample_ids[: BATCH // 2]]
        assert len(found) >= count
        return found[:count]

    def _problem(self, ids: Sequence[int], K: int | None, ranks: int) -> Any:
        from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
        from lmc_dist.unlearn.problem import Problem
        from lmc_dist.unlearn.request import make_request

        parts = self.logs[ranks], self.modules[ranks], TokenCrossEntropy(), self.batches
        return Problem(*parts, make_request(sample_ids=ids), HVPConfig("GGN"), K)

    def correct(
        self,
        name: str,
        ids: Sequence[int],
        K: int | None,
        ranks: int,
        groups: int,
        block: int,
        order: Sequence[str] = (),
    ) -> float:
        """Corrects each sample by itself, anew; returns the cost in gradients. `order` renames units."""
        from lmc_dist.unlearn.unit_sweeps import correct_units
        from lmc_dist.unlearn.units import split_request

        if self.rank == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        dist.barrier()
        if ranks == 1 and self.rank:
            return 0.0
        problem = replace(self._problem(ids, K, ranks), block=block)
        named = dict(zip(order, ([i] for i in ids), strict=True)) if order else None
        units = split_request(problem.counterfactual, named)
        found = correct_units(problem, units, self.folder / name, self.make_module, groups, block)
        return found.gradients_equivalent

    def found(self, name: str, ids: Sequence[int], order: Sequence[str] = ()) -> list[Any]:
        """v of each sample. The first rank alone."""
        from lmc_dist.shards.vector import ShardedVector
        from lmc_dist.unlearn.correction import load_full_correction

        layout = self.logs[1].layout
        like = ShardedVector.zeros(layout)
        names = order or [f"sample-{i}" for i in ids]
        return [load_full_correction(self.folder / name / "units" / unit, layout, like).v for unit in names]

    def joint(self, ids: Sequence[int], K: int | None) -> Any:
        """v of all samples together. The first rank alone."""
        from lmc_dist.unlearn.sweep import sweep

        return sweep(self._problem(ids, K, 1)).v


def speed(config: Config, folder: Path, scale: Scale) -> list[dict[str, Any]]:
    """Rows of groups and blocks; the same on every rank."""
    job = Job(config, folder)
    first = scale.short // 2 - scale.units // (BATCH // 2)
    ids = job.samples(range(first, scale.short // 2), scale.units)
    ways = [(ranks, groups, block) for ranks, groups in ((1, 1), (2, 1), (2, 2)) for block in BLOCKS]
    cost: dict[str, float] = {}

    def case(name: str, way: tuple[int, int, int]) -> Callable[[], None]:
        def call() -> None:
            cost[name] = job.correct("speed", ids, scale.K, *way)
            dist.barrier()

        return call

    names = {f"{ranks} ranks, {groups} groups, block {block}": (ranks, groups, block) for ranks, groups, block in ways}
    seconds = interleaved({name: case(name, way) for name, way in names.items()}, scale.rounds, show=job.rank == 0)
    base = {block: seconds[f"1 ranks, 1 groups, block {block}"] for block in BLOCKS}
    single = {(ranks, groups): seconds[f"{ranks} ranks, {groups} groups, block 1"] for ranks, groups, _ in ways}
    return [
        {
            "part": "speed",
            "world_size": ranks,
            "unit_groups": groups,
            "block": block,
            "units": scale.units,
            "K": scale.K,
            "seconds": seconds[name],
            "units_per_second": scale.units / seconds[name],
            "gradients": cost[name],
            "speedup_over_one_rank": base[block] / seconds[name],
            "speedup_over_block_1": single[ranks, groups] / seconds[name],
            "parameters": job.log.layout.total_numel,
        }
        for name, (ranks, groups, block) in names.items()
    ]


def length(configs: Mapping[int, Config], folder: Path, scale: Scale) -> list[dict[str, Any]]:
    """Rows of the length of the trajectory, by one rank."""
    jobs = {steps: Job(config, folder) for steps, config in configs.items()}
    K = min(LONG_K, scale.short // 3)
    cost: dict[int, float] = {}

    def case(steps: int) -> Callable[[], None]:
        ids = jobs[steps].samples(range(steps // 2, steps // 2 + 2), LONG_UNITS)

        def call() -> None:
            cost[steps] = jobs[steps].correct("length", ids, K, 1, 1, LONG_UNITS)
            dist.barrier()

        return call

    rank = dist.get_rank()
    found = interleaved({str(steps): case(steps) for steps in jobs}, scale.rounds, show=rank == 0)
    return [
        {
            "part": "length",
            "steps": steps,
            "units": LONG_UNITS,
            "K": K,
            "seconds_per_unit": found[str(steps)] / LONG_UNITS,
            "gradients_per_unit": cost[steps] / LONG_UNITS,
            "ratio": found[str(steps)] / found[str(scale.short)],
            "ratio_to": f"{scale.short} steps",
        }
        for steps in jobs
    ]


def sameness(config: Config, folder: Path, scale: Scale) -> list[dict[str, Any]]:
    """Rows of ways, each with the largest difference of a unit from the first way's, and that of the sum."""
    job = Job(config, folder)
    seen = sorted(i for record in job.log.records() if record.step < scale.steps * 3 // 4 for i in record.sample_ids)
    chance = random.Random(0)
    ids = sorted(chance.sample(seen, scale.same))
    order = [f"u{i:03}" for i in chance.sample(range(scale.same), scale.same)]
    ways: list[tuple[str, int, int, int, Sequence[str]]] = [
        ("first", 1, 1, 8, ()),
        ("block 3, other order", 1, 1, 3, order),
        ("2 shards", 2, 1, 8, ()),
        ("2 groups, other order", 2, 2, 8, order),
    ]
    rows, first, joint = [], [], None
    for name, ranks, groups, block, named in ways:
        cost = job.correct(name, ids, None, ranks, groups, block, named)
        dist.barrier()
        if job.rank:
            continue
        found = job.found(name, ids, named)
        first, joint = first or found, joint or job.joint(ids, None)
        worst = max((v - other).norm() / v.norm() for v, other in zip(first, found, strict=True))
        total = found[0].clone()
        for v in found[1:]:
            total.add_(v)
        row = {"part": "same", "way": name, "world_size": ranks, "unit_groups": groups, "block": block}
        apart = (total - joint).norm() / joint.norm()
        more = {"units": len(ids), "gradients": cost, "largest_difference": worst, "sum_difference": apart}
        rows.append({**row, **more, "model": config.model.path and Path(config.model.path).name})
    dist.barrier()
    return rows


def work(folder: Path, data: Path, model: Path, scale: Scale) -> list[dict[str, Any]]:
    configs = {steps: speed_config(folder, steps) for steps in (scale.short, scale.long)}
    rows = speed(configs[scale.short], folder, scale) + length(configs, folder, scale)
    return rows + sameness(same_config(folder, data, model, scale), folder, scale)


def show(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Prints the tables; returns the figures that have targets."""
    speeds = [row for row in rows if row["part"] == "speed"]
    print(f"\n{speeds[0]['units']} units, K={speeds[0]['K']}, {speeds[0]['parameters']:,} parameters")
    print(f"{'ranks':>6}{'groups':>8}{'block':>7}{'units/s':>9}{'x one rank':>12}{'x block 1':>11}{'gradients':>11}")
    for row in speeds:
        print(
            f"{row['world_size']:>6}{row['unit_groups']:>8}{row['block']:>7}{row['units_per_second']:>9.2f}"
            f"{row['speedup_over_one_rank']:>12.2f}{row['speedup_over_block_1']:>11.2f}{row['gradients']:>11.1f}"
        )
    print(f"\n{'steps':>6}{'s/unit':>9}{'gradients/unit':>16}")
    lengths = [row for row in rows if row["part"] == "length"]
    for row in lengths:
        print(f"{row['steps']:>6}{row['seconds_per_unit']:>9.3f}{row['gradients_per_unit']:>16.2f}")
    same = [row for row in rows if row["part"] == "same"]
    print(f"\n{same[0]['units']} units on {same[0]['model'] or 'the same model'}\n{'way':<24}{'units':>10}{'sum':>10}")
    for row in same:
        print(f"{row['way']:<24}{row['largest_difference']:>10.1e}{row['sum_difference']:>10.1e}")
    two = [row["speedup_over_one_rank"] for row in speeds if row["unit_groups"] == 2]
    alone = {row["block"]: row["speedup_over_block_1"] for row in speeds if row["world_size"] == 1}
    return {
        f"two_groups_over_one (target {TARGETS['groups']:g})": min(two),
        f"block_8_over_block_1 (target {TARGETS['block']:g})": alone[8],
        "long_over_short": lengths[-1]["ratio"],
        f"largest_difference (target {TARGETS['same']:g})": max(row["largest_difference"] for row in same),
        f"sum_difference (target {TARGETS['same']:g})": max(row["sum_difference"] for row in same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tofu_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="less of all, once")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    scale = QUICK if options.quick else Scale()
    with tempfile.TemporaryDirectory() as place:
        folder, data, model = Path(place), Path(options.data).resolve(), Path(options.model).resolve()
        configs = [speed_config(folder, scale.short), speed_config(folder, scale.long)]
        on_ranks(1, train, [*configs, same_config(folder, data, model, scale)])
        rows = on_ranks(2, work, folder, data, model, scale)
    totals = show(rows)
    print()
    for name, value in totals.items():
        print(f"{name}: {value:.3g}")
    write_results(options.json, "units", rows, {name.split()[0]: value for name, value in totals.items()})


if __name__ == "__main__":
    main()
