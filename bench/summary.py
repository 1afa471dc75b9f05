"""What all benchmarks found, on one page: FOLDER/summary.json and a table.

make bench                                   runs them all, then this
.venv/bin/python bench/summary.py runs/bench
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the benchmarks wrote their results")
    folder = Path(parser.parse_args().folder)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "summary.json"]
    if not results:
        sys.exit(f"error: no results in {folder}: run `make bench`")
    found = {result["name"]: {"machine": result["machine"], **result["summary"]} for result in results}
    (folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, figures in found.items():
        for key, value in figures.items():
            if key != "machine":
                print(f"{name:<14} {key:<44} {value:.4g}")
    for machine in sorted({figures["machine"] for figures in found.values()}):
        print(f"on {machine}")


if __name__ == "__main__":
    main()
