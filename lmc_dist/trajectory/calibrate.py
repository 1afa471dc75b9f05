"""How long this machine takes to log a step: timed on vectors like those of training, on the disk of the log."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.codec import Compression
from lmc_dist.trajectory.difference import difference, stored_update
from lmc_dist.trajectory.files import publish_files, stage_shard_file
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.size import LogShape

_ELEMENTS = (1 << 20, 4 << 20)  # least and most of the vectors that are timed; times are proportional
_REPEATS = 5


@dataclass(frozen=True)
class Calibration:
    """Seconds that one rank takes.

    Attributes:
        copy: For each element, to copy θ out of the engine.
        compare: For each element, to compare θ_{s+1} with θ_s.
        write: For each element of a float32 vector, to encode and digest it and hand it to the system.
        sync: For each byte, until it is on disk, if one rank writes.
        file: For each file, however small.
        shares_cores: Whether training and writing use the same cores, as without a GPU.
        elements: Length of the vectors that were timed.
        folder: On whose disk.
    """

    copy: float
    compare: float
    write: float
    sync: float
    file: float
    shares_cores: bool
    elements: int
    folder: str

    def step_seconds(self, shape: LogShape) -> tuple[float, float]:
        """(seconds in training's way, seconds behind its back) of a step, all ranks on this machine and disk."""
        mine = shape.numel / shape.ranks
        kinds = TIERS[shape.storage]
        written = sum(shape.stored_dtype(kind).itemsize for kind in kinds)
        behind = mine * (self.compare + self.write * written / 4)
        behind += shape.numel * written * self.sync + shape.ranks * len(kinds) * self.file
        return mine * self.copy * (1 + ("gradient" in kinds)), behind

    def snapshot_seconds(self, shape: LogShape) -> float:
        """Seconds of a snapshot, taken to be all in training's way."""
        kinds = 1 + len(shape.state)
        mine = shape.numel / shape.ranks
        return kinds * (mine * (self.copy + self.write) + shape.numel * 4 * self.sync) + shape.ranks * self.file

    def overhead(self, seconds: tuple[float, float], step: float) -> float:
        """Share by which a step of training gets longer.

        Writing that shares no cores costs what it takes longer than a step; where it does, it costs itself.
        """
        in_the_way, behind = seconds
        waited = behind if self.shares_cores else max(0.0, behind - step - in_the_way)
        return (in_the_way + waited) / step

    @property
    def text(self) -> str:
        cores = "its cores are training's too" if self.shares_cores else "training is on the GPU"
        rate = 1e-6 / max(self.sync, 1e-12)
        return (
            f"timed on {self.elements:,} elements in {self.folder}: {rate:,.0f} MB/s to disk, {1e3 * self.file:.1f} ms a "
            f"file; all ranks taken to be on this machine, and {cores}"
        )


def calibrate(
    folder: Path, parameters: tuple[ParamSpec, ...], world_size: int, compression: Compression
) -> Calibration:
    """Times copies, comparisons and files of one rank's shards. Local; takes a second or two.

    Args:
        folder: On the disk that the log will be on.
        parameters: Of the model.
        world_size: Ranks that share it.
        compression: Of the log.
    """
    mine = sum(spec.numel for spec in parameters) // world_size
    layout = ShardLayout([ParamSpec("timed", (min(max(mine, _ELEMENTS[0]), _ELEMENTS[1]),))])
    generator = torch.Generator().manual_seed(0)
    before = ShardedVector(layout, torch.randn(layout.flat_numel, generator=generator))
    after = before + before.like(1e-3 * torch.randn(layout.flat_numel, generator=generator))
    found, nothing = difference(before, after), ShardLayout([ParamSpec("timed", (1,))])
    place = Path(tempfile.mkdtemp(prefix=".lmc-calibration-", dir=folder))
    try:
        number = layout.flat_numel
        stage = lambda: [stage_shard_file(place, layout, stored_update(found, after), {}, "update", compression)]  # noqa: E731
        write = seconds(stage)
        whole = seconds(lambda: publish_files(stage()))
        small = {"timed": torch.zeros(1)}
        file = seconds(lambda: publish_files([stage_shard_file(place, nothing, small, {}, "small")]))
        copy = seconds(after.clone)
        compare = seconds(lambda: difference(before, after))
    finally:
        shutil.rmtree(place)
    sync = max(whole - write - file, 0.0) / (4 * number)
    return Calibration(
        copy / number,
        compare / number,
        write / number,
        sync,
        file,
        not torch.cuda.is_available(),
        number,
        str(folder),
    )


def seconds(work: Callable[[], object]) -> float:
    """Median seconds of a few runs."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
