"""The demo behind `make demo`: train under ZeRO-3 with a log, unlearn one person, compare with retraining.

    python -m lmc_dist.demo --output runs/demo

Everything is made on the spot: an invented corpus, a tokenizer trained on it, and a small Llama trained on a first set of
people, which is then fine-tuned on others. All commands run under the deepspeed launcher on two ranks, as a user would
start them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lmc_dist.console import unlearning_table
from lmc_dist.ports import free_port

MARKER = ".demo"  # says that everything in the folder was made here
REPO = Path(__file__).resolve().parent.parent


def launch(script: str, arguments: list[str], num_ranks: int) -> None:
    """Runs a script of launch/ under the deepspeed launcher, its chatter left out; ends the demo when it fails."""
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.exists():
        sys.exit(f"no deepspeed launcher beside {sys.executable}: run `make setup` first")
    command = [str(launcher), "--log_level", "error", "--num_accelerators", str(num_ranks)]
    command += ["--master_port", str(free_port())]  # the launcher's fixed default may be taken by another run
    command += [f"launch/{script}", *arguments]
    sys.stdout.write(f"$ deepspeed --num_accelerators {num_ranks} launch/{script} {' '.join(arguments)}\n")
    sys.stdout.flush()
    if (status := subprocess.run(command, cwd=REPO, check=False).returncode) != 0:
        sys.exit(status)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for log, results and table.json")
    parser.add_argument("--forget", default="person-57", help="the person to forget")
    parser.add_argument("--num_ranks", type=int, default=2, help="processes")
    options = parser.parse_args()
    out = Path(os.path.relpath(options.output, REPO))  # commands run, and are shown, from the repository's root
    os.chdir(REPO)
    if (out / MARKER).exists():
        shutil.rmtree(out)  # an earlier demo
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} holds something that is not an earlier demo: choose another --output")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    base = ["--config", "configs/demo_base.yaml", "--log_dir", str(out / "base_log")]
    launch("train.py", [*base, "--model_dir", str(out / "base")], options.num_ranks)
    common = ["--config", "configs/demo.yaml", "--model.path", str(out / "base")]
    common += ["--log_dir", str(out / "log")]
    launch("train.py", common, options.num_ranks)
    request = ["--forget.split", options.forget, "--output_dir", str(out / "unlearn")]
    launch("unlearn.py", [*common, *request, "--reference", "retrain", "--compare", "tim,replay"], options.num_ranks)
    result = json.loads((out / "unlearn" / "result.json").read_text())
    fields = ("method", "rel_error", "loss_forget", "loss_retain", "gradients", "seconds")
    rows = [{field: row[field] for field in fields} for row in result["rows"]]
    (out / "table.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    sys.stdout.write("\n" + unlearning_table(result) + f"\n\ntable in {out / 'table.json'}\n")


if __name__ == "__main__":
    main()
