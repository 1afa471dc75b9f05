"""What a person sees: progress on rank 0, a table at the end."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class StepProgress:
    """Progress over training steps; call it with each step that is done.

    Args:
        name: What is running.
        first: First step.
        stop: One past the last.
        kind: `bar`, `json` (a line a step on standard error) or `none`.
    """

    def __init__(self, name: str, first: int, stop: int, kind: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=stop - first, desc=name, unit="step", disable=kind != "bar")
        self.name, self.first, self.stop, self.kind = name, first, stop, kind
        self.started = time.perf_counter()

    def __call__(self, step: int) -> None:
        done = step - self.first + 1
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)
        if self.kind == "json":
            seconds = time.perf_counter() - self.started
            left = seconds / done * (self.stop - self.first - done)
            _line({"method": self.name, "step": step, "seconds": seconds, "seconds_left": left})

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class UnitProgress:
    """Progress over forget units; call it with the status after each step.

    Args:
        num_units: All of them.
        kind: As of `StepProgress`.
    """

    def __init__(self, num_units: int, kind: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=num_units, desc="units", unit="unit", disable=kind != "bar")
        self.kind, self.started = kind, time.perf_counter()

    def __call__(self, status: Any) -> None:
        self.bar.set_postfix_str(
            f"step {status.step}, {status.active} active, ‖v‖ {status.v_min:.2g} to {status.v_max:.2g}", refresh=False
        )
        self.bar.update(status.done - self.bar.n)
        self.bar.refresh()
        if self.kind == "json":
            seconds = time.perf_counter() - self.started
            left = seconds / status.done * status.left if status.done else None
            _line({**vars(status), "seconds": seconds, "seconds_left": left})

    def __enter__(self) -> UnitProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _line(values: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(values) + "\n")


def unlearning_table(result: dict[str, Any]) -> str:
    """The table of an unlearning run as text."""
    request = result["request"]
    lines = [
        f"forgot: {request['what']}, in {request['steps']} of {request['num_steps']} steps "
        f"({request['counterfactual']})",
        f"{'method':<30}{'rel_error':>16}{'loss on forgotten':>20}{'loss on retained':>19}"
        f"{'gradients-equivalent':>23}{'seconds':>10}",
    ]
    for row in result["rows"]:
        error = "-" if row["rel_error"] is None else f"{row['rel_error']:.3f}"
        if row["method"] == "retrain":
            error += " (reference)"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(
            f"{row['label']:<30}{error:>16}{number(row['loss_forget']):>20}{number(row['loss_retain']):>19}"
            f"{row['gradients']:>23.1f}{seconds:>10}"
        )
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
