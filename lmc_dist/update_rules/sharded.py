"""The update rule of a whole logged run on flat shards: its groups, its clipping, its tangent.

Vectors are worked through in chunks, so that what a rule makes on the way never takes more than a few small tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import jvp

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector, dots
from lmc_dist.update_rules.clipping import coefficient_at, coefficient_tangent
from lmc_dist.update_rules.rules import SECOND_MOMENTS, SGD, Rule
from lmc_dist.update_rules.settings import group_rules

CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class State:
    """σ: the optimizer's per-element state by kind, and how many steps it has taken."""

    vectors: Mapping[str, ShardedVector] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Deviation:
    """(v, dσ): how far the counterfactual run is from the actual one."""

    v: ShardedVector
    state: Mapping[str, ShardedVector] = field(default_factory=dict)

    def add_(self, other: Deviation) -> Deviation:
        """self += other, in place."""
        self.v.add_(other.v)
        for key, vector in self.state.items():
            vector.add_(other.state[key])
        return self

    def vectors(self) -> list[ShardedVector]:
        """v, then dσ in the order of its kinds."""
        return [self.v, *self.state.values()]


@dataclass(frozen=True)
class Point:
    """Where a step was taken from, and how.

    Attributes:
        theta: θ_s.
        lrs: Learning rate of each group.
        state: σ_s.
        gradient: g_s, unclipped. None stands for any: plain SGD without clipping is linear in it.
        clip_coef: What clipping multiplied it by.
    """

    theta: ShardedVector
    lrs: Sequence[float]
    state: State = field(default_factory=State)
    gradient: ShardedVector | None = None
    clip_coef: float = 1.0


class UpdateRule:
    """Φ of a logged run.

    Args:
        layout: Of the vectors.
        parameters: The manifest's parameter table (each row with its optimizer `group`).
        optimizer: The manifest's optimizer.
        max_grad_norm: What the global gradient norm is clipped to; 0 for no clipping.

    Attributes:
        keys: Kinds of per-element state of all groups.

    Raises:
        LmcError: An optimizer whose update rule is not known.
    """

    def __init__(
        self,
        layout: ShardLayout,
        parameters: Sequence[Mapping[str, Any]],
        optimizer: Mapping[str, Any],
        max_grad_norm: float = 0.0,
    ) -> None:
        self.rules: list[Rule] = group_rules(optimizer)
        self.layout, self.max_grad_norm = layout, max_grad_norm
        self.keys = tuple(dict.fromkeys(key for rule in self.rules for key in rule.keys))
        group_of = {row["name"]: int(row.get("group", 0)) for row in parameters}
        self.runs: list[tuple[int, int, int]] = []  # (start, stop, group) of the flat buffer, neighbours merged
        for slot in layout:
            group, stop = group_of[slot.spec.name], slot.offset + slot.padded
            if self.runs and self.runs[-1][2] == group:
                self.runs[-1] = (self.runs[-1][0], stop, group)
            else:
                self.runs.append((slot.offset, stop, group))

    @property
    def is_plain(self) -> bool:
        """Whether a step is θ − η(g + wθ): affine, without state."""
        return all(isinstance(rule, SGD) and not rule.momentum and not rule.maximize for rule in self.rules)

    @property
    def amplification(self) -> float:
        """How much longer the sum of all steps that one gradient takes part in is than the first of them, at most."""
        return max(1 / (1 - rule.momentum) for rule in self.rules)

    def stability(self, growth: float) -> tuple[float, float]:
        """(η·λ_max, largest stable value) of a direction that grows by `growth` a step, λ preconditioned under Adam.

        The direction changes its sign at every step: z = −growth solves z² − (1 + μ − ηλ·gain) z + μ = 0.
        """
        rule = max(self.rules, key=lambda rule: rule.momentum)
        mu = rule.momentum
        return (1 + mu + growth + mu / growth) / rule.gain, 2 * (1 + mu) / rule.gain

    def _chunks(self) -> Iterator[tuple[slice, Rule, int]]:
        for start, stop, group in self.runs:
            for i in range(start, stop, CHUNK):
                yield slice(i, min(i + CHUNK, stop)), self.rules[group], group

    def no_deviation(self, like: ShardedVector) -> Deviation:
        """(0, 0)."""
        zeros = [like.like(torch.zeros_like(like.flat)) for _ in range(1 + len(self.keys))]
        return Deviation(zeros[0], dict(zip(self.keys, zeros[1:], strict=True)))

    def apply(self, at: Point) -> tuple[ShardedVector, State]:
        """(θ_{s+1}, σ_{s+1}). Local."""
        if at.gradient is None:
            raise LmcError("a step needs its gradient")
        theta = at.theta.like(torch.empty_like(at.theta.flat))
        new = {key: vector.clone() for key, vector in at.state.vectors.items()}
        for part, rule, group in self._chunks():
            grad = at.gradient.flat[part].to(at.theta.flat.dtype)
            if at.clip_coef < 1:
                grad = grad * at.clip_coef
            state = {key: at.state.vectors[key].flat[part] for key in rule.keys}
            theta.flat[part], after = rule(at.theta.flat[part], grad, state, at.state.step, at.lrs[group])
            for key, value in after.items():
                new[key].flat[part] = value
        return theta, State(new, at.state.step + 1)

    def tangents(self, at: Point, along: Sequence[tuple[Deviation, ShardedVector]], behind: int = 0) -> list[Deviation]:
        """(v_{s+1}, dσ_{s+1}) for each (v_s, dσ_s) and dg_s. Collective where the step was clipped, else local.

        Args:
            at: The actual step.
            along: Directions.
            behind: By how many steps the counterfactual optimizer's counter lags behind.
        """
        is_clipped = at.clip_coef < 1
        if at.gradient is None and (is_clipped or not all(isinstance(r, SGD) and not r.momentum for r in self.rules)):
            raise LmcError("the tangent of this update rule needs the step's gradient")
        coefficients = [0.0] * len(along)
        if is_clipped and at.gradient is not None:
            # one all-reduce for all directions
            square, *products = dots([(at.gradient, at.gradient), *((at.gradient, dg) for _, dg in along)])
            coefficients = [coefficient_tangent(square, product, self.max_grad_norm) for product in products]
        return [
            self._tangent(at, deviation, dg, moved, behind)
            for (deviation, dg), moved in zip(along, coefficients, strict=True)
        ]

    def _tangent(self, at: Point, along: Deviation, dg: ShardedVector, moved: float, behind: int) -> Deviation:
        dtype = along.v.flat.dtype
        out = [along.v.like(torch.empty_like(along.v.flat))]
        out += [vector.like(torch.zeros_like(vector.flat)) for vector in along.state.values()]
        kinds = {key: i for i, key in enumerate(along.state, 1)}
        coefficient, its_tangent = (torch.tensor(x, dtype=dtype, device=dg.flat.device) for x in (at.clip_coef, moved))
        for part, rule, group in self._chunks():
            theta = at.theta.flat[part].to(dtype)
            grad = torch.zeros_like(theta) if at.gradient is None else at.gradient.flat[part].to(dtype)
            keys, step, lr = rule.keys, at.state.step - behind, at.lrs[group]

            def advance(
                theta: torch.Tensor,
                grad: torch.Tensor,
                coefficient: torch.Tensor,
                *state: torch.Tensor,
                rule: Rule = rule,
                keys: tuple[str, ...] = keys,
                step: int = step,
                lr: float = lr,
            ) -> tuple[torch.Tensor, ...]:
                if at.clip_coef < 1:
                    grad = grad * coefficient
                new_theta, new = rule(theta, grad, dict(zip(keys, state, strict=True)), step, lr)
                return (new_theta, *(new[key] for key in keys))

            primals = (theta, grad, coefficient, *(at.state.vectors[key].flat[part].to(dtype) for key in keys))
            tangents = (along.v.flat[part], dg.flat[part], its_tangent, *(along.state[key].flat[part] for key in keys))
            for i, found in zip((0, *(kinds[key] for key in keys)), jvp(advance, primals, tangents)[1], strict=True):
                out[i].flat[part] = found
        return Deviation(out[0], dict(zip(along.state, out[1:], strict=True)))

    def difference(self, at: Point, along: Deviation, dg: ShardedVector, behind: int, after: State) -> Deviation:
        """Φ at (θ + v, σ + dσ, g + dg), its counter `behind` steps back, minus Φ at (θ, σ, g): no tangent, the step itself.

        Collective where gradients are clipped, else local. In float64, since both are large beside their difference.

        Args:
            at: The actual step.
            along: (v, dσ).
            dg: Of the gradient.
            behind: As in `tangents`.
            after: σ after the actual step, as it is kept. dσ is taken from it, so that σ + dσ is what it is to the bit: where
                the counterfactual run never had a gradient it is 0, and Adam would make a step of any rounding there.
        """
        if at.gradient is None:
            raise LmcError("a step needs its gradient")
        coefficient = 1.0
        if self.max_grad_norm:
            gg, gd, dd = dots([(at.gradient, at.gradient), (at.gradient, dg), (dg, dg)])
            coefficient = coefficient_at(max(gg + 2 * gd + dd, 0.0), self.max_grad_norm)
        moved = self.no_deviation(along.v)
        for part, rule, group in self._chunks():
            theta, grad = at.theta.flat[part].double(), at.gradient.flat[part].double()
            state = {key: at.state.vectors[key].flat[part].double() for key in rule.keys}
            other = {key: state[key] + along.state[key].flat[part] for key in rule.keys}
            for key in SECOND_MOMENTS:  # a difference of two roundings may fall below zero
                if key in other:
                    other[key].clamp_(min=0.0)
            lr, step = at.lrs[group], at.state.step
            was = rule(theta, grad * at.clip_coef, state, step, lr)
            now = rule(theta + along.v.flat[part], (grad + dg.flat[part]) * coefficient, other, step - behind, lr)
            moved.v.flat[part] = (now[0] - was[0]).to(moved.v.flat.dtype)
            for key in rule.keys:
                moved.state[key].flat[part] = (now[1][key] - after.vectors[key].flat[part]).to(moved.v.flat.dtype)
        return moved

    def clock_gap(self, at: Point, behind: int, before: int = 0) -> Deviation | None:
        """Φ with its counter `behind` steps back minus Φ with it `before` steps back; None where they agree. Local.

        After skipped steps the counterfactual optimizer counts fewer steps, so its bias correction differs by a finite
        amount and not by a tangent. Differences are taken in float64: they are small beside θ.
        """
        step = at.state.step
        if behind == before or all(rule.clock(step - behind) == rule.clock(step - before) for rule in self.rules):
            return None
        if at.gradient is None:
            raise LmcError("a step needs its gradient")
        gap = self.no_deviation(at.theta)
        for part, rule, group in self._chunks():
            grad = at.gradient.flat[part].double() * at.clip_coef
            state = {key: at.state.vectors[key].flat[part].double() for key in rule.keys}
            theta = at.theta.flat[part].double()
            late, early = (rule(theta, grad, state, step - lag, at.lrs[group]) for lag in (behind, before))
            gap.v.flat[part] = (late[0] - early[0]).to(gap.v.flat.dtype)
            for key in rule.keys:
                gap.state[key].flat[part] = (late[1][key] - early[1][key]).to(gap.v.flat.dtype)
        return gap

    def gradient_of(self, theta: ShardedVector, update: ShardedVector, lrs: Sequence[float]) -> ShardedVector:
        """The clipped gradient that a step of SGD without momentum used, from its update: g = −u/η − wθ. Local.

        Raises:
            LmcError: A learning rate of 0, which leaves no trace of the gradient.
        """
        out = torch.zeros_like(update.flat)
        for part, rule, group in self._chunks():
            assert isinstance(rule, SGD)
            if lrs[group] == 0:
                raise LmcError("a step with learning rate 0 leaves no trace of its gradient: fisher is not available")
            out[part] = update.flat[part] / -lrs[group] - rule.weight_decay * theta.flat[part]
            if rule.maximize:
                out[part].neg_()
        return update.like(out)
