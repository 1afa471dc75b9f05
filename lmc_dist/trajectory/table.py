"""The step table: one row a step in `steps.sqlite`, and the tokens of samples that the log keeps."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.record import MicroRecord, StepRecord

TABLE_FILE = "steps.sqlite"
_SCHEMA = """
CREATE TABLE steps (
    step INTEGER PRIMARY KEY, batch_id INTEGER NOT NULL, epoch REAL NOT NULL, micro_steps INTEGER NOT NULL,
    lr TEXT NOT NULL, loss REAL, denominator REAL NOT NULL, grad_norm REAL, clip_coef REAL NOT NULL,
    applied INTEGER NOT NULL, micro_batches TEXT NOT NULL, random_state BLOB, u_norm REAL, checksum TEXT NOT NULL,
    log_checksum TEXT, tensors TEXT, digest TEXT NOT NULL);
CREATE TABLE samples (id INTEGER PRIMARY KEY, tokens BLOB NOT NULL, pad INTEGER);
"""
_STORAGE_COLUMNS = ("tensors", "digest")  # not under the row's digest: the ring and pruning change `tensors`

Digests = Mapping[str, Sequence[str]]


class StepTable:
    """The table opened for writing. Rank 0 alone; usable from one thread at a time.

    Args:
        log_dir: The log; its table is made where there is none.
    """

    def __init__(self, log_dir: Path) -> None:
        path = log_dir / TABLE_FILE
        is_new = not path.exists()
        self._connection = sqlite3.connect(path, check_same_thread=False)
        if is_new:
            self._connection.executescript(_SCHEMA)
            self._connection.commit()

    def insert(self, rows: Iterable[tuple[StepRecord, Digests | None]]) -> None:
        """Appends steps with the digests of their files by kind and rank, in one transaction."""
        with self._connection:
            for record, digests in rows:
                row = encode_row(record, digests)
                marks = ", ".join(f":{key}" for key in row)
                self._connection.execute(f"INSERT INTO steps ({', '.join(row)}) VALUES ({marks})", row)

    def insert_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds samples; one that is there must be the same.

        Raises:
            LmcError: A sample came again with other tokens.
        """
        with self._connection:
            for sample in samples:
                tokens = encode_tokens(sample["input_ids"], sample["labels"])
                known = self._connection.execute("SELECT tokens FROM samples WHERE id = ?", (sample["id"],)).fetchone()
                if known is None:
                    self._connection.execute(
                        "INSERT INTO samples VALUES (?, ?, ?)", (sample["id"], tokens, sample["pad"])
                    )
                elif known[0] != tokens:
                    raise LmcError(
                        f"sample {sample['id']} came with other tokens than before: save_batch_data keeps each sample "
                        "once, so tokenisation must not change from epoch to epoch; log without it"
                    )

    def set_tensors(self, digests: Mapping[int, Digests | None]) -> None:
        """Changes which tensors of steps are there, in one transaction."""
        with self._connection:
            for step, kinds in digests.items():
                value = json.dumps(kinds) if kinds else None
                self._connection.execute("UPDATE steps SET tensors = ? WHERE step = ?", (value, step))

    def kept_before(self, step: int) -> list[int]:
        """Steps before `step` whose tensors are there."""
        rows = self._connection.execute("SELECT step FROM steps WHERE tensors IS NOT NULL AND step < ?", (step,))
        return [number for (number,) in rows.fetchall()]

    def truncate(self, step: int) -> None:
        """Removes all rows from `step` on."""
        with self._connection:
            self._connection.execute("DELETE FROM steps WHERE step >= ?", (step,))

    def close(self) -> None:
        self._connection.close()


def encode_row(record: StepRecord, digests: Digests | None) -> dict[str, Any]:
    """A step as a row of the table."""
    states = [micro.random_state for micro in record.micro_batches if micro.random_state is not None]
    micros = [
        {
            "rank": m.rank,
            "micro_step": m.micro_step,
            "denominator": m.denominator,
            "ids": m.sample_ids,
            "random": m.random_state is not None,
            "digest": m.digest,
        }
        for m in record.micro_batches
    ]
    row = {
        "step": record.step,
        "batch_id": record.batch_id,
        "epoch": float(record.epoch),
        "micro_steps": 1 + max((micro.micro_step for micro in record.micro_batches), default=-1),
        "lr": json.dumps(record.lr),
        "loss": _real(record.loss),
        "denominator": float(record.denominator),
        "grad_norm": _real(record.grad_norm),
        "clip_coef": float(record.clip_coef),
        "applied": int(record.applied),
        "micro_batches": json.dumps(micros),
        "random_state": zlib.compress(b"".join(states)) if states else None,
        "u_norm": _real(record.u_norm),
        "checksum": record.checksum,
        "log_checksum": record.log_checksum,
        "tensors": json.dumps(digests) if digests else None,
    }
    return {**row, "digest": row_digest(row)}


def _real(value: float | None) -> float | None:
    """The value as SQLite gives it back: it holds no NaN."""
    return None if value is None or value != value else float(value)


def row_digest(row: Mapping[str, Any]) -> str:
    """XXH3-128 of all columns but those that say where tensors are."""
    names = sorted(set(row) - set(_STORAGE_COLUMNS))
    values = [xxhash.xxh3_128_hexdigest(row[n]) if isinstance(row[n], bytes) else row[n] for n in names]
    return xxhash.xxh3_128_hexdigest(json.dumps([names, values]).encode())


def read_rows(path: Path, table: str = "steps", order: str = "step") -> list[dict[str, Any]]:
    """All rows of a table; a transaction that a killed writer left open is rolled back where we may write."""
    for mode in ("rw", "ro"):
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY {order}")]
        except sqlite3.OperationalError:
            if mode == "ro":
                raise
    raise AssertionError


def decode_row(row: Mapping[str, Any]) -> StepRecord:
    """A row of the step table as a record.

    Raises:
        LmcError: It is not what was written: its digest differs.
    """
    if row_digest(row) != row["digest"]:
        raise LmcError(f"the row of step {row['step']} does not have its digest")
    micros = json.loads(row["micro_batches"])
    states: list[bytes | None] = [None] * len(micros)
    if row["random_state"] is not None:
        blob = zlib.decompress(row["random_state"])
        drew = [i for i, m in enumerate(micros) if m["random"]]
        size = len(blob) // len(drew)
        for place, i in enumerate(drew):
            states[i] = blob[place * size : (place + 1) * size]
    return StepRecord(
        step=int(row["step"]),
        batch_id=int(row["batch_id"]),
        micro_batches=tuple(
            MicroRecord(m["rank"], m["micro_step"], tuple(m["ids"]), m["denominator"], state, m["digest"])
            for m, state in zip(micros, states, strict=True)
        ),
        lr=tuple(json.loads(row["lr"])),
        denominator=row["denominator"],
        epoch=row["epoch"],
        loss=row["loss"],
        grad_norm=row["grad_norm"],
        clip_coef=row["clip_coef"],
        applied=bool(row["applied"]),
        u_norm=row["u_norm"],
        checksum=row["checksum"],
        log_checksum=row["log_checksum"],
    )


def encode_tokens(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """Tokens and labels of one sample, compressed."""
    return zstandard.ZstdCompressor().compress(np.array([input_ids, labels], dtype="<i4").tobytes())


def decode_tokens(blob: bytes) -> tuple[list[int], list[int]]:
    input_ids, labels = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), "<i4").reshape(2, -1).tolist()
    return input_ids, labels
