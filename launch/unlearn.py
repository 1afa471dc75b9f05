"""Unlearn from a trajectory log: `deepspeed launch/unlearn.py --help`."""

from lmc_dist.cli import unlearn_command

if __name__ == "__main__":
    unlearn_command()
