"""The recursion: (v, dσ) is carried along the logged steps (docs/method.md §3).

    dg_s = (C_s + λI) v_s + b_s
    (v_{s+1}, dσ_{s+1}) = JVP of Φ_s at (θ_s, σ_s, g_s) along (v_s, dσ_s, dg_s),   or less what the step did if it is skipped

A sweep carries several units at once, each in a vector of its own; a request that is not split is one unit. With
K = null all sources of a unit enter one vector. A finite K truncates each source on its own, so each step with a source
opens a window of K steps; the windows' end values add up, since the recursion is linear. The first steps of a request
that is not split can be replayed instead (unlearn/head.py).

Where the problem is `finite` the optimizer's step is taken as it is, with the change of the gradient that curvature tells:

    dg_s = (C_s + λI) v_s + b_s                        (v_{s+1}, dσ_{s+1}) = Φ_s(θ_s + v_s, σ_s + dσ_s, g_s + dg_s) − Φ_s(θ_s, σ_s, g_s)

which needs no more gradients, holds where a deletion changes Adam's second moments by as much as they are, and is not linear
in what is forgotten: one joint vector, carried to the end.

Skipped steps leave the counterfactual optimizer's counter behind the actual one. All later steps are linearised with its
counter, and the finite difference between Φ with the one counter and with the other is a source of its own.

Long, because it is one recursion: the three ways through a step share its windows, their ends and their marks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.stopping import stop_asked, stopped
from lmc_dist.trajectory.counterfactual import EditedStep, edit_step
from lmc_dist.trajectory.edits import union
from lmc_dist.unlearn.audit import AuditRecord
from lmc_dist.unlearn.head import Head, gradient_change, kept_gradient
from lmc_dist.unlearn.marks import Mark, Marks
from lmc_dist.unlearn.path import TrainingPath
from lmc_dist.unlearn.problem import Problem, SweepResult
from lmc_dist.unlearn.source import Source, Sources
from lmc_dist.unlearn.status import Progress, Status, unwatched
from lmc_dist.unlearn.step_products import StepProducts
from lmc_dist.unlearn.totals import Totals
from lmc_dist.unlearn.units import JOINT, Unit, joint_unit, sources_by_step
from lmc_dist.unlearn.windows import GrowthGuard, Window
from lmc_dist.update_rules import Deviation, Point


def sweep(problem: Problem, head: Head | None = None, progress: Progress = unwatched) -> SweepResult:
    """Propagates the sources of a whole request to the end of the trajectory. Collective.

    Args:
        problem: What to correct, and how.
        head: Steps to replay first; None is none.
        progress: Called after each step, from the first that holds forgotten data on.

    Raises:
        LmcError: Nothing to forget in the log, divergence, damaged log, an update rule that the log does not follow.
    """
    results: list[SweepResult] = []
    Sweep(problem, [joint_unit(problem.counterfactual)], head).run(results.append, progress)
    return results[0]


class Sweep:
    """Units on their way along the trajectory.

    Args:
        problem: What to correct, and how.
        units: Those of this sweep, each with a source in the log.
        head: Steps to replay first, for a single unit that is the whole request.
        marks: Where its state is kept from time to time, to go on from after an interruption.

    Attributes:
        windows: Vectors under way.
        totals: What units have found that are not through.
        cost: Gradients of a whole batch computed so far.

    Raises:
        LmcError: Nothing to forget in the log.
    """

    def __init__(
        self, problem: Problem, units: Sequence[Unit], head: Head | None = None, marks: Marks | None = None
    ) -> None:
        self.problem, self.head, self.marks = problem, head or Head(0, 0.05), marks
        self.trajectory, self.K, self.tau = problem.trajectory, problem.K, problem.trajectory.num_steps
        self.path = TrainingPath(self.trajectory, problem.module, problem.loss, problem.batches)
        self.products = StepProducts(
            problem.config,
            problem.module,
            problem.loss,
            problem.batches,
            problem.kept,
            problem.block,
            self._anchor,
            lambda step: (self.trajectory.theta(step), self._edited(step)),
        )
        self.sources = Sources(units, self.trajectory, problem.module, problem.loss, problem.batches)
        self.rule = self.path.rule
        self.guard = GrowthGuard(self.rule, problem.tol)
        self.windows: list[Window] = []
        self.totals = Totals(dict(self.sources.last), self.tau)
        self.num_units = len(self.totals.left)
        if not self.totals.left:
            raise LmcError("no logged step holds any of the forgotten data: there is nothing to correct")
        # Steps that the counterfactual run skips, each with the last step that it is felt in. All units count them, also
        # those that are not theirs: they share one propagator.
        touched = sources_by_step([joint_unit(problem.counterfactual)], self.trajectory.records())
        self.felt_until = {step: self._last(step) for step in touched if self._edited(step).skipped}
        self.first = min(step for step in touched if step >= self.trajectory.first_step)
        if any(step > self.first for step in self.trajectory.edits) and (self.K is not None or self.num_units > 1):
            raise LmcError(
                f"the run was corrected at step {max(self.trajectory.edits)}, past which a deviation is carried as a whole: "
                "use K=null and one joint correction, not units"
            )
        if problem.is_finite and (self.K is not None or self.num_units > 1):
            raise LmcError(
                "update 'finite' is not linear in what is forgotten: use K=null and one joint correction, not units"
            )
        self.started = time.perf_counter()
        self._earlier_cost = 0.0
        self._norms, self._growth = [0.0], 1.0

    @property
    def cost(self) -> float:
        return self._earlier_cost + self.path.cost + self.products.cost + self.sources.cost

    def run(self, finished: Callable[[SweepResult], None], progress: Progress = unwatched) -> None:
        """Goes to the end, or until all units are through. Collective.

        Args:
            finished: Takes each unit's result as soon as there is one.
            progress: Called after each step, from the first that holds data of these units on.

        Raises:
            LmcError: Divergence, damaged log, an update rule that the log does not follow.
        """
        first, touched = self.sources.steps[0], set(self.sources.steps)
        rates = [self.trajectory.record(step).lr for step in range(first, self.tau)]
        self.peak = tuple(max(rate) for rate in zip(*rates, strict=True))
        mark = self.marks.load() if self.marks is not None else None
        resumed = self._restore(mark) if mark is not None else -1
        if self.marks is not None and mark is None:
            self.marks.newest = first
        for start, stop in self._legs():
            if stop <= resumed:
                continue
            if not start <= resumed:
                self.path.seek(start)
            begin = max(start, resumed)
            with self.trajectory.read_ahead(begin, stop):
                for step in range(begin, stop):
                    if not self.totals.left:
                        break
                    if self.windows or step in touched:
                        self._step(step, finished)
                        progress(self._status(step))
                        self._mark(step + 1)
                        self._stop_if_asked(step + 1)
                    else:
                        self.path.step(step)
                        self.path.pass_edit(step)
        self.guard.warn()

    def _legs(self) -> list[tuple[int, int]]:
        """Stretches [start, stop) of the trajectory to walk: what lies between windows is left out where it can be."""
        legs: list[tuple[int, int]] = []
        for step in self.sources.steps:
            start, stop = self.path.start(step), self.tau if self.head.length else self._last(step) + 1
            if legs and start <= legs[-1][1]:
                legs[-1] = (legs[-1][0], max(stop, legs[-1][1]))
            else:
                legs.append((start, stop))
        return legs

    def _last(self, step: int) -> int:
        """Last step that a source at `step` is propagated through."""
        return self.tau - 1 if self.K is None else min(step + self.K, self.tau - 1)

    def _edited(self, step: int) -> EditedStep:
        counts = None if self.problem.batches is None else self.problem.batches.num_targets
        normalization = self.trajectory.manifest.loss_normalization
        return edit_step(self.trajectory.record(step), self.problem.counterfactual, normalization, counts)  # type: ignore[arg-type]

    def _anchor(self, step: int) -> int:
        """`low_rank`: the step whose basis serves a step, one every `refresh` steps from the request's first source on."""
        origin, refresh = self.first + 1, self.problem.config.refresh
        anchor = origin + (step - origin) // refresh * refresh
        while not self.trajectory.record(anchor).applied or self._edited(anchor).skipped:
            anchor += 1
        return anchor

    # --- one step ------------------------------------------------------------------------------------------------

    def _step(self, step: int, finished: Callable[[SweepResult], None]) -> None:
        """One step of training, and the windows along with it."""
        edited = self._edited(step)
        is_asked = self.head.is_on or self.problem.is_finite or self.problem.config.mode in ("fisher", "secant")
        here, update = self.path.step(step, is_asked and edited.record.applied and not edited.skipped)
        sources = self.sources.at(edited, here.theta)
        if self.head.is_on:
            self._replay(step, here, edited, update, sources)
        elif self.problem.is_finite:
            self._follow(step, here, edited, update, sources)
        else:
            self._propagate(step, here, edited, self.windows, sources)
            self.guard.measure(self.windows, step, self.tau)
            for found, injected in self._injected(step, here, update, sources):
                self._add(step, here, found, injected)
        self._pass_edit(step)
        for window in self.windows:
            window.note(step)
        self._norms = [window.norm for window in self.windows] or [0.0]
        self._growth = max((window.growth for window in self.windows), default=1.0)
        self._retire(step, finished)

    def _pass_edit(self, step: int) -> None:
        """Takes off what a correction after the step has made up for, steps that it took back included. Collective."""
        made_up = self.path.pass_edit(step)
        if made_up is None:
            return
        done = [edit.request for number, edit in self.trajectory.edits.items() if self.first < number <= step + 1]
        request, normalization = reduce(union, done), self.trajectory.manifest.loss_normalization
        counts = None if self.problem.batches is None else self.problem.batches.num_targets

        def is_open(t: int) -> bool:
            return not edit_step(self.trajectory.record(t), request, normalization, counts).skipped  # type: ignore[arg-type]

        self.felt_until |= {t: min(last, step) for t, last in self.felt_until.items() if t <= step and not is_open(t)}
        trial = [self.head.trial] if self.head.trial is not None else []
        for window in [*self.windows, *trial]:
            window.at.add_(made_up)
            window.skipped = [t for t in window.skipped if is_open(t)]
            window.norm = window.at.v.norm()
            window.recent.clear()

    def _status(self, step: int) -> Status:
        """How far it is after a step; norms are those of before vectors were put away that are through."""
        left = len(self.totals.left)
        counts = self.num_units - left, len(self.windows), left
        return Status(step, *counts, min(self._norms), max(self._norms), self._growth)

    def _lags(self, step: int) -> list[int]:
        """Skipped steps that are felt in this one."""
        return [t for t, last in self.felt_until.items() if t < step <= last]

    def _propagate(
        self, step: int, here: Point, edited: EditedStep, windows: Sequence[Window], sources: Sequence[Source]
    ) -> None:
        """Carries windows through a step by its tangent."""
        if not windows or not edited.record.applied or edited.skipped:
            return
        b = next((found.vector for found in sources), None)
        found, calls = self.products(
            step,
            here.theta,
            edited,
            [window.at.v for window in windows],
            lambda: self._gradient(step, here, edited, b),
        )
        lags = self._lags(step)
        along = [(window.at, dg) for window, dg in zip(windows, found, strict=True)]
        moved = self.rule.tangents(here, along, len(lags))
        for window, at in zip(windows, moved, strict=True):
            self.guard.moved(window, at.v)
            window.at, window.steps, window.hvp_calls = at, window.steps + 1, window.hvp_calls + calls
            # Each window answers for its own skipped steps, so that the windows add up to the joint counter.
            for first, stop in _runs([i for i, t in enumerate(lags) if t in window.skipped]):
                gap = self.rule.clock_gap(here, stop, first)
                if gap is not None:
                    window.at.add_(gap)
                    window.entered += gap.v.norm()

    def _gradient(self, step: int, here: Point, edited: EditedStep, b: ShardedVector | None) -> ShardedVector:
        """What `fisher` and `secant` take: the batch gradient as training had it, or as the counterfactual has it."""
        if self.problem.config.mode == "fisher":
            assert here.gradient is not None
            return here.gradient
        return kept_gradient(self.path, step, here, edited, b)

    def _injected(
        self, step: int, here: Point, update: ShardedVector, sources: Sequence[Source]
    ) -> list[tuple[Source, Deviation]]:
        """What the step's sources add: the tangent of the update rule along them, or the step itself, taken back."""
        found = []
        for source in sources:
            if source.vector is not None:
                along = [(self.rule.no_deviation(source.vector), source.vector)]
                (injected,) = self.rule.tangents(here, along, len(self._lags(step)))
            else:
                after = self.path.state.vectors
                state = {key: (after[key] - vector).scale_(-source.part) for key, vector in here.state.vectors.items()}
                injected = Deviation(update * -source.part, state)
            found.append((source, injected))
        return found

    def _add(self, step: int, here: Point, source: Source, injected: Deviation) -> None:
        """A source enters: its unit's window takes it up, or a new one opens."""
        size = injected.v.norm()
        window = next((w for w in self.windows if w.owner == source.unit), None) if self.K is None else None
        if window is None:
            name = f"step-{step}" if source.unit == JOINT and self.K is not None else source.unit
            window = Window(name, source.unit, step, self._last(step), injected, v0_norm=size, norm=size)
            self.windows.append(window)
        else:
            window.at.add_(injected)
            window.norm = window.at.v.norm()
        window.entered += self._reach(here, source) if self.rule.keys else size
        if source.counts:
            window.skipped.append(step)

    def _reach(self, here: Point, source: Source) -> float:
        """How far a source moves θ in one step at the run's largest learning rate.

        An optimizer with momentum moves θ by it later as well, and at warm-up its own step may be 0.
        """
        at = replace(here, lrs=self.peak)
        if source.vector is None:
            return source.part * (self.rule.apply(at)[0] - here.theta).norm()
        return self.rule.tangents(at, [(self.rule.no_deviation(source.vector), source.vector)])[0].v.norm()

    def _replay(
        self, step: int, here: Point, edited: EditedStep, update: ShardedVector, sources: Sequence[Source]
    ) -> None:
        """A step of the head: the joint window takes it as it is, and the trial, if there is one, by its tangent."""
        injected = self._injected(step, here, update, sources)
        if not self.windows:
            name, nothing = JOINT if self.K is None else f"head-{step}", self.rule.no_deviation(here.theta)
            self.windows.append(Window(name, JOINT, step, self.tau - 1, nothing, 0.0, 0.0, replayed=True))
        (joint,) = self.windows
        if (trial := self.head.trial) is not None:
            self._propagate(step, here, edited, [trial], sources)
            joint.hvp_calls, trial.hvp_calls = joint.hvp_calls + trial.hvp_calls, 0
            for _, deviation in injected:
                trial.at.add_(deviation)
        for i, source in enumerate(sources):
            joint.entered += self._reach(here, source) if self.rule.keys else injected[i][1].v.norm()
        if edited.record.applied and edited.skipped:
            joint.at.add_(injected[0][1])
            joint.skipped.append(step)
            self.felt_until[step] = self.tau - 1  # until the head's window ends, wherever that will be
            if trial is not None:
                trial.skipped.append(step)
        elif edited.record.applied:
            b = sources[0].vector if sources else None
            if step == joint.tz and b is not None:
                dg = b  # v = 0
            else:
                dg = gradient_change(self.path, step, here, edited, joint.at.v, b)
            joint.at = self.rule.difference(here, joint.at, dg, len(joint.skipped), self.path.state)
            joint.steps += step > joint.tz
        self.guard.measure(self.windows, step, self.tau)
        if step == joint.tz:
            joint.v0_norm = joint.norm
        self.head.advance(joint)
        if not self.head.is_on and self.K is not None:
            last = max((s for s in self.sources.steps if s <= step), default=step)
            joint.last_step = min(max(last + self.K, step), joint.last_step)
            self.felt_until |= dict.fromkeys(joint.skipped, joint.last_step)

    def _follow(
        self, step: int, here: Point, edited: EditedStep, update: ShardedVector, sources: Sequence[Source]
    ) -> None:
        """The joint window through a step of the optimizer as it is, the gradient's change by curvature."""
        if not self.windows:
            nothing = self.rule.no_deviation(here.theta)
            self.windows.append(Window(JOINT, JOINT, step, self.tau - 1, nothing, 0.0, 0.0))
        (joint,) = self.windows
        injected = self._injected(step, here, update, sources)
        for source, deviation in injected:
            joint.entered += self._reach(here, source) if self.rule.keys else deviation.v.norm()
        if edited.record.applied and edited.skipped:
            joint.at.add_(injected[0][1])
            joint.skipped.append(step)
        elif edited.record.applied:
            b, calls = sources[0].vector if sources else None, 0
            dg = b if b is not None else here.theta.like(torch.zeros_like(here.theta.flat))
            if joint.norm > 0:
                found, calls = self.products(
                    step, here.theta, edited, [joint.at.v], lambda: self._gradient(step, here, edited, b)
                )
                dg = dg + found[0]
            moved = self.rule.difference(here, joint.at, dg, len(joint.skipped), self.path.state)
            self.guard.moved(joint, moved.v)
            joint.at = moved
            joint.steps, joint.hvp_calls = joint.steps + (step > joint.tz), joint.hvp_calls + calls
        self.guard.measure(self.windows, step, self.tau)
        if step == joint.tz:
            joint.v0_norm = joint.norm

    # --- ends ----------------------------------------------------------------------------------------------------

    def _retire(self, step: int, finished: Callable[[SweepResult], None]) -> None:
        """Freezes the windows that are through, and hands over the units that are."""
        through = [w for w in self.windows if step >= w.last_step or self.totals.is_rest(w, step)]
        self.windows = [w for w in self.windows if w not in through]
        for window in through:
            self.totals.add(window, step, self._audit(window, step))
        for unit, total in self.totals.take(step, {window.owner for window in self.windows}):
            assert total.v is not None
            state = total.state or dict(self.rule.no_deviation(total.v).state)
            counter = self.path.state.step + sum(
                self.trajectory.record(s).applied for s in range(step + 1, self.tau if self.rule.keys else 0)
            )
            finished(SweepResult(total.v, tuple(total.audit), self.cost, state, total.behind, counter, unit))

    def _audit(self, window: Window, step: int) -> AuditRecord:
        problem = self.problem
        return AuditRecord(
            unit=window.name,
            tz=window.tz,
            tau=self.tau,
            K_used=window.steps,
            v_norm=window.norm,
            v0_norm=window.v0_norm,
            hvp_calls=window.hvp_calls,
            mode=problem.config.mode if problem.kept is None else f"low_rank:{problem.kept.name}",
            damping=problem.config.damping,
            counterfactual=problem.counterfactual.kind,
            replay_head=self.head.steps if window.replayed else 0,
            stopped_by="end" if step == self.tau - 1 else "K" if step >= window.last_step else "tol",
            seconds=time.perf_counter() - self.started,
            growth_max=window.growth_max,
            missed=self.products.missed,
            head_error=self.head.error if window.replayed else None,
            update="finite" if problem.is_finite else "tangent",
            norms=window.noted(step),
        )

    # --- marks ---------------------------------------------------------------------------------------------------

    def _stop_if_asked(self, step: int) -> None:
        """Leaves a mark from which the sweep can go on, and ends it, where some rank was asked to. Collective."""
        reason = stop_asked(self.trajectory.layout.group)
        if reason is None or not self.totals.left:
            return
        if self.marks is None:
            raise stopped(f"unlearning stopped before step {step} of {self.tau}, without marks to go on from", reason)
        if self.marks.newest != step:
            self._mark(step, is_due=True)
        raise stopped(f"unlearning stopped before step {step} of {self.tau} (the same command goes on)", reason)

    def _mark(self, step: int, is_due: bool = False) -> None:
        """Keeps the state before `step`, when it is time."""
        if self.marks is None or not (is_due or self.marks.is_due(step)) or not self.totals.left:
            return
        totals, products, trial = self.totals, self.products, self.head.trial if self.head.is_on else None
        windows = self.windows if trial is None else [*self.windows, trial]
        found = totals.sums, dict(totals.left), self.path.state
        curvature = products.missed, products.counted, dict(self.felt_until)
        head = None if not self.head.length else {**self.head.to_json(), "has_trial": trial is not None}
        self.marks.save(Mark(step, windows, *found, self.cost, self.guard.worst, *curvature, head))

    def _restore(self, mark: Mark) -> int:
        self.windows, self.totals.left, self.totals.sums = mark.windows, mark.left, mark.sums
        self.path.stand(mark.step, mark.state)
        self._earlier_cost, self.guard.worst = mark.cost, mark.worst
        self.products.missed, self.products.counted = mark.missed, mark.basis
        self.felt_until = dict(mark.felt_until)
        if mark.head is not None:
            self.head.take_up(mark.head, self.windows.pop() if mark.head["has_trial"] else None)
        return mark.step


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as ranges [first, stop)."""
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
