"""Every way to answer a request, with what it takes: `plan` is a pure function of facts and a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lmc_dist.curvature import HVPConfig
from lmc_dist.planner.facts import LogFacts, RequestFacts
from lmc_dist.planner.machine import Machine
from lmc_dist.planner.memory import Peak, fits_in, largest_block, largest_step, replay_peak, sweep_peak
from lmc_dist.planner.walk import Cost, Walk, counts, spans_of

MOST = 8  # vectors at once where none are asked for: more share little more


@dataclass(frozen=True)
class Options:
    """What is planned for.

    Attributes:
        head: Steps of a replayed head.
        K: Of the truncated sweep; None leaves it out.
        block: Vectors at once in sweeps of single units; None is as many as fit, 8 at most.
        groups: Parts of the ranks that share those units.
        probes: Of `diag`.
        rank: Of `low_rank`.
        base: Of `low_rank`.
        refresh: Of `low_rank`.
        max_error: Largest rel_error that will do.
    """

    head: int = 10
    K: int | None = None
    block: int | None = None
    groups: int = 1
    probes: int = 8
    rank: int = 16
    base: str = "GGN"
    refresh: int = 10
    max_error: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The rel_error that a strategy had on control deletions of this log."""

    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.errors) / len(self.errors)


@dataclass(frozen=True)
class Strategy:
    """One way, and the prediction.

    Attributes:
        name: In the table; measurements are kept by it.
        settings: The options of `lmc unlearn` that it stands for.
        gradients: Cost in gradients of a whole training batch.
        seconds: Of the computation, without loading model and data.
        parts: What the seconds are made of.
        bytes_read: From the log, by all ranks.
        peak_bytes: Of a rank, on its device.
        host_bytes: Of a rank in the host's memory; None where that is the device's.
        rel_error: Expected; None where nothing is known.
        basis: What that rests on.
        obstacle: Why it is not possible; None where it is.
    """

    name: str
    settings: Mapping[str, Any]
    gradients: float
    seconds: float
    parts: Mapping[str, float]
    bytes_read: int
    peak_bytes: int
    host_bytes: int | None
    rel_error: float | None
    basis: str
    obstacle: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    request: RequestFacts,
    log: LogFacts,
    machine: Machine,
    options: Options | None = None,
    measured: Mapping[str, Measurement] | None = None,
) -> list[Strategy]:
    """All strategies for a request, the possible ones first, each group by seconds. Pure.

    Args:
        request: What is forgotten.
        log: The run.
        machine: Where it would be computed.
        options: Heads, blocks, groups, what will do.
        measured: rel_error by strategy, from control deletions of this log.
    """
    options, measured = options or Options(), measured or {}
    walk = Walk(request, log, machine)
    found = [_joint(walk, mode, options, measured) for mode in _MODES]
    found += [_joint(walk, mode, options, measured, head=options.head) for mode in ("GGN", "exact")]
    if options.K is not None:
        found += [_joint(walk, mode, options, measured, K=options.K) for mode in ("GGN", "exact")]
    found += [_units(walk, mode, options, measured) for mode in ("GGN", "exact")]
    found += [_replay(walk), _retrain(walk)]
    return sorted(found, key=lambda s: (s.obstacle is not None, s.seconds, s.name == "retrain"))


_MODES = ("none", "fisher", "low_rank", "diag", "secant", "GGN", "fd", "exact")


_SHORT = {"none": "tim", "GGN": "ggn"}


def strategy_name(mode: str, head: int | str = 0, K: int | None = None, units: str = "joint") -> str:
    """What a strategy is called, as `compare` spells it where it knows it: `ggn`, `10+exact`, `ggn K=50`, `ggn per sample`."""
    name = (f"{head}+" if head else "") + _SHORT.get(mode, mode)
    return name + (f" K={K}" if K is not None else "") + (f" per {units}" if units != "joint" else "")


def _config(mode: str, options: Options) -> HVPConfig:
    return HVPConfig(mode, probes=options.probes, rank=options.rank, base=options.base, refresh=options.refresh)


def _joint(
    walk: Walk,
    mode: str,
    options: Options,
    measured: Mapping[str, Measurement],
    head: int = 0,
    K: int | None = None,
) -> Strategy:
    """All forgotten data in one deviation, or, with K, one for each step that holds any."""
    log, machine = walk.log, walk.machine
    spans = spans_of(walk.request, "joint", K, log.num_steps)
    cost = walk.sweep(spans, _config(mode, options), head)
    most = max((m for _, _, m in counts(spans, log.num_steps)), default=1)
    passes = largest_step(log, machine.world_size)
    sources, is_cut = walk.request.num_sources, K is not None
    is_propagated = head < log.num_steps - walk.request.first
    peak = sweep_peak(
        log, mode if is_propagated else "none", most, passes, machine.world_size, options, sources, is_cut, head > 0
    )
    settings: dict[str, Any] = {"hessian_mode": mode}
    settings |= ({"replay_head": head} if head else {}) | ({"K": K} if K is not None else {})
    name = strategy_name(mode, head, K)
    return _strategy(name, settings, cost, peak, log.no_sweep, machine, measured)


def _units(walk: Walk, mode: str, options: Options, measured: Mapping[str, Measurement]) -> Strategy:
    """A deviation for each forgotten sample (batch), `block` at once, each block walking along the log by itself.

    Groups of ranks take blocks in turn; each group holds the whole model on fewer ranks, so products take it longer.
    """
    log, groups = walk.log, options.groups
    units = "batch" if walk.request.kind == "skip" else "sample"
    spans = spans_of(walk.request, units, None, log.num_steps)
    ranks = max(walk.machine.world_size // groups, 1)
    machine = walk.machine.on(ranks)
    mine = Walk(walk.request, log, machine) if groups > 1 else walk
    most = min(len(spans), MOST)
    block = options.block or most
    if options.block is None and machine.memory is not None:
        most = largest_block(
            log, mode, ranks, options, machine.memory, machine.host_memory, most, walk.request.num_sources
        )
        block = max(1, most)
    blocks = [spans[i : i + block] for i in range(0, len(spans), block)]
    config = _config(mode, options)
    costs = [mine.sweep(part, config) for part in blocks]
    total = sum(costs, Cost())
    by_group = [sum(costs[group::groups], Cost()) for group in range(groups)]
    slowest = max(by_group, key=lambda cost: cost.seconds)
    passes, m = largest_step(log, ranks), min(block, len(spans))
    peak = sweep_peak(log, mode, m, passes, ranks, options, walk.request.num_sources)
    settings = {"hessian_mode": mode, "units": units, "block": block, "unit_groups": groups}
    cost = Cost(total.gradients, slowest.parts, total.bytes_read)
    name = strategy_name(mode, units=units)
    return _strategy(name, settings, cost, peak, log.no_sweep, walk.machine, measured)


def _replay(walk: Walk) -> Strategy:
    log, first = walk.log, walk.request.first
    start = log.anchor(first)
    if start == first and start > min(log.snapshots):
        start = log.anchor(start - 1)  # some unchanged steps, whose checksums certify the rest
    cost = walk.steps(start) + Cost(0.0, {"engine": walk.machine.snapshot()}, log.snapshot_bytes)
    peak = replay_peak(log, largest_step(log, walk.machine.world_size), walk.machine.world_size)
    return _strategy("replay", {"replay_head": "all"}, cost, peak, log.no_replay, walk.machine, {}, exact=True)


def _retrain(walk: Walk) -> Strategy:
    log = walk.log
    peak = replay_peak(log, largest_step(log, walk.machine.world_size), walk.machine.world_size)
    return _strategy("retrain", {}, walk.steps(0), peak, None, walk.machine, {}, exact=True)


def _strategy(
    name: str,
    settings: Mapping[str, Any],
    cost: Cost,
    peak: Peak,
    obstacle: str | None,
    machine: Machine,
    measured: Mapping[str, Measurement],
    exact: bool = False,
) -> Strategy:
    error, basis = (0.0, "by construction") if exact else (None, "unknown")
    if name in measured:
        error, count = measured[name].mean, len(measured[name].errors)
        basis = f"measured on {count} control deletion{'s' * (count != 1)} of this log"
    host = machine.host_memory
    if obstacle is None and machine.memory is not None and not fits_in(peak, machine.memory, host):
        if host is None or peak.work > machine.memory:
            needed, there, where = peak.together if host is None else peak.work, machine.memory, ""
        else:
            needed, there, where = peak.host, host, " of host memory"
        obstacle = f"takes {needed / 2**30:.1f} GiB{where} a rank, there are {there / 2**30:.1f}"
    parts = {part: seconds for part, seconds in cost.parts.items() if seconds}
    return Strategy(
        name,
        settings,
        cost.gradients,
        cost.seconds,
        parts,
        round(cost.bytes_read),
        round(peak.together if host is None else peak.work),
        None if host is None else round(peak.host),
        error,
        basis,
        obstacle,
    )


def peak_bytes(strategy: Strategy, log: LogFacts, world_size: int, options: Options | None = None) -> Peak:
    """Peak of a strategy on another number of ranks. Pure."""
    settings, options = strategy.settings, options or Options()
    if "hessian_mode" not in settings:
        return replay_peak(log, largest_step(log, world_size), world_size)
    ranks, mode = world_size // settings.get("unit_groups", 1), settings["hessian_mode"]
    head, block = "replay_head" in settings, settings.get("block", 1)
    return sweep_peak(log, mode, block, largest_step(log, ranks), ranks, options, has_head=head)
