"""What a person sees: progress on rank 0, a table at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc_dist.unlearn.status import Status


# What is told of a step: {method, step, seconds, seconds_left}, and of a correction `Status` too.
Listener = Callable[[dict[str, Any]], None]


class StepProgress:
    """Progress over steps; call it with each step that is done, or with the status after it.

    Args:
        name: What is running.
        first: First step.
        stop: One past the last.
        kind: `bar`, `json` (a line a step on standard error) or `none`.
        listeners: Told the same.
    """

    def __init__(self, name: str, first: int, stop: int, kind: str, listeners: Sequence[Listener] = ()) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=stop - first, desc=name, unit="step", disable=kind != "bar")
        self.name, self.first, self.stop = name, first, stop
        self.listeners = _with_lines(kind, listeners)
        self.started = time.perf_counter()

    def __call__(self, at: int | Status) -> None:
        step = at if isinstance(at, int) else at.step
        done, seconds = step - self.first + 1, time.perf_counter() - self.started
        if done < 1:  # a replay begins before the first step that changes
            return
        if not isinstance(at, int):
            growth = "" if at.growth is None else f", × {at.growth:.3f} a step"
            self.bar.set_postfix_str(f"‖v‖ {at.v_max:.3g}{growth}", refresh=False)
        self.bar.update(max(done - self.bar.n, 0))
        # A replay begins at a snapshot before the first of them.
        left = seconds / done * (self.stop - self.first - done) if done > 0 else None
        _tell(self.listeners, self.name, at, seconds, left)

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class UnitProgress:
    """Progress over forget units; call it with the status after each step.

    Args:
        name: How they are corrected.
        num_units: All of them.
        kind: As of `StepProgress`.
        listeners: As there.
    """

    def __init__(self, name: str, num_units: int, kind: str, listeners: Sequence[Listener] = ()) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=num_units, desc="units", unit="unit", disable=kind != "bar")
        self.name, self.started = name, time.perf_counter()
        self.listeners = _with_lines(kind, listeners)

    def __call__(self, status: Status) -> None:
        self.bar.set_postfix_str(
            f"step {status.step}, {status.active} active, ‖v‖ {status.v_min:.2g} to {status.v_max:.2g}", refresh=False
        )
        self.bar.update(status.done - self.bar.n)
        self.bar.refresh()
        seconds = time.perf_counter() - self.started
        left = seconds / status.done * status.left if status.done else None
        _tell(self.listeners, self.name, status, seconds, left)

    def __enter__(self) -> UnitProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _tell(listeners: Sequence[Listener], name: str, at: int | Status, seconds: float, left: float | None) -> None:
    found = {"step": at} if isinstance(at, int) else {**vars(at), "v_norm": at.v_max}
    for listener in listeners:
        listener({"method": name, **found, "seconds": seconds, "seconds_left": left})


def _with_lines(kind: str, listeners: Sequence[Listener]) -> list[Listener]:
    return [*([_line] if kind == "json" else []), *listeners]


def _line(values: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(values) + "\n")


def unlearning_table(result: dict[str, Any]) -> str:
    """The table of an unlearning run as text."""
    request = result["request"]
    width = max(30, *(len(row["label"]) + 2 for row in result["rows"]))
    lines = [
        f"forgot: {request['what']}, in {request['steps']} of {request['num_steps']} steps "
        f"({request['counterfactual']})",
        f"{'method':<{width}}{'rel_error':>16}{'loss on forgotten':>20}{'loss on retained':>19}"
        f"{'gradients-equivalent':>23}{'seconds':>10}",
    ]
    for row in result["rows"]:
        retained = "-" if request.get("retained") == 0 else number(row["loss_retain"])
        error = "-" if row["rel_error"] is None else f"{row['rel_error']:.3f}"
        if row["method"] == "retrain":
            error += " (reference)"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(
            f"{row['label']:<{width}}{error:>16}{number(row['loss_forget']):>20}{retained:>19}"
            f"{row['gradients']:>23.1f}{seconds:>10}"
        )
    if result.get("privacy") is not None:
        lines.append(result["privacy"]["statement"])
    return "\n".join(lines)


def recombined_line(result: dict[str, Any]) -> str:
    """What units a finished run was set to, as text."""
    units = result["units"]
    undone = f", without {', '.join(units['undone'])}" if units["undone"] else ""
    loss = result["loss_forget"]
    told = "" if loss is None else f"; loss on what is forgotten {loss:.4f}"
    return f"{result['n_units']} units in{undone}: ‖v‖ = {result['v_norm']:.4g}{told}"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def training_table(summary: dict[str, Any]) -> str:
    """The end of a training run as text."""
    if not summary["steps"]:
        return f"trained nothing; log in {summary['log_dir']}"
    return (
        f"trained {summary['steps']} steps on {summary['samples']} samples with {summary['world_size']} ranks in "
        f"{summary['seconds']:.1f} s: loss {summary['first_loss']:.4f} → {summary['last_loss']:.4f}; "
        f"log in {summary['log_dir']}"
    )
