"""Units of an unlearning run: what they are, how many go together, on how many ranks each, and what is shown meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.config import UnlearnConfig
from lmc_dist.console import UnitProgress
from lmc_dist.errors import LmcError
from lmc_dist.planner.facts import LogFacts, RequestFacts, model_facts
from lmc_dist.planner.free_memory import free_memory
from lmc_dist.planner.memory import largest_block, largest_step, sweep_peak
from lmc_dist.planner.reading import log_facts, request_facts
from lmc_dist.runtime import Runtime, agreement
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.record import StepRecord
from lmc_dist.unlearn.correction import Correction
from lmc_dist.unlearn.memory_guard import USABLE
from lmc_dist.unlearn.problem import Problem
from lmc_dist.unlearn.unit_sweeps import correct_units
from lmc_dist.unlearn.units import Unit, sources_by_step, split_request

MOST = 8  # vectors at once, unless asked otherwise: more of them gain little (bench/hvp.py)


def check_units(unlearn: UnlearnConfig) -> None:
    """Checks the settings of units as far as they can be without a log. Local.

    Raises:
        LmcError: One is out of range, or does not go with the others.
    """
    for name in ("unit_groups", "block"):
        value = getattr(unlearn, name)
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise LmcError(f"unlearn.{name} must be at least 1, or auto, got {value}")
    if unlearn.mark_every is not None and unlearn.mark_every < 1:
        raise LmcError(f"unlearn.mark_every must be at least 1, or null, got {unlearn.mark_every}")
    if unlearn.tol is not None and not unlearn.tol > 0:
        raise LmcError(f"unlearn.tol must be above 0, or null, got {unlearn.tol}")
    if unlearn.units == "joint":
        if unlearn.store_units or unlearn.unit_groups not in (1, "auto"):
            raise LmcError("unlearn.store_units and unlearn.unit_groups are for units: set unlearn.units")
        return
    if unlearn.replay_head != 0 or unlearn.hessian_mode == "secant":
        what = "hessian_mode secant" if unlearn.hessian_mode == "secant" else f"replay_head={unlearn.replay_head}"
        raise LmcError(
            f"{what} is not linear in what is forgotten, so it cannot be split into units: use unlearn.units=joint, or "
            "another hessian_mode without a head"
        )


def units_of(unlearn: UnlearnConfig, request: Counterfactual) -> list[Unit]:
    """The units that were asked for. Local.

    Raises:
        LmcError: No such way to split, or a file that does not.
    """
    own = "batch" if request.kind == "skip" else "sample"
    if unlearn.units == own:
        return split_request(request)
    if unlearn.units in ("sample", "batch"):
        raise LmcError(f"unlearn.units={unlearn.units}, and {own} ids are forgotten: use {own}, or a file of units")
    path = Path(unlearn.units)
    try:
        named = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LmcError(
            f"unlearn.units must be joint, sample, batch, or a JSON file {{name: [ids]}}; {path}: {error}"
        ) from error
    if not isinstance(named, dict) or not all(
        isinstance(ids, list) and all(type(i) is int for i in ids) for ids in named.values()
    ):
        raise LmcError(f"unlearn.units: {path} must be an object of names with lists of ids")
    return split_request(request, named)


def correct(
    problem: Problem,
    units: list[Unit],
    unlearn: UnlearnConfig,
    runtime: Runtime,
    folder: Path,
    dataset: Any,
    make_module: Callable[[ShardLayout], ShardedModule],
    progress: UnitProgress,
) -> Correction:
    """All units, on as many groups and in as large blocks as asked for or as fit. Collective.

    Raises:
        LmcError: Not one vector fits, and whatever `correct_units` raises.
    """
    with agreement():
        log, request = problem.trajectory, problem.counterfactual
        assert problem.module is not None and problem.batches is not None
        wanted = request_facts(log, request, problem.batches, dataset)  # type: ignore[arg-type]
        facts = log_facts(log, model_facts(problem.module.module), dataset, wanted.first)  # type: ignore[arg-type]
    memory, host = (_smallest(x) for x in free_memory(runtime.device))
    assert memory is not None
    with agreement():
        groups, width = sizes(facts, wanted, unlearn, len(units), runtime.world_size, memory, host)
    with progress as show:
        return correct_units(
            replace(problem, tol=unlearn.tol, block=width),
            units,
            folder,
            make_module,
            groups,
            width,
            unlearn.mark_every,
            show,
        )


def sizes(
    facts: LogFacts,
    request: RequestFacts,
    unlearn: UnlearnConfig,
    num_units: int,
    world_size: int,
    memory: float,
    host: float | None,
) -> tuple[int, int]:
    """(groups, vectors at once) as asked for, or as fit into memory. Local.

    `auto` groups are as many as leave each enough ranks for the vectors it is to carry: the fewer ranks share a model, the
    less they wait for each other.

    Raises:
        LmcError: Not one vector fits.
    """
    most = min(num_units, MOST if unlearn.block == "auto" else int(unlearn.block))

    def fitting(ranks: int) -> int:
        free = (USABLE * memory, None if host is None else USABLE * host)
        return largest_block(facts, unlearn.hessian_mode, ranks, unlearn, *free, most, request.num_sources)

    if unlearn.unit_groups == "auto":
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        ranks = next((n for n in divisors if fitting(n) >= most), world_size)
        groups = min(world_size // ranks, max(d for d in divisors if d <= num_units))
        ranks = world_size // groups
    else:
        groups = int(unlearn.unit_groups)
        if world_size % groups:
            raise LmcError(f"unlearn.unit_groups={groups} does not divide {world_size} ranks")
        ranks = world_size // groups
    width = fitting(ranks)
    if width < 1:
        peak = sweep_peak(
            facts, unlearn.hessian_mode, 1, largest_step(facts, ranks), ranks, unlearn, request.num_sources
        )
        raise LmcError(
            f"a sweep of one vector takes {peak.together / 2**30:.2f} GiB on each of {ranks} ranks, and "
            f"{memory / 2**30:.2f} are free: use more ranks a group (unlearn.unit_groups), or replay_head=all"
        )
    return groups, width


def _smallest(value: float | None) -> float | None:
    """The smallest of all ranks. Collective, or local for None, which all ranks have."""
    if value is None:
        return None
    found = torch.tensor([value], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def described(units: list[Unit], touched: list[StepRecord]) -> Mapping[str, Any]:
    """What result.json says of units."""
    records = {record.step: record for record in touched}
    samples: dict[str, set[int]] = {}
    for step, present in sources_by_step(units, touched).items():
        for unit in present:
            samples.setdefault(unit.name, set()).update(unit.sample_ids or records[step].sample_ids)
    return {
        "included": sorted(samples),
        "undone": [],
        "samples": {name: sorted(ids) for name, ids in samples.items()},
    }
