"""How large a log will be: headers, tensors, table and all, before anything is trained.

Tensors and headers are counted as the writers lay them out. The step table is counted by making one: rows are what
they are because of ids, digests and random states, and SQLite's pages.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmc_dist.shards.layout import ParamSpec, PartitionRule, ShardLayout
from lmc_dist.trajectory.codec import Compression
from lmc_dist.trajectory.files import FIX_INDEX, FIX_VALUE
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.trajectory.snapshot_files import snapshot_metadata
from lmc_dist.trajectory.stream import Piece, header_bytes
from lmc_dist.trajectory.table import TABLE_FILE, StepTable

# Size of zstandard's output to its input (`codec`). Float32: updates of a Llama on text under AdamW; gradients and
# weights of small models trained on text. Bfloat16: the mean of updates and gradients of those, 0.67 to 0.75.
ZSTD_RATIO = {"update": 0.84, "gradient": 0.90, "theta": 0.93}
ZSTD_RATIO_BFLOAT16 = 0.72
# Elements for which θ + u rounds to something other than θ', and which a file therefore holds once more: about 0.3 of
# ‖u‖/‖θ‖, which is 1 % in the first steps of small models from random weights and far less in fine-tuning.
FIX_SHARE = 0.004
_FIX_BYTES = 12  # index and value
_ROWS = 256  # of the table that is made to measure; further ones are taken to be as long
_NO_DIGEST = "0" * 32


@dataclass(frozen=True)
class LogShape:
    """What decides how large the files of a step and of a snapshot are.

    Attributes:
        parameters: In model order.
        ranks: That write.
        partition: How they cut parameters.
        storage: Tier.
        dtype: Of θ.
        update_dtype: Of u_s as stored.
        gradient_dtype: Of g_s as stored.
        compression: Of step files.
        state: Optimizer state kept in snapshots, one vector each.
    """

    parameters: tuple[ParamSpec, ...]
    ranks: int
    partition: PartitionRule
    storage: str
    dtype: torch.dtype = torch.float32
    update_dtype: torch.dtype = torch.float32
    gradient_dtype: torch.dtype = torch.float32
    compression: Compression = "none"
    state: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.parameters)

    @property
    def is_rounded(self) -> bool:
        """Whether updates are stored in a coarser type than θ."""
        return self.update_dtype != self.dtype

    def stored_dtype(self, kind: str) -> torch.dtype:
        return {"update": self.update_dtype, "gradient": self.gradient_dtype}.get(kind, self.dtype)


def stored_bytes(shape: LogShape, kind: str, steps: Iterable[int], save_interval: int | None) -> float:
    """Bytes of one vector of all these applied steps, of all ranks."""
    steps = list(steps)
    if kind != "update" or not shape.is_rounded or save_interval is None:
        return len(steps) * vector_bytes(shape, kind)
    exact = sum((step + 1) % save_interval == 0 for step in steps)  # so that following the log meets the snapshot
    whole = replace(shape, update_dtype=shape.dtype)
    return (len(steps) - exact) * vector_bytes(shape, kind) + exact * vector_bytes(whole, kind)


def vector_bytes(shape: LogShape, kind: str) -> float:
    """Bytes of all ranks' files of one vector of a step, stored in the shape's type."""
    dtype = shape.stored_dtype(kind)
    ratio = ZSTD_RATIO_BFLOAT16 if dtype == torch.bfloat16 else ZSTD_RATIO[kind]
    is_exact = kind == "update" and not shape.is_rounded
    size = shape.numel * dtype.itemsize * (ratio if shape.compression == "zstd" else 1.0)
    fixes = shape.numel * FIX_SHARE * _FIX_BYTES if is_exact else 0.0
    return size + fixes + shape.ranks * _step_header(shape, kind, is_exact)


def _step_header(shape: LogShape, kind: str, is_exact: bool) -> float:
    """Bytes of the header of a rank's file; of the entries of fixes as many as are likely."""
    layout, dtype = ShardLayout(shape.parameters, 0, shape.ranks, shape.partition), shape.stored_dtype(kind)
    plain = [_piece(slot.spec.name, dtype, slot.local_numel) for slot in layout]
    alone = _header_length(plain, kind, shape)
    if not is_exact:
        return alone
    fixes = [p for piece in plain for p in _fix_pieces(piece.name)]
    extra = (_header_length([*plain, *fixes], kind, shape) - alone) / max(len(plain), 1)
    likely = sum(1 - (1 - FIX_SHARE) ** piece.numel for piece in plain)
    return alone + extra * likely


def _fix_pieces(name: str) -> list[Piece]:
    return [_piece(name + FIX_INDEX, torch.int64, 1), _piece(name + FIX_VALUE, torch.float32, 1)]


def _piece(name: str, dtype: torch.dtype, numel: int) -> Piece:
    return Piece(name, dtype, numel, lambda: torch.empty(0))


def _header_length(pieces: Sequence[Piece], kind: str, shape: LogShape) -> int:
    table = {p.name: [str(p.dtype).removeprefix("torch."), p.numel, _NO_DIGEST] for p in pieces}
    metadata = {
        "format": "pt",
        "rank": "0",
        "world_size": str(shape.ranks),
        "compression": shape.compression,
        "tensors": json.dumps(table),
        "step": "100",
        "kind": kind,
    }
    return len(header_bytes(pieces, _sizes(pieces), metadata, shape.compression))


def _sizes(pieces: Sequence[Piece]) -> dict[str, float]:
    return {piece.name: piece.numel * piece.dtype.itemsize for piece in pieces}


def snapshot_bytes(shape: LogShape, has_state: bool = True) -> float:
    """Bytes of a snapshot: θ and optimizer state of all ranks."""
    layout = ShardLayout(shape.parameters, 0, shape.ranks)
    kinds = ("theta", *(shape.state if has_state else ()))
    pieces = [_piece(f"{kind}/{slot.spec.name}", shape.dtype, slot.local_numel) for kind in kinds for slot in layout]
    header = len(header_bytes(pieces, _sizes(pieces), snapshot_metadata(pieces, layout)))
    meta = 120 + 60 * len(kinds)
    return len(kinds) * shape.numel * shape.dtype.itemsize + shape.ranks * header + meta


def snapshots_kept(num_steps: int, save_interval: int | None, max_steps: int | None) -> list[int]:
    """Snapshots that are there after the last step."""
    taken = sorted({*range(0, num_steps + 1, save_interval or max(num_steps, 1)), num_steps})
    if max_steps is None:
        return taken
    first = max((n for n in taken if n <= num_steps - max_steps), default=0)
    return [n for n in taken if n >= first]


def most_at_once(num_steps: int, save_interval: int | None, max_steps: int | None) -> tuple[int, int]:
    """(steps, snapshots) that are on disk when a ring is fullest: before it drops what the newest snapshot frees."""
    if max_steps is None or save_interval is None:
        return num_steps, len(snapshots_kept(num_steps, save_interval, None))
    steps = min(num_steps, (-(-max_steps // save_interval) + 1) * save_interval)
    return steps, len(range(0, steps + 1, save_interval))


def table_bytes(
    records: Callable[[int], StepRecord],
    num_steps: int,
    kinds: Sequence[str],
    ranks: int,
    samples: Iterable[Mapping[str, Any]] = (),
    num_samples: int = 0,
) -> tuple[int, int]:
    """(bytes of the rows, bytes of the samples' tokens) in the table of a whole run.

    Args:
        records: Step → its record, with values as long as those of training.
        num_steps: Of the run.
        kinds: Vectors of each step.
        ranks: Ranks that write.
        samples: Some samples.
        num_samples: How many there will be.
    """
    digests = {kind: [_NO_DIGEST] * ranks for kind in kinds}
    made, samples = min(num_steps, _ROWS), list(samples)
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        table = StepTable(Path(folder))
        try:
            for job in (
                lambda: None,
                lambda: table.insert((records(step), digests) for step in range(made)),
                lambda: table.insert_samples(samples),
            ):
                job()
                sizes.append((Path(folder) / TABLE_FILE).stat().st_size)
        finally:
            table.close()
    rows = sizes[0] + (sizes[1] - sizes[0]) * num_steps / max(made, 1)
    tokens = (sizes[2] - sizes[1]) * num_samples / max(len(samples), 1)
    return round(rows), round(tokens)
