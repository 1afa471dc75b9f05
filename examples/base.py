"""What stands for one's own here: a small base model with its tokenizer, and questions and answers to fine-tune it on.

    python examples/base.py --output runs/example

leaves runs/example/base (a Hugging Face checkpoint) and runs/example/data.jsonl (a row: id, question, answer).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmc_dist.biographies import generate_biographies
from lmc_dist.data import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    parser.add_argument("--people", type=int, default=16, help="invented people, four questions each")
    options = parser.parse_args()
    rows = generate_biographies(options.people, facts_per_person=4, seed=0)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "data.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({key: row[key] for key in ("id", "question", "answer")}) + "\n")
    tokenizer = train_tokenizer((row[key] for row in rows for key in ("question", "answer")), vocab_size=400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(options.output / "base")
    tokenizer.save_pretrained(options.output / "base")


if __name__ == "__main__":
    main()
