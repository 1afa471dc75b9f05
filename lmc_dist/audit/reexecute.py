"""One propagation step of a finished run, taken again from its log, to check the norms that were recorded.

The step is drawn when it is checked, so whoever wrote the record could not know it. v before the step is not stored: it is
carried there again, by the code that found it, from the first source or from the last mark before the step that the run kept;
every norm on the way that was recorded is compared too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lmc_dist.audit.digests import read_salt
from lmc_dist.audit.files import MARKS
from lmc_dist.audit.request import described_request, salt_path, unit_name
from lmc_dist.audit.weights import weights_problems
from lmc_dist.config import AuditConfig, Config, PrivacyConfig, UnlearnConfig, WandbConfig
from lmc_dist.console import StepProgress
from lmc_dist.errors import LmcError
from lmc_dist.runtime import Runtime, agreement, broadcast_object
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.unlearn.head import Head
from lmc_dist.unlearn.marks import Mark, Marks
from lmc_dist.unlearn.problem import Problem, SweepResult
from lmc_dist.unlearn.run import REPLAY, UnlearningRun
from lmc_dist.unlearn.status import Status
from lmc_dist.unlearn.sweep import Sweep
from lmc_dist.unlearn.totals import Totals
from lmc_dist.unlearn.units import Unit, joint_unit

# The same ranks on the same machine give the same bits; another number of them adds up in another order.
TOLERANCE = 1e-4

Norms = Sequence[Sequence[Any]]  # (step, ‖v‖ after it) along a window


@dataclass(frozen=True)
class Reexecution:
    """What came of taking a step again.

    Attributes:
        unit: Whose, as the record names it.
        step: The step that was drawn; None where the run has no steps of its own to take again.
        begun: Step before which it began.
        compared: Recorded norms that were compared.
        difference: Largest relative difference of one.
        problems: Norms that are not what was recorded.
        note: Why no step was taken.
    """

    unit: str = ""
    step: int | None = None
    begun: int = 0
    compared: int = 0
    difference: float = 0.0
    problems: tuple[str, ...] = ()
    note: str = ""


def draw(norms: Sequence[Norms | None], seed: int) -> tuple[int, int] | None:
    """(record, step) by chance: a record, and one of its recorded steps that v was carried through. Pure."""
    chance = random.Random(seed)
    with_steps = [i for i, found in enumerate(norms) if found]
    if not with_steps:
        return None
    record = chance.choice(with_steps)
    known = norms[record]
    assert known is not None
    return record, int(chance.choice(known[1:] or known)[0])


def reexecute(
    config: Config, runtime: Runtime, output: Path, body: Mapping[str, Any], norms: list[Any], seed: int
) -> Reexecution:
    """Takes a step of a run again. Collective.

    Args:
        config: Log, data, model and request; how it was computed is taken from the record.
        runtime: This rank.
        output: Of the run.
        body: Its record.
        norms: Content of norms.json.
        seed: Of the draw.

    Raises:
        LmcError: On every rank: another log or request than the record's, no salt, and whatever the sweep raises.
    """
    with agreement():
        asked = _settings(config, output, body)
    salt = _salt(output, body)
    run = UnlearningRun(asked, runtime)
    with agreement():
        _require_same(run, output, body, salt)
    weights = weights_problems(run.log, output, is_replay=run.methods()[0].name == REPLAY)
    found = _take_step(run, output, body, norms, seed, salt)
    return replace(found, problems=(*weights, *found.problems))


def _take_step(
    run: UnlearningRun, output: Path, body: Mapping[str, Any], norms: list[Any], seed: int, salt: bytes
) -> Reexecution:
    """Draws a step and takes it. Collective."""
    method = run.methods()[0]
    if method.name == REPLAY:
        return Reexecution(
            note="exact replay carries no vector along: the same `lmc unlearn` command again gives the same model_checksum"
        )
    drawn = draw(norms, seed)
    if drawn is None:
        if run.kept is None:
            return Reexecution(problems=("norms.json holds no norm along the way, and the run has taken them down",))
        # Under plain SGD, from source to source in closed form, which takes no model.
        found = run.compute(method, run.log.theta(run.log.num_steps)).correction.audit
        pairs = [
            (f"unit {row['unit']}: ‖v‖ at the end", row["v_norm"], record.v_norm)
            for row, record in zip(body["units"], found, strict=True)
        ]
        return _compared(Reexecution(unit="all", note="carried in closed form: all of it was taken again"), pairs)
    index, step = drawn
    row, recorded = body["units"][index], {int(s): float(norm) for s, norm in norms[index]}
    with agreement():
        unit = _unit_of(run, row["unit"], salt)
    marks = None
    if (output / MARKS).is_dir():
        dtype = torch.promote_types(run.log.dtype, torch.float32)
        marks = KeptMarks(output / MARKS, run.log.layout, dtype, row["tz"], step)
    head = Head(method.replay_head, run.config.unlearn.head_tolerance)  # type: ignore[arg-type]
    watched = Watched(run.problem(method, run.config.unlearn.tol), unit, head, marks, (row["tz"], step))
    with StepProgress("verify", watched.sources.steps[0], step, run.progress) as show:
        found_norms = watched.go(show)
    pairs = [
        (f"unit {row['unit']}: ‖v‖ after step {s}", recorded[s], norm)
        for s, norm in found_norms.items()
        if s in recorded
    ]
    begun = watched.sources.steps[0] if marks is None or marks.loaded is None else marks.loaded
    done = _compared(Reexecution(row["unit"], step, begun), pairs)
    if step not in found_norms:
        done = replace(done, problems=(*done.problems, f"unit {row['unit']}: its vector ends before step {step}"))
    return done


class KeptMarks(Marks):
    """Marks that a finished run kept, for a window up to a step; none is added.

    Attributes:
        loaded: Step of the one that was loaded.
    """

    def __init__(self, folder: Path, layout: ShardLayout, dtype: torch.dtype, tz: int, until: int) -> None:
        super().__init__(folder, layout, dtype, every=1, keep=True)
        self.tz, self.until = tz, until
        self.loaded: int | None = None

    def load(self, until: int | None = None) -> Mark | None:
        mark = super().load(self.until if until is None else until)
        if mark is None or mark.step <= self.tz:  # the window was not open yet
            return None
        mark.windows[:] = [window for window in mark.windows if window.tz == self.tz]
        self.loaded = mark.step
        return mark

    def is_due(self, step: int) -> bool:
        return False


class _Reached(Exception):
    """The step is through."""


class Watched(Sweep):
    """A unit's sweep that notes the norm of one of its windows and ends after a step.

    Args:
        problem: As the run's.
        unit: Whose.
        head: As the run's.
        marks: Where to begin; None begins at the first source.
        window: (Step of its first source, last step to take).
    """

    def __init__(
        self, problem: Problem, unit: Unit, head: Head, marks: KeptMarks | None, window: tuple[int, int]
    ) -> None:
        super().__init__(problem, [unit], head, marks)
        self.tz, self.until = window
        self.found: dict[int, float] = {}
        # Each source has a window of its own where K is finite; the others' change nothing in it, as long as C·v is linear.
        if self.K is not None and not head.is_on and problem.config.mode != "secant":
            self.sources.only(self.tz)
            self.totals = Totals(dict(self.sources.last), self.tau)

    def go(self, progress: Callable[[Status], None]) -> dict[int, float]:
        """‖v‖ after each step. Collective."""
        with suppress(_Reached):
            self.run(lambda result: None, progress)
        return self.found

    def _restore(self, mark: Mark) -> int:
        step = super()._restore(mark)
        for window in self.windows:
            if window.tz == self.tz:
                self.found[step - 1] = window.at.v.norm()  # of what the mark holds, whatever it says of it
        return step

    def _retire(self, step: int, finished: Callable[[SweepResult], None]) -> None:
        for window in self.windows:
            if window.tz == self.tz:
                self.found[step] = window.norm
        if step >= self.until:
            raise _Reached
        super()._retire(step, finished)


def _settings(config: Config, output: Path, body: Mapping[str, Any]) -> Config:
    """The settings that the run had, with log, data, model and request as they are given now. Local."""
    recorded = body["config"]["unlearn"]
    if unknown := set(recorded) - {field.name for field in fields(UnlearnConfig)}:
        raise LmcError(f"the run has settings that this version does not know: unlearn.{min(unknown)}")
    unlearn = replace(UnlearnConfig(**recorded), strategy="given", store_units=False, mark_every=None)
    return replace(
        config,
        unlearn=unlearn,
        privacy=PrivacyConfig(),
        audit=AuditConfig(),
        wandb=WandbConfig(),
        reference="none",
        compare="",
        output_dir=f"{output}.verify",  # nothing is written there
        overwrite=False,
    )


def _salt(output: Path, body: Mapping[str, Any]) -> bytes:
    """The run's secret, from the first rank. Collective."""
    salt = b""
    with agreement():
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            salt = read_salt(salt_path(body["config"], output))
    return bytes(broadcast_object(salt))


def _unit_of(run: UnlearningRun, name: str, salt: bytes) -> Unit:
    """The unit that a record is of. Local."""
    if run.units is None:
        return joint_unit(run.request)
    found = next((unit for unit in run.units if unit_name(unit.name, salt) == name), None)
    if found is None:
        raise LmcError(f"{name} is none of the units that unlearn.units={run.config.unlearn.units} gives now")
    return found


def _require_same(run: UnlearningRun, output: Path, body: Mapping[str, Any], salt: bytes) -> None:
    if run.log.fingerprint != body["log"]["fingerprint"]:
        raise LmcError(f"{output} is a run on another log than {run.log.path}: give its own (--log_dir)")
    if described_request(run.asked_for, salt)["digest"] != body["request"]["digest"]:
        raise LmcError(f"{output} forgot something else than is asked for here: give its --forget option")


def _compared(found: Reexecution, pairs: list[tuple[str, float, float]]) -> Reexecution:
    """With what comparing (place, recorded, found) gives. Pure."""
    differences = [abs(now - then) / max(abs(now), abs(then), 1e-300) for _, then, now in pairs]
    problems = tuple(
        f"{place} is {now:.6g}, recorded {then:.6g}"
        for (place, then, now), difference in zip(pairs, differences, strict=True)
        if not difference <= TOLERANCE
    )
    if not pairs:
        problems = ("no recorded norm was met on the way: the record is not of these steps",)
    return replace(found, compared=len(pairs), difference=max(differences, default=0.0), problems=problems)
