"""Opening a step table that may be damaged or come from somebody else, for reading.

An SQLite file can hold more than rows: views and triggers that run when a table is read, and beside it a journal whose
last line names any file of the machine, which SQLite would delete after a recovery. A table that is not exactly what
`StepTable` makes is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.sealed import require_plain

BUSY_SECONDS = 300.0  # a writer may have to wait for somebody who reads the whole table
_MAGIC = b"SQLite format 3\x00"
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def check_files(path: Path) -> None:
    """Checks a database and what lies beside it before SQLite opens them. Local.

    Raises:
        LmcError: Missing, not plain files, in another journal mode, or a journal that names another file.
    """
    if not path.exists():
        raise LmcError(f"{path} is missing: the log is incomplete")
    require_plain(path)
    journal, *others = (path.with_name(f"{path.name}-{suffix}") for suffix in ("journal", "wal", "shm"))
    for each in (journal, *others):  # which come and go while somebody writes
        require_plain(each, may_be_missing=True)
    with open(path, "rb") as file:
        header = file.read(20)
    if header and (header[:16] != _MAGIC or header[18:20] != b"\x01\x01"):
        raise LmcError(f"{path} is damaged: it does not begin like a step table")
    try:
        with open(journal, "rb") as file:
            file.seek(max(file.seek(0, 2) - len(_JOURNAL_MAGIC), 0))
            if file.read() == _JOURNAL_MAGIC:
                raise LmcError(f"{journal} names another journal: no writer of a log leaves such a file")
    except FileNotFoundError:
        pass


@contextmanager
def open_database(path: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """A connection for reading alone; a transaction that a killed writer left open is rolled back where we may write.

    Args:
        path: Of the database.
        schema: The statements that made it.

    Raises:
        LmcError: It is missing, damaged, or holds anything but the schema's tables.
    """
    with _connected(path) as connection:
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            connection.execute(f"PRAGMA {setting}")
        if _objects(connection) != _made_by(schema):
            raise LmcError(f"{path} is damaged: its tables are not those of a log")
        connection.row_factory = sqlite3.Row
        yield connection


def holds_nothing(path: Path) -> bool:
    """Whether a database is missing or empty: the process that made it ended before its first commit. Local.

    Raises:
        LmcError: What lies there is not for SQLite to open.
    """
    if not path.exists() or not path.stat().st_size:
        return True
    with _connected(path) as connection:
        return not _objects(connection)


def ensure_tables(connection: sqlite3.Connection, schema: str, path: Path) -> None:
    """Makes the table of a database that holds nothing yet, within the transaction that is open. Local.

    Args:
        connection: For writing.
        schema: One statement.
        path: Of the database.

    Raises:
        LmcError: It holds anything else.
    """
    if not (found := _objects(connection)):
        connection.execute(schema)
    elif found != _made_by(schema):
        raise LmcError(f"{path} is damaged: its tables are not those that are expected")


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a checked file; what SQLite finds wrong with it in the block is damage."""
    check_files(path)
    try:
        with closing(_connect(path)) as connection:
            yield connection
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter where a message quotes what is damaged
        raise LmcError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from None


def _connect(path: Path) -> sqlite3.Connection:
    # Reading needs no right to write but where a journal has to be rolled back.
    for mode in ("ro", "rw"):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=60)
        try:
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            return connection
        except sqlite3.OperationalError:
            connection.close()
            if mode == "rw":
                raise
    raise AssertionError


def _objects(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Everything a database defines, by its text."""
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()


@cache
def _made_by(schema: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema)
        return _objects(connection)


def check_pages(connection: sqlite3.Connection) -> None:
    """Checks that all pages hang together: rows that damage has hidden are found. Local.

    Raises:
        LmcError: They do not.
    """
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise LmcError(f"the step table is damaged: {' '.join(problem.split())}")
