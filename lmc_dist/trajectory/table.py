"""The step table: one row a step in `steps.sqlite`, and the tokens of samples that the log keeps."""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
import zstandard

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.database import BUSY_SECONDS, check_files, check_pages, open_database
from lmc_dist.trajectory.record import MicroRecord, StepRecord

T = TypeVar("T")

TABLE_FILE = "steps.sqlite"
SCHEMA = """
CREATE TABLE steps (
    step INTEGER PRIMARY KEY, batch_id INTEGER NOT NULL, epoch REAL NOT NULL, micro_steps INTEGER NOT NULL,
    lr TEXT NOT NULL, loss REAL, denominator REAL NOT NULL, grad_norm REAL, clip_coef REAL NOT NULL, loss_scale REAL NOT NULL,
    applied INTEGER NOT NULL, micro_batches TEXT NOT NULL, random_state BLOB, u_norm REAL, checksum TEXT NOT NULL,
    log_checksum TEXT, tensors TEXT, digest TEXT NOT NULL);
CREATE TABLE samples (id INTEGER PRIMARY KEY, tokens BLOB NOT NULL, pad INTEGER, digest TEXT NOT NULL);
"""
_STORAGE_COLUMNS = ("tensors", "digest")  # not under the row's digest: the ring and pruning change `tensors`

KINDS = ("update", "gradient", "theta")
_MAX_STATE_BYTES = 1 << 16  # of a random generator; torch's take 5056 and 16
_MAX_TOKENS_BYTES = 1 << 30  # of a sample, decompressed

Digests = Mapping[str, Sequence[str]]


class StepTable:
    """The table opened for writing. Rank 0 alone; usable from one thread at a time.

    Args:
        log_dir: The log; its table is made where there is none.
    """

    def __init__(self, log_dir: Path) -> None:
        path = log_dir / TABLE_FILE
        if path.exists():
            check_files(path)
        self._connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_SECONDS)
        # A snapshot becomes visible after the rows before it: not even a power cut may take those back.
        self._connection.execute("PRAGMA synchronous = EXTRA")
        if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchall():
            self._connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")

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
                    row = {"id": sample["id"], "tokens": tokens, "pad": sample["pad"]}
                    self._connection.execute(
                        "INSERT INTO samples VALUES (:id, :tokens, :pad, :digest)", {**row, "digest": row_digest(row)}
                    )
                elif decode_tokens(known[0]) != decode_tokens(tokens):
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

    def sample_sizes(self) -> list[int]:
        """Bytes of the tokens of each sample."""
        return [size for (size,) in self._connection.execute("SELECT length(tokens) FROM samples").fetchall()]

    def drop_samples(self) -> None:
        """Removes all tokens, also from the pages of the file that held them."""
        with self._connection:
            self._connection.execute("DELETE FROM samples")
        self._connection.execute("VACUUM")

    def truncate(self, step: int) -> None:
        """Removes all rows from `step` on."""
        with self._connection:
            self._connection.execute("DELETE FROM steps WHERE step >= ?", (step,))

    def close(self) -> None:
        self._connection.close()


def copy_table(log_dir: Path, output: Path) -> None:
    """Copies the table of a log, as it is, into another folder. Local."""
    with open_database(log_dir / TABLE_FILE, SCHEMA) as source, closing(sqlite3.connect(output / TABLE_FILE)) as target:
        source.backup(target)


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
            **({"local": True} if m.is_local else {}),
            **({"blanks": m.blanks} if m.blanks else {}),
            **({"width": m.width} if m.width is not None else {}),
        }
        for m in record.micro_batches
    ]
    row = {
        "step": record.step,
        "batch_id": record.batch_id,
        "epoch": _real(record.epoch),
        "micro_steps": 1 + max((micro.micro_step for micro in record.micro_batches), default=-1),
        "lr": json.dumps(record.lr),
        "loss": _real(record.loss),
        "denominator": _real(record.denominator),
        "grad_norm": _real(record.grad_norm),
        "clip_coef": _real(record.clip_coef),
        "loss_scale": _real(record.loss_scale),
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
    """The value as SQLite gives it back: it holds no NaN and no negative zero."""
    return None if value is None or value != value else float(value) + 0.0


def row_digest(row: Mapping[str, Any]) -> str:
    """XXH3-128 of all columns but those that say where tensors are."""
    names = sorted(set(row) - set(_STORAGE_COLUMNS))
    values = [xxhash.xxh3_128_hexdigest(row[n]) if isinstance(row[n], bytes) else row[n] for n in names]
    return xxhash.xxh3_128_hexdigest(json.dumps([names, values]).encode())


def read_rows(path: Path, table: str = "steps", order: str = "step") -> list[dict[str, Any]]:
    """All rows of a table. Local.

    Raises:
        LmcError: The table is missing or damaged.
    """
    with open_database(path, SCHEMA) as connection:
        check_pages(connection)
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY {order}")]


def decode_row(row: Mapping[str, Any]) -> StepRecord:
    """A row of the step table as a record.

    Raises:
        LmcError: It is not what was written: its digest differs, or a value is none that a writer writes.
    """
    if row_digest(row) != row["digest"]:
        raise LmcError(f"the row of step {row['step']} does not have its digest")
    try:
        return _record(row)
    except (KeyError, IndexError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise LmcError(f"the row of step {row['step']} is no record of a step ({str(error)[:200]})") from None


def _record(row: Mapping[str, Any]) -> StepRecord:
    micros = json.loads(row["micro_batches"])
    if row["step"] < 0 or row["applied"] not in (0, 1):
        raise ValueError("step or applied is out of range")
    return StepRecord(
        step=row["step"],
        batch_id=_whole(row["batch_id"]),
        micro_batches=tuple(
            _micro(micro, state) for micro, state in zip(micros, _states(row["random_state"], micros), strict=True)
        ),
        lr=tuple(_finite(value) for value in json.loads(row["lr"])),
        denominator=_finite(row["denominator"]),
        epoch=_finite(row["epoch"]),
        loss=_maybe(_number, row["loss"]),
        grad_norm=_maybe(_number, row["grad_norm"]),
        clip_coef=_finite(row["clip_coef"]),
        loss_scale=_finite(row["loss_scale"]),
        applied=bool(row["applied"]),
        u_norm=_maybe(_number, row["u_norm"]),
        checksum=_hexadecimal(row["checksum"]),
        log_checksum=_maybe(_hexadecimal, row["log_checksum"]),
    )


def _micro(values: Mapping[str, Any], state: bytes | None) -> MicroRecord:
    ids = tuple(values["ids"])
    if not all(type(i) is int for i in ids) or not -(2**63) <= min(ids, default=0) <= max(ids, default=0) < 2**63:
        raise ValueError("a sample id is no integer")
    return MicroRecord(
        _count(values["rank"]),
        _count(values["micro_step"]),
        ids,
        _finite(values["denominator"]),
        state,
        _maybe(_hexadecimal, values["digest"]),
        values.get("local", False) is True,
        _blanks(values, len(ids)),
        _maybe(_count, values.get("width")),
    )


def _blanks(values: Mapping[str, Any], num_samples: int) -> tuple[int, ...]:
    """Rows of a pass that held no sample, ascending, which leave as many rows as there are samples."""
    found = tuple(_count(place) for place in values.get("blanks", ()))
    if list(found) != sorted(set(found)) or (found and not found[-1] < num_samples + len(found)):
        raise ValueError("empty rows are out of place")
    if found and values.get("width") is None:
        raise ValueError("the width of a pass with empty rows is missing")
    return found


def _states(blob: bytes | None, micros: Sequence[Mapping[str, Any]]) -> list[bytes | None]:
    """The generator state of each pass that drew random numbers, None for the others."""
    drew = [i for i, micro in enumerate(micros) if micro["random"]]
    states: list[bytes | None] = [None] * len(micros)
    if blob is None and not drew:
        return states
    stream, limit = zlib.decompressobj(), len(drew) * _MAX_STATE_BYTES
    found = stream.decompress(blob or b"", limit + 1)
    if not drew or not stream.eof or len(found) > limit or len(found) % len(drew):
        raise ValueError(f"the random states are not those of {len(drew)} passes")
    size = len(found) // len(drew)
    for place, i in enumerate(drew):
        states[i] = found[place * size : (place + 1) * size]
    return states


def decode_digests(row: Mapping[str, Any]) -> Digests | None:
    """Digests of a step's files by kind and rank; None where it keeps no tensors.

    Raises:
        LmcError: The row says something else.
    """
    if row["tensors"] is None:
        return None
    try:
        found = json.loads(row["tensors"])
        sizes = {len([_hexadecimal(digest) for digest in by_rank]) for by_rank in found.values()}
        if not set(found) <= set(KINDS) or len(sizes) != 1 or not 0 < max(sizes) < 100_000:
            raise ValueError("kinds or ranks")
    except (AttributeError, ValueError, TypeError, RecursionError) as error:
        raise LmcError(f"the row of step {row['step']} does not say where its tensors are ({error})") from None
    return found


def _maybe(check: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else check(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or value != value:
        raise TypeError(f"{str(value)[:40]!r} is no number")
    return float(value)


def _finite(value: Any) -> float:
    if not isfinite(_number(value)):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is no integer")
    return value


def _count(value: Any) -> int:
    if not 0 <= _whole(value) < 2**31:
        raise ValueError(f"{str(value)[:40]} is out of range")
    return value


def _hexadecimal(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("(?:[0-9a-f]{16}){1,2}", value):
        raise ValueError(f"{str(value)[:40]!r} is no checksum")
    return value


def encode_tokens(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """Tokens and labels of one sample, compressed."""
    return zstandard.ZstdCompressor().compress(np.array([input_ids, labels], dtype="<i4").tobytes())


def decode_tokens(blob: bytes) -> tuple[list[int], list[int]]:
    """Tokens and labels of one sample.

    Raises:
        LmcError: The bytes are damaged, or decompress to more than a sample has.
    """
    try:
        if not 0 <= zstandard.frame_content_size(blob) <= _MAX_TOKENS_BYTES:
            raise LmcError("the tokens of a sample are too many, or damaged")
        found = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), "<i4").reshape(2, -1)
    except (zstandard.ZstdError, ValueError) as error:
        raise LmcError(f"the tokens of a sample are damaged ({error})") from None
    input_ids, labels = found.tolist()
    return input_ids, labels


def decode_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of samples as an item of a dataset.

    Raises:
        LmcError: It is not what was written.
    """
    if row_digest(row) != row["digest"]:
        raise LmcError(f"sample {row['id']} in {TABLE_FILE} does not have its digest: the log is damaged")
    input_ids, labels = decode_tokens(row["tokens"])
    return {"index": row["id"], "input_ids": input_ids, "labels": labels}
