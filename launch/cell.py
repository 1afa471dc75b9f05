"""One cell of a sweep: `torchrun launch/cell.py --help`."""

from lmc_dist.cli import cell_command

if __name__ == "__main__":
    cell_command()
