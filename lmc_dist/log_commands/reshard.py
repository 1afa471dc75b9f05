"""`lmc log reshard`: a log rewritten for another number of ranks or another partition rule."""

from __future__ import annotations

from pathlib import Path

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import count, size
from lmc_dist.runtime import Runtime, agreement, check_replaceable
from lmc_dist.trajectory.contents import folder_bytes
from lmc_dist.trajectory.files import MANIFEST_FILE
from lmc_dist.trajectory.reshard import reshard, work_items
from lmc_dist.trajectory.store import TrajectoryLog


def reshard_log(config: Config, runtime: Runtime) -> str:
    """What was written, as text. Collective.

    Raises:
        LmcError: On every rank, and without a new log.
    """
    from tqdm import tqdm

    settings = config.reshard
    with agreement():
        if settings.output is None or settings.ranks is None:
            raise LmcError("say where to and for how many ranks: lmc log reshard LOG OUT --reshard.ranks N")
        output = Path(settings.output)
        if output.resolve() == Path(config.log_dir).resolve():
            raise LmcError("a log cannot be resharded in its own place: give another folder")
        check_replaceable(output, MANIFEST_FILE, config.overwrite)
        files = len(work_items(TrajectoryLog(config.log_dir), max(settings.ranks, 1)))
    mine = -(-files // runtime.world_size)
    with tqdm(total=mine, desc="reshard", unit="file", disable=not runtime.is_main) as bar:
        log = reshard(config.log_dir, output, settings.ranks, settings.partition, bar.update)
    return (
        f"{output}: {count(log.num_steps, 'step')} and {count(len(log.snapshots), 'snapshot')} in files of "
        f"{count(settings.ranks, 'rank')}, {size(folder_bytes(output))}; same run (fingerprint {log.fingerprint[:12]})"
    )
