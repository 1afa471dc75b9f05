"""What a walk along a log takes: the steps that are followed, and the deviations that are carried through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lmc_dist.curvature import HVPConfig
from lmc_dist.planner.facts import LogFacts, Passes, RequestFacts, busiest, tokens
from lmc_dist.planner.machine import Machine
from lmc_dist.unlearn.plan import gradients_per_basis, gradients_per_step


@dataclass(frozen=True)
class Cost:
    """Of a walk along the log."""

    gradients: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    bytes_read: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def __add__(self, other: Cost) -> Cost:
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        parts = {name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names}
        return Cost(self.gradients + other.gradients, parts, self.bytes_read + other.bytes_read)


@dataclass(frozen=True)
class Span:
    """A deviation under way: from its first source to the last step that it is carried through."""

    start: int
    last: int


def spans_of(request: RequestFacts, units: str, K: int | None, num_steps: int) -> list[Span]:
    """The deviations of a request, by start: one `joint`, one a `sample`, or one a `batch`; with K, each source's own."""
    end = num_steps - 1
    found: list[Span] = []
    seen: set[int] = set()
    for step in sorted(request.edits):
        edit = request.edits[step]
        if K is not None:
            count = len(edit.units) if units == "sample" and not edit.skipped else 1
            found += [Span(step, min(step + K, end))] * count
            continue
        here = {"joint": (-1,), "batch": (step,), "sample": (step,) if edit.skipped else edit.units}[units]
        found += [Span(step, end) for unit in here if unit not in seen]
        seen.update(here)
    return found


class Walk:
    """Costs of walks along one log by ranks of one machine; sums over steps are kept, so that many walks cost little."""

    def __init__(self, request: RequestFacts, log: LogFacts, machine: Machine) -> None:
        self.request, self.log, self.machine = request, log, machine
        self.kept = [request.edits[s].kept if s in request.edits else log.passes[s] for s in range(log.num_steps)]
        edits = request.edits
        self.taken = [log.applied[s] and not (s in edits and edits[s].skipped) for s in range(log.num_steps)]
        busy: dict[int, int] = {}  # equal steps of imagined runs share their passes

        def most(passes: Passes) -> int:
            if id(passes) not in busy:
                busy[id(passes)] = busiest(passes, machine.world_size)
            return busy[id(passes)]

        self.busy, self.busy_whole = [most(passes) for passes in self.kept], [most(passes) for passes in log.passes]
        self.share = [tokens(kept) / max(tokens(all_), 1) for kept, all_ in zip(self.kept, log.passes, strict=True)]
        self.taken_before = list(accumulate(self.taken, initial=0))
        self.applied_before = list(accumulate(log.applied, initial=0))
        path = (machine.gradient(n) * a for n, a in zip(self.busy_whole, log.applied, strict=True))
        self.path_before = list(accumulate(path if log.computes_path else [0.0] * log.num_steps, initial=0.0))
        self.sources = {s: machine.gradient(most(e.source)) for s, e in edits.items() if not e.skipped}
        self._sums: dict[tuple[str, int], tuple[list[float], list[float]]] = {}

    def sums(self, config: HVPConfig, m: int) -> tuple[list[float], list[float]]:
        """(seconds, gradients) of m products at each of the steps before s."""
        key = (config.mode, m)
        if key not in self._sums:
            seconds, gradients = [0.0], [0.0]
            for taken, busy, share in zip(self.taken, self.busy, self.share, strict=True):
                seconds.append(self._product(config, m, busy) if taken else 0.0)
                gradients.append(gradients_per_step(config, m) * share if taken else 0.0)
            self._sums[key] = list(accumulate(seconds)), list(accumulate(gradients))
        return self._sums[key]

    def _product(self, config: HVPConfig, m: int, busy: int) -> float:
        machine = self.machine
        if config.mode in ("none", "fisher", "low_rank"):
            return 0.0
        if config.mode == "diag":
            whole, rest = divmod(max(config.probes, 1), 8)
            seconds = whole * machine.product("GGN", 8, busy)
            return seconds + (machine.product("GGN", rest, busy) if rest else 0.0)
        return machine.product(config.mode, m, busy)

    def sweep(self, spans: Sequence[Span], config: HVPConfig, head: int = 0) -> Cost:
        """One walk with these deviations, the first `head` steps of which are replayed."""
        log, machine, request = self.log, self.machine, self.request
        first, stop = spans[0].start, log.num_steps
        start = log.anchor(first)
        taken, head_end = self.taken, min(first + head, stop)
        products, gradients, moves = 0.0, 0.0, 0
        for low, high, m in counts(spans, stop):
            moves += m * (self.taken_before[high] - self.taken_before[low])
            if (low := max(low, head_end)) < high:
                seconds, cost = self.sums(config, m)
                products += seconds[high] - seconds[low]
                gradients += cost[high] - cost[low]
        if config.mode == "low_rank":
            basis = config.rank * 2 + 9
            at = [s for s in range(max(first + 1, head_end), stop) if taken[s]][:: config.refresh]
            one = [machine.product(config.base, 8, self.busy[s]) / 8 for s in at]
            products += basis * sum(one)
            gradients += sum(gradients_per_basis(config, basis) * self.share[s] for s in at)
        replayed = [s for s in range(first + 1, head_end) if taken[s]]  # at the first, only its source is new
        times = 2 if log.is_coarse else 1
        head_seconds = times * sum(machine.gradient(self.busy[s]) for s in replayed)
        gradients += times * sum(self.share[s] for s in replayed)
        if config.mode == "secant" and log.is_coarse:
            at = [s for s in range(max(first + 1, head_end), stop) if taken[s]]
            products += sum(machine.gradient(self.busy[s]) for s in at)
            gradients += sum(self.share[s] for s in at)
        source = 0.0
        for step, edit in request.edits.items():
            if not edit.skipped:
                source += self.sources[step]
                gradients += tokens(edit.source) / max(tokens(log.passes[step]), 1)
        followed = self.applied_before[stop] - self.applied_before[start]
        path = self.path_before[stop] - self.path_before[start]
        gradients += followed * log.computes_path
        stored = log.step_bytes + (log.gradient_bytes if log.state and log.logs_gradients else 0)
        parts = {
            "following the log": followed * machine.follow() + machine.snapshot(),
            "gradients of the path": path,
            "sources": source,
            "replayed head": head_seconds,
            "products": products,
            "update rule": machine.tangent(1) * moves,
        }
        return Cost(gradients, parts, followed * stored + log.snapshot_bytes)

    def steps(self, start: int) -> Cost:
        """Steps of training run again from `start` to the end."""
        log, machine = self.log, self.machine
        run = [s for s in range(start, log.num_steps) if self.taken[s]]
        seconds = sum(machine.training_step(self.busy_whole[s]) for s in run)
        return Cost(float(len(run)), {"engine": machine.start(), "steps": seconds})


def counts(spans: Sequence[Span], stop: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, deviations under way) for the steps low … high − 1; a source takes part from the step after its own."""
    events: dict[int, int] = {}
    for span in spans:
        events[span.start + 1] = events.get(span.start + 1, 0) + 1
        events[span.last + 1] = events.get(span.last + 1, 0) - 1
    active, places = 0, sorted(events)
    for low, high in zip(places, [*places[1:], stop], strict=True):
        active += events[low]
        if active and low < high:
            yield low, min(high, stop), active
