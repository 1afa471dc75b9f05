"""Accuracy on TOFU from the pretrained tiny Llama: train once, then three requests, each against its own retrain.

    .venv/bin/python bench/tofu.py --data DATA/tofu --model DATA/models/stories260K

Runs launch/train.py and launch/unlearn.py under the deepspeed launcher on 2 ranks and prints one table; takes about
twelve minutes on 2 cores. `--json FILE` writes {name, machine, rows}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import REPO, add_tofu_arguments, write_results
from tqdm import tqdm

from lmc_dist.ports import free_port

REQUESTS = {
    "one batch, step 62": ["--forget.batches", "62"],
    "6 samples": ["--forget.samples", "2003,2347,2718,3141,3590,3999"],
    "forget01 (40 samples)": ["--forget.split", "forget01"],
}


def launch(script: str, *arguments: str) -> None:
    """Runs a script under the deepspeed launcher on 2 ranks; its output is shown when it fails."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = str(free_port())  # the launcher's fixed default may be taken by another run
    command = [launcher, "--num_accelerators", "2", "--master_port", port, str(REPO / "launch" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tofu_arguments(parser)
    parser.add_argument("--output", default="runs/tofu", help="where log and runs go")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    out = Path(options.output)
    common = ["--config", "configs/tofu.yaml", "--data.path", options.data, "--model.path", options.model]
    common += ["--log_dir", str(out / "log"), "--overwrite", "true"]
    launch("train.py", *common)
    rows = []
    for i, (name, target) in enumerate(tqdm(REQUESTS.items(), desc="requests")):
        folder = out / f"request-{i}"
        compare = ["--reference", "retrain", "--compare", "tim,replay", "--output_dir", str(folder)]
        launch("unlearn.py", *common, *target, *compare)
        result = json.loads((folder / "result.json").read_text())
        rows += [{"request": name, "touched_steps": result["request"]["steps"], **row} for row in result["rows"]]
    for row in rows:
        print(
            f"{row['request']:<24}{row['label']:<30}{row['rel_error']:>8.3f}{row['loss_forget']:>10.4f}"
            f"{row['loss_retain']:>10.4f}{row['gradients']:>8.1f}{row['seconds']:>8.1f}"
        )
    summary = {"worst_ggn_rel_error": max(row["rel_error"] for row in rows if row["method"] == "ggn")}
    print(f"worst_ggn_rel_error: {summary['worst_ggn_rel_error']:.4f}")
    write_results(options.json, "tofu", rows, summary)


if __name__ == "__main__":
    main()
