"""The scale table of docs/scaling.md: log, products and answers of 1B to 70B models on 8 to 512 GPUs, by the planner.

    .venv/bin/python bench/scale.py

Nothing is run or allocated: models are on the meta device, seconds follow from data sheets and the constants of
docs/scaling.md §4. A run of 1000 steps of AdamW with 512 samples of 512 tokens each, bfloat16 updates, snapshots every 100
steps; 40 samples that lie evenly over it are forgotten, so that nearly all of it is gone through again. Prints Markdown.
"""

from __future__ import annotations

import argparse
from typing import Any

from measure import REPO, write_results

MODELS = {"1B": "llama3_1b", "8B": "llama3_8b", "70B": "llama3_70b"}
GPUS = (8, 64, 512)
STEPS, BATCH, LENGTH, FORGOTTEN = 1000, 512, 512, 40
HARDWARE = "h100"


def row(name: str, gpus: int) -> dict[str, Any]:
    """A model on a number of GPUs. Local."""
    from lmc_dist.cli import parse
    from lmc_dist.log_commands.plan_unlearn import plan_without_log

    config = parse(
        "plan unlearn",
        f"--config {REPO}/configs/shapes/{MODELS[name]}.yaml --train.batch_size {BATCH} --world {gpus} --hardware {HARDWARE} "
        f"--plan_unlearn.steps {STEPS} --plan_unlearn.forgotten {FORGOTTEN}".split(),
    )
    planned = plan_without_log(config)
    model, strategies = planned.log.model, {s.name: s for s in planned.strategies}
    tokens = BATCH * LENGTH
    found: dict[str, Any] = {
        "model": name,
        "gpus": gpus,
        "parameters": model.numel,
        "update_bytes_per_rank": planned.log.step_bytes / gpus,
        "snapshot_bytes_per_rank": planned.log.snapshot_bytes / gpus,
        "log_bytes": planned.log.step_bytes * STEPS + planned.log.snapshot_bytes * (STEPS // 100 + 1),
        "gradient_flops": 6.0 * model.numel * tokens,
    }
    for strategy in ("replay", "ggn", "exact"):
        s = strategies[strategy]
        found |= {
            f"{strategy}_seconds": s.seconds,
            f"{strategy}_bytes": s.peak_bytes,
            f"{strategy}_obstacle": s.obstacle,
        }
    return found


def amount(value: float, units: str = "kMGTP") -> str:
    """In powers of 1000, two digits or more."""
    for unit in ("", *units):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} E"


def entry(found: dict[str, Any], strategy: str) -> str:
    if found[f"{strategy}_obstacle"] is not None:
        return "does not fit"
    return f"{found[f'{strategy}_seconds'] / 3600:.2g} h, {found[f'{strategy}_bytes'] / 1e9:.0f} GB"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| model | GPUs | u_s a step and rank | snapshot, a rank | whole log | FLOPs of a batch gradient | replay | GGN, joint | exact, joint |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---|---|---|"]
    for found in rows:
        sizes = (found["update_bytes_per_rank"], found["snapshot_bytes_per_rank"], found["log_bytes"])
        cells = [found["model"], str(found["gpus"]), *(f"{amount(size)}B" for size in sizes)]
        cells += [amount(found["gradient_flops"]).strip(), *(entry(found, s) for s in ("replay", "ggn", "exact"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    rows = [row(name, gpus) for name in MODELS for gpus in GPUS]
    print(table(rows))
    print(f"\nrows: {len(rows)}")
    write_results(options.json, "scale", rows, {"rows": len(rows)})


if __name__ == "__main__":
    main()
