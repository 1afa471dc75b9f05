"""Supervised fine-tuning in plain PyTorch. What keeps the log is marked with (log).

python examples/loop.py --model runs/example/base --data runs/example/data.jsonl --log_dir runs/example/loop_log
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from trainer import read_samples
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lmc_dist.trajectory.callback import training_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="JSON lines with id, question, answer")
    parser.add_argument("--log_dir", required=True, help="folder of the trajectory log")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    loader = DataLoader(read_samples(options.data, tokenizer), options.batch, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with training_log(  # (log)
        model,
        options.log_dir,
        optimizer,
        save_interval=4,
        save_batch_data=True,
        loss_normalization="micro_batch_token_mean",  # the model's loss is the mean over the batch's target tokens
    ):
        for epoch in range(options.epochs):
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
