"""The report's pictures: numbers → SVG text to stand inside a page.

Colours are CSS variables of the page, so that one picture serves light, dark and paper; nothing refers to a file, a font or
an address, and the ids of different pictures differ.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lmc_dist.errors import LmcError
from lmc_dist.report.collect import Group, MethodStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours as matplotlib is told them → what the page calls them (page.html). Shapes differ too: colour is never alone.
INK, FAINT = "#010101", "#020202"
SERIES = [f"#0303{i:02x}" for i in range(8)]
MARKERS = "osD^vP*X"
_VARIABLES = {INK: "--ink", FAINT: "--faint", **{color: f"--series-{i}" for i, color in enumerate(SERIES)}}

_STYLE: Any = {
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none",
    "svg.hashsalt": "lmc",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Picture:
    """A picture for the page.

    Attributes:
        svg: An `<svg>` element, everything in it escaped.
        caption: How to read it.
        alt: What it shows, in words.
    """

    svg: str
    caption: str
    alt: str


def require_matplotlib() -> None:
    """Checks that pictures can be drawn. Local.

    Raises:
        LmcError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LmcError("the report's pictures need matplotlib: pip install 'lmc_dist[report]'") from None


def draw_error_against_cost(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    floors: tuple[float | None, float | None],
    retrain: float,
    mark: Callable[[Axes], None],
) -> None:
    """Axes, lines and limits of rel_error over cost.

    Args:
        axes: Where to.
        xs: Costs.
        ys: Errors.
        floors: Where 0 is drawn on the two axes, None where there is none.
        retrain: Cost of retraining; 0 where it is not known.
        mark: Draws the points.
    """
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="do nothing")
    if retrain > 0:
        axes.axvline(retrain, color=INK, linewidth=1, linestyle=":", label="cost of retraining")
    mark(axes)
    x_floor, y_floor = floors
    axes.set_ylim(min([*ys, 1.0]) / 2 if y_floor is None else y_floor, max([*ys, 1.0]) * 2)
    if x_floor is not None:
        axes.set_xlim(left=x_floor)
    axes.set_xlabel("cost in gradients of a training batch")
    axes.set_ylabel("rel_error")


def error_against_cost(group: Group, key: str) -> Picture | None:
    """rel_error over cost, both logarithmic, one marker a method; None where no method has both."""
    points = [
        m for m in group.methods if m.method not in ("do_nothing", "retrain") and _has(m, "rel_error", "gradients")
    ]
    if not points:
        return None
    retrain = next((m for m in group.methods if m.method == "retrain"), None)
    xs, x_floor = logarithmic([_mean(m, "gradients") for m in points])
    ys, y_floor = logarithmic([_mean(m, "rel_error") for m in points])

    def mark(axes: Axes) -> None:
        for i, (method, x, y) in enumerate(zip(points, xs, ys, strict=True)):
            _mark(axes, i, x, y, method, method.numbers["rel_error"].sd)

    cost = 0.0 if retrain is None else _mean(retrain, "gradients")

    def draw(axes: Axes) -> None:
        draw_error_against_cost(axes, xs, ys, (x_floor, y_floor), cost, mark)

    at_border = [name for name, floor in (("cost", x_floor), ("error", y_floor)) if floor is not None]
    caption = "Error against cost; lower and further left is better. 1 is doing nothing, above it harm was done."
    if at_border:
        caption += f" Points on the border have {' or '.join(at_border)} 0, or less than can be shown."
    told = "; ".join(
        f"{short(m.label)}: rel_error {told_mean(m, 'rel_error')} at {told_mean(m, 'gradients')}" for m in points
    )
    return picture(draw, key, caption, f"Error against cost in gradients, logarithmic. {told}.")


def trade_off(group: Group, key: str) -> Picture | None:
    """Loss on what stays over loss on what is forgotten, one marker a method; None where no method has both."""
    points = [m for m in group.methods if _has(m, "loss_forget", "loss_retain")]
    if len(points) < 2:
        return None
    retrain = next((m for m in points if m.method == "retrain"), None)

    def draw(axes: Axes) -> None:
        if retrain is not None:
            axes.axvline(_mean(retrain, "loss_forget"), color=FAINT, linewidth=1, linestyle=":")
            axes.axhline(_mean(retrain, "loss_retain"), color=FAINT, linewidth=1, linestyle=":")
        series = 0
        for method in points:
            x, y = _mean(method, "loss_forget"), _mean(method, "loss_retain")
            spreads = method.numbers["loss_retain"].sd, method.numbers["loss_forget"].sd
            if method.method in ("do_nothing", "retrain"):
                shape = "+" if method.method == "retrain" else "x"
                axes.plot(x, y, shape, color=INK, markersize=9, markeredgewidth=1.8, label=short(method.label))
                axes.errorbar(x, y, *spreads, color=INK, linewidth=1)
            else:
                _mark(axes, series, x, y, method, *spreads)
                series += 1
        axes.set_xlabel("loss on forgotten samples")
        axes.set_ylabel("loss on retained samples")

    aim = "The aim is the retrained model" if retrain is not None else "The aim is a retrained model"
    caption = f"Forgotten against retained. {aim}, not the highest loss on the forgotten."
    told = "; ".join(
        f"{short(m.label)}: {told_mean(m, 'loss_forget')} forgotten, {told_mean(m, 'loss_retain')} retained"
        for m in points
    )
    return picture(draw, key, caption, f"Mean losses on forgotten and retained samples. {told}.")


def growth(records: Sequence[tuple[str, float | None, float | None]], key: str) -> Picture | None:
    """‖v‖ of (name, at the start, at the end) as lines on a logarithmic axis; None for less than two with an end."""
    shown = [(name, start, end) for name, start, end in records if end is not None and end > 0]
    if len(shown) < 2:
        return None

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        for y, (_, start, end) in enumerate(shown):
            if start is not None and start > 0:
                axes.plot([start, end], [y, y], color=FAINT, linewidth=1.5)
                axes.plot(
                    start, y, "o", color=INK, markersize=5, markerfacecolor="none", label="_" if y else "at the start"
                )
            axes.plot(end, y, "o", color=SERIES[0], markersize=6, label="_" if y else "at the end")
        axes.set_yticks(range(len(shown)), [short(name, 24) for name, *_ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("‖v‖")

    ends = [end for *_, end in shown]
    caption = "‖v‖ of each unit or window after its first source and at the end."
    alt = f"Norms of {len(shown)} corrections, from {min(ends):.3g} to {max(ends):.3g} at the end."
    return picture(draw, key, caption, alt, height=1.1 + 0.2 * len(shown))


def layers(rows: Sequence[tuple[str, float | None, float | None]], key: str) -> Picture | None:
    """‖v‖ and relative distance of (parameter, ‖v‖, distance) in model order; None for less than two."""
    if len(rows) < 2:
        return None
    from matplotlib.ticker import MaxNLocator

    norms = [(i, v) for i, (_, v, _) in enumerate(rows) if v is not None and v > 0]
    distances = [(i, d) for i, (*_, d) in enumerate(rows) if d is not None and d > 0]

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        if distances:
            axes.axhline(1, color=INK, linewidth=1, linestyle="--")
            axes.plot(
                *zip(*distances, strict=True), "o", color=SERIES[0], markersize=4, label="distance (1: do nothing)"
            )
        if norms:
            axes.plot(*zip(*norms, strict=True), "s", color=SERIES[1], markersize=4, label="‖v‖")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("parameter, in the order of the model")

    caption = "By parameter: size of the correction, and distance to the reference as a share of doing nothing."
    worst = max(distances, key=lambda pair: pair[1], default=None)
    alt = f"‖v‖ and relative distance of {len(rows)} parameters."
    if worst is not None:
        alt += f" The largest distance is {worst[1]:.3g}, of {short(rows[worst[0]][0], 60)}."
    return picture(draw, key, caption, alt)


# --- parts -------------------------------------------------------------------------------------------------------------


def _has(method: MethodStats, *keys: str) -> bool:
    return all(method.numbers[key].mean is not None for key in keys)


def _mean(method: MethodStats, key: str) -> float:
    found = method.numbers[key].mean
    assert found is not None
    return found


def told_mean(method: MethodStats, key: str) -> str:
    return f"{_mean(method, key):.3g}"


def logarithmic(values: Sequence[float]) -> tuple[list[float], float | None]:
    """Values as a logarithmic axis can show them: what is below a millionth of the largest, 0 too, at the border."""
    positive = [value for value in values if value > 1e-100]
    least = 1e-6 * max(positive, default=1.0)
    usual = [value for value in positive if value >= least]
    floor = min(usual, default=1.0) / 10
    raised = [value if value >= least else floor for value in values]
    return raised, floor if min(values) < least else None


def plain_ticks(axis: Any) -> None:
    """Numbers as text in one piece, where powers of ten would be set digit by digit."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def _mark(
    axes: Axes, series: int, x: float, y: float, method: MethodStats, y_sd: float | None, x_sd: float | None = None
) -> None:
    color = SERIES[series % len(SERIES)]
    # Past the last colour, shapes go round in another rhythm, so that no pair comes twice for long.
    marker = MARKERS[(series + series // len(SERIES)) % len(MARKERS)]
    axes.errorbar(x, y, y_sd, x_sd, color=color, linewidth=1, capsize=2)
    axes.plot(x, y, marker, color=color, markersize=7, label=short(method.label), linestyle="none", clip_on=False)


def short(text: str, most: int = 44) -> str:
    """Text for one line of a picture: of printable characters, and not longer."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    # matplotlib leaves labels with a leading underscore out of legends
    line = "\u200b" + line if line.startswith("_") else line
    return line if len(line) <= most else line[: most - 1] + "…"


def picture(draw: Callable[[Axes], None], key: str, caption: str, alt: str, height: float = 3.1) -> Picture:
    """Draws into a new figure and takes its SVG apart into what may stand in a page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that its font lacks: the page's font draws them
        figure = Figure(figsize=(4.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(map(len, labels)) < 24 else 1
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Picture(_embedded(buffer.getvalue(), key, alt), caption, alt)


def _embedded(svg: str, key: str, alt: str) -> str:
    """An SVG file as an element of an HTML page: no prolog, no namespaces, ids of its own, the page's colours."""
    body = svg[svg.index("<svg") :]
    opening, _, content = body.partition(">")
    view = re.search(r'viewBox="([-0-9. ]+)"', opening)
    assert view is not None
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r"<!--.*?-->", "", content, flags=re.DOTALL)
    content = re.sub(r'(<[^>]*?)\bxlink:href="', r'\1href="', content)
    content = re.sub(r'\bid="', f'id="{key}-', content)
    content = content.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    for color, variable in _VARIABLES.items():
        content = content.replace(color, f"var({variable})")
    content = re.sub(r'font-family: [^;"]*; ', "", content)  # the page's
    return f'<svg viewBox="{view.group(1)}" role="img" aria-label="{escape(alt)}">{content.strip()}'
