"""Fixtures: pools of ranks by world size, and the folder of test data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks
from pool import Pool

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of its own for compiled operators: in the user's, a killed build leaves a lock that the next waits at for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands set how much is told; a test that runs one in this process leaves the next as it was."""
    logger = logging.getLogger("lmc_dist")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(n)`: a live group of n ranks, started at first use and shared by the session."""
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in pools or pools[world_size].broken:
            pools[world_size] = Pool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Groups of ranks that may be killed, forked from a process that has imported everything."""
    found = Forks()
    assert found.threads == 1  # or forking would not be safe
    yield found
    found.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with tofu/ and models/, from LMC_TEST_DATA."""
    folder = Path(os.environ.get("LMC_TEST_DATA", REPO.parent / "shared" / "data")).resolve()
    if not (folder / "tofu" / "full.jsonl").exists():
        pytest.skip(f"no test data in {folder}: set LMC_TEST_DATA to a folder with tofu/ and models/stories260K")
    return folder
