"""Fine-tune under DeepSpeed ZeRO-3 with a trajectory log: `deepspeed launch/train.py --help`."""

from lmc_dist.cli import train_command

if __name__ == "__main__":
    train_command()
