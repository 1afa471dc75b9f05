"""Update rules against torch's own optimizers: run forward to the last bits, their tangents against central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ParamSpec, ShardLayout, group_rank
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.passes import clip_coefficient
from lmc_dist.update_rules import SGD, Adam, Deviation, Point, State, UpdateRule, sharded
from lmc_dist.update_rules.settings import group_rules

SHAPES = {"a": (37, 11), "b": (5,), "c": (1,), "d": (9, 8)}  # uneven over any number of ranks, "c" smaller than most
GROUPS = {"a": 0, "b": 1, "c": 1, "d": 0}
UNUSED = 3  # rows of "a" that never have a gradient

# Name → class and settings; the second group has no weight decay.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"weight_decay": 0.03}),
    "sgd maximize": ("SGD", {"weight_decay": 0.03, "maximize": True}),
    "momentum": ("SGD", {"momentum": 0.9, "weight_decay": 0.03}),
    "dampening": ("SGD", {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.03}),
    "adam": ("Adam", {"betas": (0.9, 0.99), "eps": 1e-6}),
    "adam L2": ("Adam", {"weight_decay": 0.03, "maximize": True}),
    "adam decoupled": ("Adam", {"weight_decay": 0.03, "decoupled_weight_decay": True}),
    "adamw": ("AdamW", {"weight_decay": 0.03}),
    "amsgrad": ("AdamW", {"weight_decay": 0.03, "amsgrad": True, "betas": (0.8, 0.9)}),
}


def layout() -> ShardLayout:
    rank, world_size = group_rank(None)
    return ShardLayout([ParamSpec(name, shape) for name, shape in SHAPES.items()], rank, world_size)


def description(name: str) -> dict[str, Any]:
    """The manifest's optimizer, as JSON gives it back."""
    kind, settings = OPTIMIZERS[name]
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {"class": kind, "groups": [settings, settings | {"weight_decay": 0.0}]}


def update_rule(name: str, max_norm: float = 0.0) -> UpdateRule:
    return UpdateRule(layout(), [{"name": n, "group": g} for n, g in GROUPS.items()], description(name), max_norm)


def rates(step: int) -> tuple[float, float]:
    return 0.02 / (1 + 0.1 * step), 0.05


def random_full(seed: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    full = {n: scale * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    return full


def gradients(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    full = random_full(seed, dtype, 0.3)
    full["a"][:UNUSED] = 0
    return full


def sharded_full(full: dict[str, torch.Tensor]) -> ShardedVector:
    return ShardedVector.from_full(layout(), full.__getitem__)


class Reference:
    """torch's own optimizer on whole tensors."""

    def __init__(self, name: str, theta: dict[str, torch.Tensor], max_norm: float, foreach: bool = False) -> None:
        kind, settings = OPTIMIZERS[name]
        self.parameters = {n: nn.Parameter(t.clone()) for n, t in theta.items()}
        members = [[p for n, p in self.parameters.items() if GROUPS[n] == g] for g in (0, 1)]
        groups = [{"params": members[0]}, {"params": members[1], "weight_decay": 0.0}]
        self.optimizer: Any = getattr(torch.optim, kind)(groups, lr=1.0, foreach=foreach, **settings)
        self.max_norm = max_norm

    def step(self, grads: dict[str, torch.Tensor], lrs: tuple[float, float]) -> float:
        """Takes a step; returns the norm of its gradient."""
        for name, p in self.parameters.items():
            p.grad = grads[name].clone()
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_norm, norm)
        self.optimizer.step()
        return float(norm)

    def theta(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Kind → whole tensors by name."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                if torch.is_tensor(value) and value.shape == p.shape and key != "step":
                    found.setdefault(key, {})[name] = value.detach().clone()
        return found

    def set_state(self, vectors: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        for name, p in self.parameters.items():
            state = {key: full[name].clone() for key, full in vectors.items()}
            self.optimizer.state[p] = state | {"step": torch.tensor(float(step))} if vectors else {}


def state_of(reference: Reference, rule: UpdateRule, step: int) -> State:
    found, zeros = reference.state(), {n: torch.zeros_like(p) for n, p in reference.theta().items()}
    return State({key: sharded_full(found.get(key, zeros)) for key in rule.keys}, step)


def ulps(found: ShardedVector, expected: ShardedVector) -> torch.Tensor:
    """Distance of each element in units of the last place of the larger one."""
    size = torch.maximum(found.flat.abs(), expected.flat.abs())
    spacing = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return (found.flat - expected.flat).abs() / spacing


def check_forward(name: str, dtype: torch.dtype, max_norm: float, foreach: bool) -> tuple[float, float, float]:
    """(largest distance of one step in ulps, share of elements that differ at all, drift of 15 steps on their own)."""
    rule = update_rule(name, max_norm)
    start = random_full(1, dtype)
    reference = Reference(name, start, max_norm, foreach)
    free, free_state = sharded_full(start), state_of(reference, rule, 0)
    worst = differing = total = 0.0
    for step in range(15):
        grads, before = gradients(10 + step, dtype), sharded_full(reference.theta())
        state = state_of(reference, rule, step)
        norm = reference.step(grads, rates(step))
        coefficient = clip_coefficient(norm, max_norm)
        assert (coefficient < 1) == bool(max_norm)
        g = sharded_full(grads)
        found, after = rule.apply(Point(before, rates(step), state, g, coefficient))
        expected = {"theta": sharded_full(reference.theta()), **state_of(reference, rule, step + 1).vectors}
        for key, vector in {"theta": found, **after.vectors}.items():
            distance = ulps(vector, expected[key])
            worst, total = max(worst, float(distance.max())), total + distance.numel()
            differing += float((distance > 0).sum())
        assert after.step == step + 1
        free, free_state = rule.apply(Point(free, rates(step), free_state, g, coefficient))
    end = sharded_full(reference.theta())
    return worst, differing / total, (free - end).norm() / (end - sharded_full(start)).norm()


FORWARD = [(name, dtype) for name in OPTIMIZERS for dtype in (torch.float32, torch.float64)]


def check_all_forward() -> dict[str, tuple[float, float, float]]:
    found = {}
    for name, dtype in FORWARD:
        for foreach in (False, True):
            found[f"{name} {dtype} foreach={foreach}"] = check_forward(name, dtype, 0.0, foreach)
        found[f"{name} {dtype} clipped"] = check_forward(name, dtype, 1.0, False)
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_forward_equals_torch_step_by_step(ranks: Any, world_size: int) -> None:
    for found in ranks(world_size).run(check_all_forward):
        for name, (worst, differing, drift) in found.items():
            precision = 1e-6 if "float32" in name else 1e-14
            if "clipped" in name:  # the logged coefficient is that of DeepSpeed, torch divides the other way round
                assert drift <= 10 * precision, (name, worst, differing, drift)
            else:
                assert worst <= 1 and differing <= 0.01 and drift <= precision, (name, worst, differing, drift)


# --- tangents ------------------------------------------------------------------------------------------------------


def moved(base: dict[str, torch.Tensor], direction: dict[str, torch.Tensor], h: float) -> dict[str, torch.Tensor]:
    return {name: base[name] + h * direction[name] for name in base}


def check_tangent(name: str, max_norm: float, step: int, behind: int) -> float:
    """Relative distance of the tangent to a central difference of torch's optimizer, the worst of θ and all state."""
    rule, dtype = update_rule(name, max_norm), torch.float64
    reference = Reference(name, random_full(1, dtype), 0.0)
    for i in range(step):
        reference.step(gradients(10 + i, dtype), rates(i))
    theta, state, grads = reference.theta(), reference.state(), gradients(99, dtype)
    dtheta, dgrads = random_full(5, dtype), gradients(6, dtype)
    dstate = {}
    for i, (key, full) in enumerate(sorted(state.items())):
        direction = random_full(20 + i, dtype, 0.1)
        # second moments stay positive, and zero where there never was a gradient
        dstate[key] = {n: direction[n] * (t if "sq" in key else 1) for n, t in full.items()}
        dstate[key]["a"][:UNUSED] = 0
    norm = sum(float((g * g).sum()) for g in grads.values()) ** 0.5

    def ends(h: float) -> dict[str, dict[str, torch.Tensor]]:
        again = Reference(name, moved(theta, dtheta, h), max_norm)
        if step - behind > 0:
            again.set_state({key: moved(state[key], dstate[key], h) for key in state}, step - behind)
        again.step(moved(grads, dgrads, h), rates(step))
        return {"theta": again.theta(), **again.state()}

    def difference(h: float) -> dict[str, dict[str, torch.Tensor]]:
        high, low = ends(h), ends(-h)
        return {key: {n: (t - low[key][n]) / (2 * h) for n, t in full.items()} for key, full in high.items()}

    # extrapolated to h = 0: Adam's first step is nearly the sign of g, whose third derivative is large
    wide, narrow = difference(1e-5), difference(5e-6)
    expected = {key: sharded_full(moved(narrow[key], moved(narrow[key], wide[key], -1.0), 1 / 3)) for key in wide}
    zeros = {n: torch.zeros_like(t) for n, t in theta.items()}
    at = State({key: sharded_full(state.get(key, zeros)) for key in rule.keys}, step)
    along = Deviation(sharded_full(dtheta), {key: sharded_full(dstate.get(key, zeros)) for key in rule.keys})
    point = Point(sharded_full(theta), rates(step), at, sharded_full(grads), clip_coefficient(norm, max_norm))
    (found,) = rule.tangents(point, [(along, sharded_full(dgrads))], behind)
    errors = [(found.v - expected["theta"]).norm() / expected["theta"].norm()]
    for key, vector in found.state.items():
        assert bool(torch.isfinite(vector.flat).all())
        errors.append((vector - expected[key]).norm() / expected[key].norm())
    return max(errors)


def check_all_tangents() -> dict[str, float]:
    sharded._CHUNK = 64  # several chunks a group
    alone, found = group_rank(None)[1] == 1, {}
    for name in OPTIMIZERS:
        for max_norm in (0.0, 1.0, 100.0) if alone else (1.0,):  # without, active, inactive; it alone couples the ranks
            for step, behind in ((0, 0), (7, 0), (7, 2)) if alone else ((7, 1),):
                found[f"{name}, max_norm {max_norm}, step {step} - {behind}"] = check_tangent(
                    name, max_norm, step, behind
                )
    sharded._CHUNK = 1 << 18
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_tangents_are_central_differences_of_torch(ranks: Any, world_size: int) -> None:
    for found in ranks(world_size).run(check_all_tangents):
        assert max(found.values()) <= 1e-7, {name: error for name, error in found.items() if error > 1e-7}


def check_counter(name: str) -> float:
    """The finite difference by the counter, against torch's optimizer with one counter and the other."""
    rule, dtype, step = update_rule(name, 1.0), torch.float64, 5
    reference = Reference(name, random_full(1, dtype), 0.0)
    for i in range(step):
        reference.step(gradients(10 + i, dtype), rates(i))
    theta, state, grads = reference.theta(), reference.state(), gradients(99, dtype)
    norm = sum(float((g * g).sum()) for g in grads.values()) ** 0.5
    point = Point(
        sharded_full(theta),
        rates(step),
        State({key: sharded_full(state[key]) for key in rule.keys}, step),
        sharded_full(grads),
        clip_coefficient(norm, 1.0),
    )

    def end(behind: int) -> dict[str, dict[str, torch.Tensor]]:
        again = Reference(name, theta, 1.0)
        if step - behind > 0:
            again.set_state(state, step - behind)
        again.step(grads, rates(step))
        return {"theta": again.theta(), **again.state()}

    errors = [0.0]
    for behind, before in ((3, 1), (step, 0)):
        if "exp_avg" in state and behind == step:
            continue  # Adam without a step has no state either, of which the counter alone says nothing
        gap, late, early = rule.clock_gap(point, behind, before), end(behind), end(before)
        expected = {key: sharded_full(moved(late[key], early[key], -1)) for key in late}
        size = max(vector.norm() for vector in expected.values())
        if gap is None:
            assert size == 0
            continue
        for key, vector in {"theta": gap.v, **gap.state}.items():
            errors.append((vector - expected[key]).norm() / size)
    return max(errors)


def check_counters() -> dict[str, float]:
    return {name: check_counter(name) for name in ("momentum", "dampening", "nesterov", "adam", "adamw", "amsgrad")}


def test_a_counter_that_lags_behind_is_a_finite_source(ranks: Any) -> None:
    for found in ranks(2).run(check_counters):
        assert max(found.values()) <= 1e-12, found


def check_zero_moment() -> None:
    """At a second moment of 0 the tangent is that of m / (0 + eps); in float32 as well, and without NaN."""
    for dtype in (torch.float32, torch.float64):
        rule = update_rule("adam")
        zero = {n: torch.zeros(s, dtype=dtype) for n, s in SHAPES.items()}
        at = State({key: sharded_full(zero) for key in rule.keys}, 0)
        point = Point(sharded_full(zero), (0.5, 0.5), at, sharded_full(zero))
        dg = random_full(3, dtype)
        (found,) = rule.tangents(point, [(rule.no_deviation(point.theta), sharded_full(dg))])
        expected = sharded_full(dg) * (-0.5 / 1e-6)
        assert (found.v - expected).norm() <= 1e-6 * expected.norm()
        assert found.state["exp_avg_sq"].norm() == 0


def test_second_moments_of_zero_have_no_slope(ranks: Any) -> None:
    ranks(3).run(check_zero_moment)


# --- settings ------------------------------------------------------------------------------------------------------


def rules(kind: str, group: dict[str, Any], **more: Any) -> list[Any]:
    return group_rules({"class": kind, "groups": [group], **more})


def test_settings_of_the_manifest() -> None:
    assert rules("SGD", {"momentum": 0.0, "nesterov": False, "weight_decay": 0}) == [SGD()]
    assert rules("FusedAdam", {"betas": [0.9, 0.95], "bias_correction": False, "weight_decay": 0.1}, adam_w_mode=1) == [
        Adam(beta2=0.95, weight_decay=0.1, is_decoupled=True, bias_correction=False)
    ]
    l2 = Adam(weight_decay=0.1, is_decoupled=False)
    assert rules("DeepSpeedCPUAdam", {"weight_decay": 0.1, "adam_w_mode": False, "amsgrad": True}) == [l2]
    assert rules("DeepSpeedCPUAdam", {"weight_decay": 0.0}) == [Adam()]
    assert rules("AdamW", {"weight_decay": 0.1}) == [Adam(weight_decay=0.1, is_decoupled=True)]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown class": (lambda: rules("Lion", {}), "trained with Lion; corrections know the update rules of SGD"),
    "no class": (lambda: rules("None", {}), "trained with None"),
    "transformers' AdamW": (lambda: rules("AdamW", {"correct_bias": True}), "'correct_bias', transformers' own"),
    "decay of unknown kind": (lambda: rules("FusedAdam", {"weight_decay": 0.1}), "does not say in which way it decays"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(LmcError, match=message):
        call()
