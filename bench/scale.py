"""The scale tables of docs/scaling.md: log, products and answers of 1B to 70B models on 8 to 512 GPUs, by the planner.

    .venv/bin/python bench/scale.py

Nothing is run or allocated: models are on the meta device, seconds follow from data sheets and the constants of
docs/scaling.md §4. A run of 1000 steps of AdamW with 512 samples of 512 tokens each, bfloat16 updates, snapshots every 100
steps; 40 samples that lie evenly over it are forgotten, so that nearly all of it is gone through again. Prints two tables in
Markdown: a request, and what one step takes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import REPO, write_results

from lmc_dist.planner.facts import busiest
from lmc_dist.planner.memory import gathered_bytes, largest_step, product_bytes
from lmc_dist.planner.work import gradient_work, product_work
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.size import LogShape, vector_bytes

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
        "gradient_flops": gradient_work(model, LENGTH).flops * tokens,
    }
    for strategy in ("replay", "ggn", "exact"):
        s = strategies[strategy]
        found |= {
            f"{strategy}_seconds": s.seconds,
            f"{strategy}_bytes": s.peak_bytes,
            f"{strategy}_obstacle": s.obstacle,
        }
    for tier in TIERS:
        kinds = [kind for kind in TIERS[tier] if kind in ("update", "gradient", "theta")]
        shape = LogShape(
            model.parameters, gpus, "zero3", tier, update_dtype=torch.bfloat16, gradient_dtype=torch.bfloat16
        )
        found[f"{tier}_bytes_per_step_and_rank"] = sum(vector_bytes(shape, kind) for kind in kinds) / gpus
    passes, work = largest_step(planned.log, gpus), product_work(model, "GGN", 1, LENGTH)
    found |= {
        "shard_bytes": model.shard(gpus) * model.itemsize,
        "gathered_bytes": gathered_bytes(model, 1),
        "product_bytes": product_bytes(model, "GGN", 1, passes, gpus),
        "product_flops": work.flops * tokens,
        "product_network_bytes_per_rank": (work.gathered + work.reduced) * model.itemsize * (1 - 1 / gpus),
        "product_seconds": planned.machine.product("GGN", 1, busiest(planned.log.passes[0], gpus)),
    }
    return found


def amount(value: float, units: str = "kMGTP") -> str:
    """In powers of 1000, two digits or more."""
    for unit in ("", *units):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} E"


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


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


def step_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = [
        "model",
        "GPUs",
        *(f"`{tier}`" for tier in TIERS if TIERS[tier]),
        "shard of a vector",
        "gathered at a time",
    ]
    columns += ["peak", "FLOPs", "network, a rank", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for found in rows:
        sizes = [found[f"{tier}_bytes_per_step_and_rank"] for tier in TIERS if TIERS[tier]]
        sizes += [found["shard_bytes"], found["gathered_bytes"], found["product_bytes"]]
        cells = [found["model"], str(found["gpus"]), *(f"{amount(size)}B" for size in sizes)]
        cells += [amount(found["product_flops"]).strip(), f"{amount(found['product_network_bytes_per_rank'])}B"]
        lines.append(f"| {' | '.join([*cells, seconds(found['product_seconds'])])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    rows = [row(name, gpus) for name in MODELS for gpus in GPUS]
    print(table(rows))
    print(f"\n{step_table(rows)}\n\nrows: {len(rows)}")
    write_results(options.json, "scale", rows, {"rows": len(rows)})


if __name__ == "__main__":
    main()
