"""Commands as a page shows them, one after the other, each in a fork of a process that has imported everything.

    python tests/typed.py < commands

Imports take most of the time of a small command. `lmc …` and `python FILE …` are forked, whatever else is started as it is.
Stops at the first command that fails, with its status.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

from lmc_dist.sweeps.children import import_all

PRELOADED = (
    "accelerate",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what `initialize` imports
    "matplotlib.pyplot",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "lmc_dist.planner.calibrate",
    "lmc_dist.training",
    "lmc_dist.unlearn.run",
)


def main() -> None:
    commands = [line.strip() for line in sys.stdin if line.strip()]
    import_all(PRELOADED)
    for command in commands:
        started = time.perf_counter()
        print(f"$ {command}", flush=True)
        status = run(shlex.split(command))
        print(f"[{time.perf_counter() - started:.1f} s, status {status}]", flush=True)
        if status:
            sys.exit(status)


def run(words: list[str]) -> int:
    """The exit status of a command."""
    is_script = words[0] == "python" and words[1].endswith(".py")
    if words[0] != "lmc" and not is_script:
        return subprocess.run(words, check=False).returncode
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if is_script:
            sys.argv = words[1:]
            sys.path[0] = str(Path(words[1]).parent)
            runpy.run_path(words[1], run_name="__main__")
        else:
            from lmc_dist.cli import main as lmc

            lmc(words[1:])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
