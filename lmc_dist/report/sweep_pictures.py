"""Pictures of a sweep, in which a family of methods has one colour and sign, however many settings it was tried with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmc_dist.report.pictures import (
    FAINT,
    INK,
    MARKERS,
    SERIES,
    Picture,
    draw_error_against_cost,
    logarithmic,
    picture,
    short,
)
from lmc_dist.report.sweeps import Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGNS = "Filled: without a replayed head; hollow: with one. Whiskers: s.d. over seeds."


def error_against_cost(cells: Sequence[Cells], key: str) -> Picture | None:
    """rel_error over cost, both logarithmic; None where no method has both."""
    points = [c for c in cells if c.method not in ("do_nothing", "retrain") and c.has("rel_error", "gradients")]
    if not points:
        return None
    retrain = next((c for c in cells if c.method == "retrain" and c.has("gradients")), None)
    xs, x_floor = logarithmic([_mean(c, "gradients") for c in points])
    ys, y_floor = logarithmic([_mean(c, "rel_error") for c in points])

    cost = 0.0 if retrain is None else _mean(retrain, "gradients")

    def draw(axes: Axes) -> None:
        mark = lambda axes: _scatter(axes, points, xs, ys, "rel_error")  # noqa: E731
        draw_error_against_cost(axes, xs, ys, (x_floor, y_floor), cost, mark)

    caption = (
        "Error against cost; lower and further left is better. 1 is doing nothing, above it harm was done. " + SIGNS
    )
    if x_floor is not None or y_floor is not None:
        caption += " Points on the border have 0, or less than can be shown."
    told = "; ".join(
        f"{short(c.label, 80)}: {_mean(c, 'rel_error'):.3g} at {_mean(c, 'gradients'):.3g}" for c in points
    )
    return picture(draw, key, caption, f"Error against cost in gradients, logarithmic. {told}.", 4.1)


def trade_off(cells: Sequence[Cells], key: str) -> Picture | None:
    """Loss on what stays over loss on what is forgotten; None where less than two methods have both."""
    points = [c for c in cells if c.has("loss_forget", "loss_retain")]
    if len(points) < 2:
        return None
    ends = {c.method: c for c in points if c.method in ("do_nothing", "retrain")}
    others = [c for c in points if c.method not in ends]

    def draw(axes: Axes) -> None:
        for method, shape in (("do_nothing", "x"), ("retrain", "+")):
            if method in ends:
                x, y = _mean(ends[method], "loss_forget"), _mean(ends[method], "loss_retain")
                axes.plot(
                    x, y, shape, color=INK, markersize=9, markeredgewidth=1.8, label=ends[method].family, zorder=5
                )
                if method == "retrain":
                    axes.axvline(x, color=FAINT, linewidth=1, linestyle=":")
                    axes.axhline(y, color=FAINT, linewidth=1, linestyle=":")
        xs, ys = ([_mean(c, key) for c in others] for key in ("loss_forget", "loss_retain"))
        _scatter(axes, others, xs, ys, None)
        axes.margins(0.08)
        axes.set_xlabel("loss on forgotten samples")
        axes.set_ylabel("loss on retained samples")

    caption = "Forgotten against retained. The aim is the retrained model, not the highest loss on the forgotten."
    told = "; ".join(
        f"{short(c.label, 80)}: {_mean(c, 'loss_forget'):.4g}, {_mean(c, 'loss_retain'):.4g}" for c in points
    )
    return picture(draw, key, caption, f"Mean losses on forgotten and on retained samples. {told}.", 4.1)


def _scatter(axes: Axes, cells: Sequence[Cells], xs: Sequence[float], ys: Sequence[float], spread: str | None) -> None:
    families = list(dict.fromkeys(c.family for c in cells))
    named: set[str] = set()
    for cell, x, y in zip(cells, xs, ys, strict=True):
        i = families.index(cell.family)
        color = SERIES[i % len(SERIES)]
        marker = MARKERS[(i + i // len(SERIES)) % len(MARKERS)]
        if spread is not None and (sd := cell.figure(spread).sd):
            axes.errorbar(x, y, sd, color=color, linewidth=0.8, capsize=2, alpha=0.6)
        hollow: Any = {"markerfacecolor": "none"} if cell.has_head else {}
        label = "_" if cell.family in named else short(cell.family)
        if not cell.has_head or all(c.has_head for c in cells if c.family == cell.family):
            named.add(cell.family)
        else:
            label = "_"
        axes.plot(x, y, marker, color=color, markersize=6, linestyle="none", clip_on=False, label=label, **hollow)


def _mean(cell: Cells, key: str) -> float:
    found = cell.figure(key).mean
    assert found is not None
    return found
