"""How close corrections come to retraining, on TOFU with a pretrained tiny Llama, over several trainings.

    .venv/bin/python bench/accuracy.py --data DATA/tofu --model DATA/models/stories260K

Each of `--seeds` orders of the data is trained under plain SGD and under AdamW (warm-up, cosine, clipping, weight decay,
accumulation of two passes), and five requests are made of each run: one sample of the first step that moves weights, one
of the middle step, the whole batch of step 5, 1 % and 10 % of the samples. `rel_error` is the distance to the run without the
data over that of doing nothing; `gradients` is the cost in gradients of a training batch. The reference is exact replay;
once an optimizer it is compared with a training run of its own. There training also goes on for 50 steps from corrected
runs, with weights alone and with the optimizer's state corrected, beside the reference that goes on as well.

One process with one thread for each training, `--jobs` of them at a time. What is done is kept in `--output` and is not
done again; a training that fails is reported and the others go on. Leaves accuracy.png, requests.png and continued.png
beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from accuracy_cell import METHODS, TRAININGS, Cell
from accuracy_run import work
from measure import add_tofu_arguments, on_ranks, write_results
from tqdm import tqdm

STEPS, QUICK_STEPS = 150, 30
NOTHING = "nothing corrected"
REQUESTS = ("first", "middle", "batch", "1%", "10%")


def stored(cell: Cell) -> dict[str, Any] | None:
    """The result of a cell that was run with these settings."""
    if not cell.file.exists():
        return None
    found = json.loads(cell.file.read_text())
    return found if found["settings"] == json.loads(json.dumps(cell.settings)) else None


def run_cell(cell: Cell) -> dict[str, Any]:
    """A cell in a process of its own; what it dies of becomes its result."""
    try:
        return on_ranks(1, work, cell)
    except SystemExit as error:
        return {"optimizer": cell.optimizer, "seed": cell.seed, "failed": f"{error}; see {cell.folder}/{cell.name}.txt"}


def run_cells(cells: Iterable[Cell], jobs: int) -> list[dict[str, Any]]:
    """Results of all cells, in their order; those that are stored are taken as they are."""
    cells = list(cells)
    results = {cell.name: found for cell in cells if (found := stored(cell)) is not None}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), initial=len(results), desc="trainings") as bar:
        futures = {pool.submit(run_cell, cell): cell for cell in cells if cell.name not in results}
        for future in as_completed(futures):
            cell, found = futures[future], future.result()
            results[cell.name] = found
            tail = found["failed"] if "failed" in found else f"{found['seconds']:.0f} s"
            bar.write(f"{cell.name}: {tail}", file=sys.stderr)
            bar.update()
    return [results[cell.name] for cell in cells]


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an optimizer, request and method: mean and s.d. over seeds."""
    found = []
    for optimizer in TRAININGS:
        for request in REQUESTS:
            for method in ("do_nothing", *METHODS, "replay", "retrain"):
                same = [r for r in rows if (r["optimizer"], r["request"], r["method"]) == (optimizer, request, method)]
                if not same:
                    continue
                good = [r for r in same if r["failed"] is None]
                errors = [r["rel_error"] for r in good]
                heads = [r["head"] for r in good if r["head"] is not None]
                found.append(
                    {key: same[0][key] for key in ("optimizer", "request", "method", "label", "storage")}
                    | {
                        "rel_error": mean(errors),
                        "rel_error_sd": spread(errors),
                        "ratio": mean([r["gradients"] for r in good]),
                        "ratio_to": "one gradient of a training batch",
                        "ratio_sd": spread([r["gradients"] for r in good]),
                        "seconds": mean([r["seconds"] for r in good]),
                        "head": mean(heads),
                        "touched_steps": statistics.fmean(r["touched_steps"] for r in same),
                        "seeds": len(same),
                        "failed": len(same) - len(good),
                    }
                )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """rel_error and cost of each method, a line each, requests side by side."""
    for optimizer in TRAININGS:
        mine = {(r["method"], r["request"]): r for r in rows if r["optimizer"] == optimizer}
        if not mine:
            continue
        seeds, storage = max(r["seeds"] for r in mine.values()), next(iter(mine.values()))["storage"]
        print(f"\n{optimizer}, storage '{storage}', {seeds} seed(s): rel_error ± s.d. (gradients)")
        print(f"{'':<24}" + "".join(f"{request:>24}" for request in REQUESTS))
        for method in dict.fromkeys(method for method, _ in mine):
            cells = [mine.get((method, request)) for request in REQUESTS]
            label = next(row["label"] for row in cells if row is not None)
            print(f"{label:<24}" + "".join(f"{entry(row):>24}" for row in cells))


def entry(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["rel_error"] is None:
        return f"failed {row['failed']}/{row['seeds']}"
    lost = f" {row['failed']}/{row['seeds']} failed" if row["failed"] else ""
    head = f" h{row['head']:.0f}" if row["method"] == "auto_ggn" else ""
    spread = f" ± {row['rel_error_sd']:.3f}" if row["seeds"] > 1 else ""
    return f"{row['rel_error']:.3f}{spread} ({row['ratio']:.0f}){head}{lost}"


def show_continued(rows: list[dict[str, Any]]) -> None:
    """Distances from the continued reference, and what remains of that of nothing corrected."""
    if not rows:
        return
    print(
        "\ntraining goes on: ‖θ − θ of the run without the data‖, and over that of nothing corrected at the same step"
    )
    print(f"{'learning rate as part of the peak, case':<66}{'at once':>20}{'after 50 steps':>20}{'end/at once':>13}")
    for row in rows:
        key = [row[k] for k in ("optimizer", "request", "rate")]
        (base,) = (r for r in rows if [r[k] for k in ("optimizer", "request", "rate")] == key and r["case"] == NOTHING)
        at, end = row["differences"][0], row["differences"][-1]
        name = f"{', '.join(map(str, key))}: {row['case']}"
        first, last = (f"{d:.3g} ({d / base['differences'][i]:.3f})" for i, d in ((0, at), (-1, end)))
        print(f"{name:<66}{first:>20}{last:>20}{end / at if at else math.nan:>13.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tofu_arguments(parser)
    parser.add_argument("--output", default="runs/accuracy", help="where results and pictures go")
    parser.add_argument("--optimizers", nargs="*", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--seeds", type=int, default=5, help="trainings under each optimizer")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="those to run")
    parser.add_argument("--first_seed", type=int, default=0, help="of them; cells of several machines add up in OUTPUT")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help=f"one seed of {QUICK_STEPS} steps, in OUTPUT/quick")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    output = Path(options.output) / "quick" if options.quick else Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    steps, count = (QUICK_STEPS, 1) if options.quick else (STEPS, options.seeds)
    seeds = range(options.first_seed, options.first_seed + count)
    where = (options.data, options.model, str(output))
    cells = [
        Cell(name, seed, steps, *where, seed == 0 and len(options.methods) == len(METHODS), tuple(options.methods))
        for seed in seeds
        for name in options.optimizers
    ]
    results = run_cells(cells, options.jobs)
    done = [result for result in results if "failed" not in result]
    rows = summarize([row for result in done for row in result["rows"]])
    show(rows)
    continued = [row for result in done for row in result["continued"]]
    show_continued(continued)
    print()
    for result in done:
        if result["replay_is_retraining"] is not None:
            print(f"replay_is_retraining_{result['optimizer']}: {result['replay_is_retraining']}")
    failed = [result for result in results if "failed" in result]
    for result in failed:
        print(f"FAILED {result['optimizer']}, seed {result['seed']}: {result['failed']}")
    if done:
        from accuracy_plot import plot_continued, plot_errors, plot_requests

        plot_errors(rows, output / "accuracy.png")
        plot_requests(rows, output / "requests.png")
        plot_continued(continued, output / "continued.png")
    summary = {f"worst_head10_exact_{name}": max_error(rows, name) for name in options.optimizers}
    for name, value in summary.items():
        print(f"{name}: {value:.4f}")
    write_results(options.json, "accuracy", rows, summary, continued=continued, failed=failed, cells=done)
    sys.exit(1 if failed else 0)


def max_error(rows: list[dict[str, Any]], optimizer: str) -> float:
    """Largest mean rel_error of head 10 + exact over requests."""
    mine = [r for r in rows if (r["optimizer"], r["method"]) == (optimizer, "head10_exact")]
    errors = [math.inf if r["rel_error"] is None else r["rel_error"] for r in mine]
    return max(errors, default=math.nan)


if __name__ == "__main__":
    main()
