"""Forget by a baseline, from a trajectory log: `deepspeed launch/baseline.py --help`."""

from lmc_dist.cli import baseline_command

if __name__ == "__main__":
    baseline_command()
