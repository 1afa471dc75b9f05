"""The ledger of deletion requests: many writers, rows that nobody of us wrote, and what its files give away."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lmc_dist.audit.digests import SALT_FILE, salted_digest
from lmc_dist.errors import LmcError
from lmc_dist.online.ledger import ANSWERED, MOST_TARGETS, TABLE_FILE, Ledger, asked_before
from lmc_dist.trajectory.files import ledger_folder


def test_a_request_is_filed_once_and_holds_no_id(tmp_path: Path) -> None:
    folder = ledger_folder(tmp_path / "log")
    assert folder == tmp_path / "log.requests"
    ledger = Ledger(folder)
    request, is_new = ledger.submit([31_415_926, 27_182_818])
    again, is_new_again = Ledger(folder).submit([27_182_818, 31_415_926, 31_415_926])
    assert (is_new, is_new_again) == (True, False) and request == again
    other, _ = ledger.submit([31_415_926, 27_182_818], unit="batch")
    third, _ = ledger.submit(batches=[5, 3])
    assert len({request.name, other.name, third.name}) == 3
    assert [r.name for r in ledger.requests()[0]] == [request.name, other.name, third.name]
    assert third.batches == (3, 5) and third.samples == ()
    assert request.samples == tuple(sorted(salted_digest(ledger.salt, i) for i in (31_415_926, 27_182_818)))
    for path in folder.iterdir():
        assert b"31415926" not in path.read_bytes() and b"27182818" not in path.read_bytes()
    assert stat.S_IMODE((folder / SALT_FILE).stat().st_mode) == 0o600
    assert salted_digest(Ledger(tmp_path / "other").salt, 31_415_926) not in request.samples


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "names nothing to forget"),
        ({"sample_ids": [1], "batches": [2]}, "samples or batches, not both"),
        ({"sample_ids": [-1]}, "'-1' is no id"),
        ({"sample_ids": ["1; DROP TABLE requests"]}, "is no id"),
        ({"sample_ids": [2**63]}, "is no id"),
        ({"sample_ids": [True]}, "is no id"),
        ({"sample_ids": range(MOST_TARGETS + 1)}, "at most 1000000 go into one"),
        ({"sample_ids": [1], "unit": "user"}, "the unit 'sample' or 'batch', not 'user'"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(LmcError, match=told):
        ledger.submit(**given)
    assert ledger.requests() == ([], []) and not ledger.has_pending()


def test_a_request_goes_its_way_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    name = ledger.submit([1])[0].name
    assert ledger.has_pending()
    ledger.decide([name], 7)
    assert not ledger.has_pending() and ledger.requests("decided")[0][0].step == 7
    ledger.decide([name], 9)  # it is decided already
    ledger.finish(name, "applied", {"v_norm": 0.5})
    ledger.finish(name, "refused", {"reason": "too late"})
    (request,), _ = ledger.requests()
    assert (request.status, request.step, dict(request.result)) == ("applied", 7, {"v_norm": 0.5})
    ledger.decide([name], 8, ANSWERED)  # a crash has taken the answer back
    ledger.finish(name, "refused", {"reason": "too late"})
    assert [(r.status, r.step) for r in ledger.requests()[0]] == [("refused", 8)]


def test_a_lost_salt_is_an_error_and_no_new_one(tmp_path: Path) -> None:
    ledger = Ledger(ledger_folder(tmp_path / "log"))
    ledger.decide([ledger.submit([1])[0].name], 7)
    assert asked_before(tmp_path / "log")
    salt = ledger.folder / SALT_FILE
    salt.rename(tmp_path / "copy")
    for act in (lambda: Ledger(ledger.folder), lambda: asked_before(tmp_path / "log")):
        with pytest.raises(LmcError, match=r"salt\.key is missing: put it back"):
            act()
    assert not salt.exists()
    (tmp_path / "copy").rename(salt)
    assert [r.step for r in Ledger(ledger.folder).requests()[0]] == [7]
    with sqlite3.connect(ledger.path) as connection:  # an answered row that cannot be read counts as one
        connection.execute("UPDATE requests SET samples = '[]'")
    assert asked_before(tmp_path / "log")


@pytest.mark.parametrize("is_written", [False, True])
def test_a_table_whose_maker_was_killed_is_made_again(tmp_path: Path, is_written: bool) -> None:
    """Before its first commit, or within it, when the pages are there and the journal that takes them back is as well."""
    salt, path, journal = Ledger(tmp_path).salt, tmp_path / TABLE_FILE, tmp_path / f"{TABLE_FILE}-journal"
    path.unlink()
    if is_written:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA cache_size = 1")  # so that the journal is on disk before the commit
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE requests (name TEXT)")
            connection.executemany("INSERT INTO requests VALUES (?)", [("x" * 4000,)] * 50)
            before = journal.read_bytes()
            connection.execute("COMMIT")
        journal.write_bytes(before)
    else:
        path.touch()
    ledger = Ledger(tmp_path)
    assert ledger.salt == salt and ledger.requests() == ([], []) and not ledger.has_pending()
    assert ledger.submit([1])[1] and Ledger(tmp_path).has_pending()


BAD_ROWS: dict[str, tuple[Any, ...]] = {
    "no lists": ("a" * 32, 1.0, "sample", "{'x'", "[]", "pending", None, None),
    "another name": ("a" * 32, 1.0, "sample", json.dumps(["b" * 32]), "[]", "pending", None, None),
    "a path": ("../../etc/passwd", 1.0, "sample", json.dumps(["b" * 32]), "[]", "pending", None, None),
    "no digests": ("a" * 32, 1.0, "sample", json.dumps([7]), "[]", "pending", None, None),
    "nested": ("a" * 32, 1.0, "sample", "[" * 5000 + "]" * 5000, "[]", "pending", None, None),
    "too large": ("a" * 32, 1.0, "sample", json.dumps(["b" * 32] * 2_000_000), "[]", "pending", None, None),
    "no unit": ("a" * 32, 1.0, "everything", "[]", "[3]", "pending", None, None),
    "no batch": ("a" * 32, 1.0, "batch", "[]", '["3"]', "pending", None, None),
    "a blob": (b"\x00\xff", 1.0, "sample", b"\x80", b"\x81", "pending", None, None),
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_nobody_of_us_wrote_are_put_aside(tmp_path: Path, row: tuple[Any, ...]) -> None:
    ledger = Ledger(tmp_path)
    good = ledger.submit([1])[0]
    with sqlite3.connect(tmp_path / TABLE_FILE) as connection:
        connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    found, malformed = ledger.requests("pending")
    assert [request.name for request in found] == [good.name] and len(malformed) == 1
    ledger.reject(malformed[0].row, malformed[0].reason)
    assert ledger.requests("pending") == ([good], [])


@pytest.mark.parametrize(
    "more", ["CREATE VIEW v AS SELECT 1", "CREATE TRIGGER t AFTER UPDATE ON requests BEGIN SELECT 1; END"]
)
def test_a_database_that_holds_more_is_refused(tmp_path: Path, more: str) -> None:
    ledger = Ledger(tmp_path)
    with sqlite3.connect(tmp_path / TABLE_FILE) as connection:
        connection.execute(more)
    for act in (ledger.has_pending, ledger.requests, lambda: ledger.submit([1])):
        with pytest.raises(LmcError, match="is damaged"):
            act()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "log.requests").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LmcError, match="link"):
        Ledger(tmp_path / "log.requests")
    assert not list((tmp_path / "elsewhere").iterdir())


def file_many(folder: str, first: int, start: Any) -> None:
    start.wait()
    for i in range(first, first + 25):
        Ledger(folder).submit([i])


def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    start = context.Barrier(5)
    writers = [context.Process(target=file_many, args=(str(tmp_path), 20 * k, start)) for k in range(4)]  # they overlap
    for writer in writers:
        writer.start()
    start.wait()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    ledger = Ledger(tmp_path)
    found, malformed = ledger.requests()
    assert len(found) == 85 and not malformed
    assert len(list(tmp_path.glob(f"{SALT_FILE}*"))) == 1 and os.listdir(tmp_path)
