"""Curvature kept beside a log: eigenpairs averaged over windows of the trajectory, for use without model and data.

curvature/NAME/curvature.json       what it is, eigenvalues, residuals
curvature/NAME/window-00/           a file a rank and eigenvector, like the log's own
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import promoted
from lmc_dist.shards.layout import ShardLayout, is_rule
from lmc_dist.trajectory.files import write_shard_file
from lmc_dist.trajectory.reader import FLOATS, ShardReader
from lmc_dist.trajectory.sealed import read_sealed, require_plain, write_sealed

if TYPE_CHECKING:
    from lmc_dist.curvature.low_rank import LowRank

SCHEMA_VERSION = 1
FOLDER, DESCRIPTION = "curvature", "curvature.json"


@dataclass(frozen=True)
class KeptWindow:
    """One curvature for the steps [start, stop), averaged over `steps` of them."""

    start: int
    stop: int
    steps: tuple[int, ...]
    curvature: LowRank


@dataclass(frozen=True)
class KeptCurvature:
    """The curvature of a whole run, window by window.

    Attributes:
        name: Of its folder.
        base: `GGN`, `exact` or `fd`.
        samples: Training samples behind each step's share.
        windows: In order; together they cover the run.
    """

    name: str
    base: str
    samples: int
    windows: tuple[KeptWindow, ...]

    def window(self, step: int) -> KeptWindow:
        """The one that covers a step."""
        return next(w for w in self.windows if w.start <= step < w.stop)

    def require(self, first: int, stop: int) -> None:
        """Checks that steps [first, stop) are covered. Local.

        Raises:
            LmcError: Some are not.
        """
        low, high = self.windows[0].start, self.windows[-1].stop
        if first < low or stop > high:
            raise LmcError(
                f"curvature '{self.name}' covers steps {low} to {high - 1}, the request needs {first} to {stop - 1}: "
                "compute it again with lmc log curvature"
            )


def curvature_folder(log_dir: Path, name: str) -> Path:
    if not re.fullmatch(r"[^./\\\0][^/\\\0]{0,99}", name):
        raise LmcError(f"a curvature's name is that of a folder, without slashes: got '{name}'")
    return log_dir / FOLDER / name


def kept_names(log_dir: Path) -> list[str]:
    """Names of the curvatures beside a log."""
    return sorted(
        path.parent.name for path in (log_dir / FOLDER).glob(f"*/{DESCRIPTION}") if path.parent.suffix != ".part"
    )


def save_curvature(log_dir: Path, kept: KeptCurvature, log_fingerprint: str) -> None:
    """Writes a curvature beside its log; replaces one of the same name when it is whole. Collective."""
    folder = curvature_folder(log_dir, kept.name)
    layout = kept.windows[0].curvature.layout
    with promoted(folder) as part:
        windows: list[dict[str, Any]] = []
        for i, window in enumerate(kept.windows):
            found = window.curvature
            for j, row in enumerate(found.basis):
                tensors = {slot.spec.name: layout.view(row, slot.spec.name).cpu() for slot in layout}
                write_shard_file(part / f"window-{i:02d}", layout, tensors, {}, kind=f"vector-{j:04d}")
            windows.append(
                {
                    "start": window.start,
                    "stop": window.stop,
                    "steps": list(window.steps),
                    "values": list(found.values),
                    "residuals": list(found.residuals),
                    "missed": found.missed,
                    "products": found.products,
                }
            )
        if layout.rank == 0:
            write_sealed(
                part / DESCRIPTION,
                {
                    "schema": SCHEMA_VERSION,
                    "base": kept.base,
                    "samples": kept.samples,
                    "partition": layout.rule,
                    "world_size": layout.world_size,
                    "dtype": str(kept.windows[0].curvature.basis.dtype).removeprefix("torch."),
                    "log_fingerprint": log_fingerprint,
                    "windows": windows,
                },
            )


def load_curvature(log_dir: Path, name: str, layout: ShardLayout, log_fingerprint: str) -> KeptCurvature:
    """A kept curvature at the layout of this rank, whatever world size wrote it. Local.

    Raises:
        LmcError: Unknown name, another log's, damaged files.
    """
    from lmc_dist.curvature.low_rank import LowRank

    folder = curvature_folder(log_dir, name)
    if not (folder / DESCRIPTION).exists():
        known = ", ".join(kept_names(log_dir)) or "none"
        raise LmcError(f"no curvature '{name}' beside {log_dir} (there: {known}); lmc log curvature computes one")
    for place in (folder.parent, folder):
        require_plain(place)
    found = read_sealed(folder / DESCRIPTION)
    if found.get("schema") != SCHEMA_VERSION:
        raise LmcError(f"{folder} has schema {found.get('schema')}, this version reads {SCHEMA_VERSION}")
    if found["log_fingerprint"] != log_fingerprint:
        raise LmcError(f"curvature '{name}' belongs to another run than the log in {log_dir}: compute it again")
    windows = []
    dtype, rule = FLOATS.get(str(found.get("dtype"))), str(found.get("partition"))
    if dtype is None or not is_rule(rule):
        raise LmcError(f"{folder / DESCRIPTION} is damaged: dtype or partition")
    for i, row in enumerate(found["windows"]):
        place, what = folder / f"window-{i:02d}", f"curvature '{name}', window {i}"
        vectors = [
            ShardReader(place, layout, rule, f"{what}, vector {j}", f"vector-{j:04d}", {dtype}).read(dtype).flat
            for j in range(len(row["values"]))
        ]
        curvature = LowRank(
            torch.stack(vectors),
            tuple(row["values"]),
            tuple(row["residuals"]),
            row["missed"],
            row["products"],
            layout,
        )
        windows.append(KeptWindow(row["start"], row["stop"], tuple(row["steps"]), curvature))
    return KeptCurvature(name, found["base"], found["samples"], tuple(windows))
