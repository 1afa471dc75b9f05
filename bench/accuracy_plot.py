"""Pictures of bench/accuracy.py: error against cost, and the distance while training goes on."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

MARKERS = {
    "do_nothing": ("black", "x"),
    "tim": ("tab:red", "v"),
    "fisher": ("tab:orange", "^"),
    "low_rank": ("tab:brown", "s"),
    "head10_low_rank": ("tab:brown", "D"),
    "ggn_k10": ("tab:cyan", "<"),
    "ggn_k50": ("tab:cyan", ">"),
    "ggn": ("tab:blue", "s"),
    "head10_ggn": ("tab:blue", "D"),
    "auto_ggn": ("tab:blue", "*"),
    "exact": ("tab:green", "s"),
    "head10_exact": ("tab:green", "D"),
    "secant": ("tab:purple", "o"),
    "head10_secant": ("tab:purple", "D"),
    "replay": ("tab:gray", "P"),
    "retrain": ("black", "+"),
}
FLOOR = 1e-4  # where an error of 0 is drawn
FREE = 0.1  # where a cost of 0 is drawn


def plot_errors(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel an optimizer: geometric means over requests; bars are the smallest and the largest of them."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(6 * len(names) + 2, 5.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        for method in MARKERS:
            mine = [row for row in rows if (row["optimizer"], row["method"]) == (name, method) and _is_there(row)]
            if not mine:
                continue
            errors = [max(row["rel_error"], FLOOR) for row in mine]
            costs = [max(row["ratio"], FREE) for row in mine]
            x, y = statistics.geometric_mean(costs), statistics.geometric_mean(errors)
            # A mean of n equal numbers can round to less than they are.
            bars = [[max(y - min(errors), 0.0)], [max(max(errors) - y, 0.0)]]
            across = [[max(x - min(costs), 0.0)], [max(max(costs) - x, 0.0)]]
            _point(axis, method, mine[0]["label"], x, y, bars, across)
        _finish(axis, f"{name}: geometric mean over requests, bars: least and most")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    _save(figure, file)


def plot_requests(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel an optimizer and request: means over seeds, bars are their s.d."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    requests = list(dict.fromkeys(row["request"] for row in rows))
    size = (4.2 * len(requests), 4.2 * len(names))
    figure, axes = pyplot.subplots(len(names), len(requests), figsize=size, squeeze=False, layout="constrained")
    for name, line in zip(names, axes, strict=True):
        for request, axis in zip(requests, line, strict=True):
            for row in rows:
                if (row["optimizer"], row["request"]) == (name, request) and _is_there(row):
                    x, y = max(row["ratio"], FREE), max(row["rel_error"], FLOOR)
                    down = min(row["rel_error_sd"], y - FLOOR)
                    left = min(row["ratio_sd"], x - FREE)
                    across = [[left], [row["ratio_sd"]]]
                    _point(axis, row["method"], row["label"], x, y, [[down], [row["rel_error_sd"]]], across)
            _finish(axis, f"{name}, {request}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    _save(figure, file)


def plot_continued(rows: list[dict[str, Any]], file: Path) -> None:
    """‖difference‖ to the continued reference over the further steps, a panel an optimizer, rate and request."""
    if not rows:
        return
    lines = list(dict.fromkeys((row["optimizer"], row["rate"]) for row in rows))
    requests = list(dict.fromkeys(row["request"] for row in rows))
    size = (6 * len(requests), 3.5 * len(lines))
    figure, axes = pyplot.subplots(len(lines), len(requests), figsize=size, squeeze=False, layout="constrained")
    for row in rows:
        axis = axes[lines.index((row["optimizer"], row["rate"]))][requests.index(row["request"])]
        style = "--" if row["case"].startswith("weights,") else "-"
        axis.plot(row["differences"], style, label=row["case"], linewidth=1.3)
        axis.set_title(
            f"{row['optimizer']}, {row['request']}, {row['rate']:g} of the peak learning rate", fontsize="small"
        )
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.set_xlabel("further steps")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[-1][-1].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=3)
    axes[0][0].set_ylabel("‖θ − θ of the continued retrain‖")
    _save(figure, file)


def _is_there(row: dict[str, Any]) -> bool:
    return row["rel_error"] is not None and math.isfinite(row["rel_error"])


def _point(axis: Any, method: str, label: str, x: float, y: float, bars: Any, across: Any) -> None:
    color, marker = MARKERS[method]
    style = {"color": color, "marker": marker, "markersize": 6, "linestyle": "none", "capsize": 2, "elinewidth": 0.8}
    axis.errorbar([x], [y], yerr=bars, xerr=across, label=label, **style)


def _finish(axis: Any, title: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=FLOOR / 1.5)
    axis.axhline(1.0, color="black", linewidth=0.5, linestyle=":")
    axis.set_title(title, fontsize="small")
    axis.set_xlabel(f"gradients of a batch (0 drawn at {FREE:g})")
    axis.set_ylabel(f"rel_error (0 drawn at {FLOOR:g})")
    axis.grid(alpha=0.3)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
