"""Forget units: the parts of a request that are corrected one by one, and how a step's source is split among them.

All units share the propagator of the joint counterfactual, so that their corrections add up to its correction
(docs/method.md §3). With n_u target tokens of unit u among the R that a step loses, and G the gradient that the kept
samples gain by the smaller denominator, the share of a unit is

    b^(u) = (n_u / R) G − Σ_{i ∈ u} ∇ℓ_i / D            Σ_u b^(u) = ∇L(w') − ∇L(w)

A step of which nothing remains is not taken; its update is split by n_u / R as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedMicro, EditedStep, TargetCounts
from lmc_dist.trajectory.record import LossNormalization, StepRecord

JOINT = "joint"
_NAME = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)  # it is a folder's as well


@dataclass(frozen=True)
class Unit:
    """Samples or batches that are forgotten together, under a name of their own."""

    name: str
    sample_ids: frozenset[int] = frozenset()
    batch_ids: frozenset[int] = frozenset()

    def touches(self, record: StepRecord) -> bool:
        """Whether the step holds any of it."""
        return record.batch_id in self.batch_ids or not self.sample_ids.isdisjoint(record.sample_ids)


def joint_unit(request: Counterfactual) -> Unit:
    """The whole request as one unit."""
    return Unit(JOINT, request.sample_ids, request.batch_ids)


def split_request(request: Counterfactual, named: Mapping[str, Iterable[int]] | None = None) -> list[Unit]:
    """A unit a sample (a batch, for `skip`), or those of `named`, in the order of their names. Local.

    Args:
        request: What is forgotten.
        named: Ids of each unit.

    Raises:
        LmcError: Units that overlap, or that are not the request together.
    """
    by_batch = request.kind == "skip"
    wanted = request.batch_ids if by_batch else request.sample_ids
    what = "batch" if by_batch else "sample"
    groups = {f"{what}-{i}": [i] for i in sorted(wanted)} if named is None else {k: list(v) for k, v in named.items()}
    owner: dict[int, str] = {}
    for name, ids in groups.items():
        if not _NAME.fullmatch(name):
            raise LmcError(f"'{name}' is no name for a unit: letters, digits, '-', '_', '.', and no '.' in front")
        if not ids:
            raise LmcError(f"unit '{name}' is empty")
        for i in ids:
            if i in owner:
                raise LmcError(f"{what} {i} is in unit '{owner[i]}' and in unit '{name}': units must not overlap")
            owner[i] = name
    if missing := sorted(wanted - set(owner)):
        raise LmcError(f"{len(missing)} {what} ids of the request are in no unit: {missing[0]}")
    if more := sorted(set(owner) - wanted):
        raise LmcError(f"{what} {more[0]} of unit '{owner[more[0]]}' is not part of the request")
    found = [(name, frozenset(ids)) for name, ids in sorted(groups.items())]
    return [Unit(name, batch_ids=ids) if by_batch else Unit(name, sample_ids=ids) for name, ids in found]


@dataclass(frozen=True)
class Share:
    """A unit's share of a step's source.

    Attributes:
        unit: Whose.
        of_kept: n_u / R, its share of what the kept samples gain, or of a step that is not taken.
        edited: The step with the weights of this share alone; None for a step that is not taken.
    """

    unit: Unit
    of_kept: float
    edited: EditedStep | None


@dataclass(frozen=True)
class _ShareMicro(EditedMicro):
    """A pass whose source is that of some of its forgotten samples, and of a part of what the kept ones gain."""

    owned: tuple[bool, ...] = ()
    of_kept: float = 0.0

    @property
    def source_weights(self) -> list[float]:
        gain = 1.0 / self.denominator - 1.0 / self.record.denominator
        loss = -1.0 / self.record.denominator
        return [self.of_kept * gain if keep else loss * mine for keep, mine in zip(self.kept, self.owned, strict=True)]


def sources_by_step(units: Sequence[Unit], records: Iterable[StepRecord]) -> dict[int, list[Unit]]:
    """The units that hold data of each applied step, in their order; steps of which none does are left out. Local."""
    by_sample = {i: k for k, unit in enumerate(units) for i in unit.sample_ids}
    by_batch = {i: k for k, unit in enumerate(units) for i in unit.batch_ids}
    found: dict[int, list[Unit]] = {}
    for record in records:
        touched = {by_sample[i] for i in record.sample_ids if i in by_sample}
        if record.batch_id in by_batch:
            touched.add(by_batch[record.batch_id])
        if record.applied and touched:
            found[record.step] = [units[k] for k in sorted(touched)]
    return found


def step_shares(
    edited: EditedStep, units: Sequence[Unit], normalization: LossNormalization, counts: TargetCounts
) -> list[Share]:
    """The shares of those units that the step touches. Local."""
    record = edited.record
    touched = [unit for unit in units if unit.touches(record)]
    if not edited.is_changed or not touched:
        return []
    if edited.skipped:
        if record.batch_id in touched[0].batch_ids:
            return [Share(touched[0], 1.0, None)]
        tokens = _tokens(record, counts)
        return [Share(unit, _part(tokens, unit, range(len(tokens))), None) for unit in touched]
    if set(record.sample_ids) & touched[0].sample_ids == {
        i for m in edited.micro_batches for i, keep in zip(m.record.sample_ids, m.kept, strict=True) if not keep
    }:
        return [Share(touched[0], 1.0, edited)]  # the only one
    tokens = [
        [row[k] for k, keep in enumerate(micro.kept) if not keep]
        for row, micro in zip(_tokens(record, counts), edited.micro_batches, strict=True)
    ]
    shares = []
    for unit in touched:
        whole = _part(tokens, unit, range(len(tokens)))
        micros = tuple(
            _ShareMicro(
                m.record,
                m.kept,
                m.denominator,
                tuple(i in unit.sample_ids and not keep for i, keep in zip(m.record.sample_ids, m.kept, strict=True)),
                whole if normalization == "global_token_mean" else _part(tokens, unit, [k]),
            )
            for k, m in enumerate(edited.micro_batches)
        )
        shares.append(Share(unit, whole, EditedStep(record, False, micros)))
    return shares


def kept_gain(edited: EditedStep) -> EditedStep:
    """The step with the weights of G alone: what the kept samples gain by the smaller denominator."""
    micros = tuple(
        _ShareMicro(m.record, m.kept, m.denominator, (False,) * len(m.kept), 1.0) for m in edited.micro_batches
    )
    return EditedStep(edited.record, False, micros)


def own_loss(share: Share) -> EditedStep:
    """The step with the weights of a unit's own samples alone."""
    assert share.edited is not None
    micros = tuple(replace(m, of_kept=0.0) for m in share.edited.micro_batches)  # type: ignore[call-arg]
    return EditedStep(share.edited.record, False, micros)


def _tokens(record: StepRecord, counts: TargetCounts) -> list[list[tuple[int, int]]]:
    """(sample id, target tokens) of each pass."""
    return [list(zip(m.sample_ids, counts(m.sample_ids), strict=True)) for m in record.micro_batches]


def _part(tokens: Sequence[Sequence[tuple[int, int]]], unit: Unit, passes: Iterable[int]) -> float:
    """Share of a unit in the target tokens of some passes."""
    all_, own = 0, 0
    for k in passes:
        all_ += sum(n for _, n in tokens[k])
        own += sum(n for i, n in tokens[k] if i in unit.sample_ids)
    return own / all_ if all_ else 0.0


def passes_of(
    units: Sequence[Unit], records: Iterable[StepRecord], K: int | None, tau: int, width: int
) -> list[list[Unit]]:
    """Units in groups that go along the trajectory together, never more than `width` vectors at a step. Local.

    Greedy by first step: a unit joins the first pass that has room for it while it is under way. Passes that begin early,
    and so take longest, come first.

    Args:
        units: All of them.
        records: The log's.
        K: Steps each source is propagated; None is all.
        tau: Steps of the run.
        width: Vectors at once.
    """
    sources: dict[str, list[int]] = {unit.name: [] for unit in units}
    for step, touched in sources_by_step(units, records).items():
        for unit in touched:
            sources[unit.name].append(step)
    passes: list[tuple[list[Unit], list[int]]] = []
    for unit in sorted((u for u in units if sources[u.name]), key=lambda u: (sources[u.name][0], u.name)):
        load = [0] * tau
        steps = sources[unit.name]
        # With a finite K each source is a vector of its own, and their sum is kept until the last is through.
        spans = [(steps[0], tau)] if K is None else [(s, min(s + K + 1, tau)) for s in steps]
        if K is not None and len(spans) > 1:
            spans.append((steps[0], spans[-1][1]))
        for start, stop in spans:
            for step in range(start, stop):
                load[step] += 1
        for members, taken in passes:
            if all(a + b <= width for a, b in zip(load, taken, strict=True) if a):
                members.append(unit)
                taken[:] = [a + b for a, b in zip(load, taken, strict=True)]
                break
        else:
            passes.append(([unit], load))
    return [members for members, _ in passes]
