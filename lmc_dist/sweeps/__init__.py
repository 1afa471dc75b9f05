"""Sweeps: a file of `wandb sweep` carried out cell by cell on this machine, and what a cell is."""
