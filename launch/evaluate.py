"""Evaluate unlearned models on TOFU: `deepspeed launch/evaluate.py --help`."""

from lmc_dist.cli import evaluate_command

if __name__ == "__main__":
    evaluate_command()
