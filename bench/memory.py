"""Peak memory of curvature products per rank, by world size and depth.

    .venv/bin/python bench/memory.py
    .venv/bin/python bench/memory.py --num_ranks 1 2 --layers 4 8 --plot memory.png

Counts the bytes of live tensors on rank 0 while a product runs, everything it reads included. Blocks are recomputed; the
table also says what a layer adds, less this rank's shards of the vectors held (θ, v and the result): blocks' inputs, which
are kept until the way back, are all that should be left (with their tangents, for the Hessian).
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import live_peak, on_ranks, write_results
from tqdm import tqdm

SEQUENCES, LENGTH, HIDDEN, VOCAB = 4, 64, 128, 1024  # sequences of each rank
MODES = {"gradient": 2, "GGN": 3, "exact": 3}  # and the sharded vectors alive in it


def work(layers: int) -> dict[str, Any]:
    """{mode: peak bytes} on this rank, and what a layer has to add."""
    from transformers import LlamaConfig

    from lmc_dist.curvature import HVPConfig, MicroBatch, TokenCrossEntropy, hvp_apply
    from lmc_dist.curvature.products import weighted_gradient
    from lmc_dist.shards.layout import ShardLayout
    from lmc_dist.shards.module import ShardedModule, build_skeleton
    from lmc_dist.shards.vector import ShardedVector

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=LENGTH, **sizes)
    config.tie_word_embeddings = True
    skeleton = build_skeleton(config)
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.zeros(layout)
    for _, shard in theta.items():
        shard.normal_(std=0.02, generator=torch.Generator().manual_seed(layout.rank))
    v, loss = theta * 0.5, TokenCrossEntropy()
    ids = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(layout.rank))
    micros = [MicroBatch({"input_ids": ids}, ids, torch.ones(SEQUENCES))]

    def run(mode: str, blocked: bool) -> int:
        module = ShardedModule(skeleton, layout, blocked=blocked)
        if mode == "gradient":
            return live_peak(lambda: weighted_gradient(module, loss, theta, micros))
        return live_peak(lambda: hvp_apply(v, HVPConfig(mode), module, loss, theta, micros))

    block = sum(slot.padded for slot in layout if ".layers.0." in slot.spec.name) * 4
    boundary = SEQUENCES * LENGTH * HIDDEN * 4
    found: dict[str, Any] = {f"{mode}, blocked": run(mode, True) for mode in MODES}
    found |= {f"{mode}, unblocked": run(mode, False) for mode in MODES}
    return {"peaks": found, "block_shard": block, "boundary": boundary}


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worlds = sorted({row["world_size"] for row in rows})
    figure, axes = plt.subplots(1, len(worlds), figsize=(4 * len(worlds), 3.5), sharey=True, squeeze=False)
    for axis, world in zip(axes[0], worlds, strict=True):
        for case in dict.fromkeys(row["case"] for row in rows):
            points = sorted((r["layers"], r["peak_mb"]) for r in rows if (r["world_size"], r["case"]) == (world, case))
            style = "--" if "unblocked" in case else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=case)
        axis.set_title(f"{world} rank{'s' if world > 1 else ''}")
        axis.set_xlabel("layers")
    axes[0][0].set_ylabel("peak of live tensors, MB a rank")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ranks", type=int, nargs="*", default=[1, 2, 4], help="world sizes")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16], help="depths, ascending")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    parser.add_argument("--plot", default=None, help="draw peaks over depth into this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    runs = [(num_ranks, layers) for num_ranks in options.num_ranks for layers in options.layers]
    for num_ranks, layers in tqdm(runs, desc="runs"):
        found = on_ranks(num_ranks, work, layers)
        for case, peak in found["peaks"].items():
            row = {"world_size": num_ranks, "layers": layers, "case": case, "peak_mb": peak / 2**20}
            rows.append(row | {"block_shard": found["block_shard"], "boundary": found["boundary"]})
    depths = "".join(f"{f'{layers} layers':>12}" for layers in options.layers)
    print(f"{'ranks':<7}{'product, peak MB a rank':<26}{depths}{'boundaries a layer':>20}")
    worst = 0.0
    for num_ranks in options.num_ranks:
        for case in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if (row["world_size"], row["case"]) == (num_ranks, case)]
            line = f"{num_ranks:<7}{case:<26}" + "".join(f"{row['peak_mb']:>12.2f}" for row in mine)
            mode, _, blocked = case.partition(", ")
            if blocked == "blocked" and len(mine) > 1:
                growth = []
                for a, b in pairwise(mine):
                    added = (b["peak_mb"] - a["peak_mb"]) * 2**20 / (b["layers"] - a["layers"])
                    growth.append((added - MODES[mode] * a["block_shard"]) / a["boundary"])
                expected = 2 if mode == "exact" else 1
                worst = max(worst, max(growth) / expected)
                line += f"{max(growth):>14.2f} of {expected}"
            print(line)
    print(f"growth_over_boundaries: {worst:.3f}")
    write_results(options.json, "memory", rows, {"growth_over_boundaries": worst})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
