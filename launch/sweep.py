"""Run a W&B sweep file cell by cell on this machine: `python launch/sweep.py --help`."""

from lmc_dist.cli import sweep_command

if __name__ == "__main__":
    sweep_command()
