"""Supervised fine-tuning with the Hugging Face Trainer. What keeps the log is marked with (log).

python examples/trainer.py --model runs/example/base --data runs/example/data.jsonl --log_dir runs/example/log
accelerate launch --config_file configs/accelerate_zero3.yaml examples/trainer.py ...      DeepSpeed ZeRO-3
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from lmc_dist import TrainingLogger, TrainingLoggerCallback


def read_samples(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Token ids and labels of each row; the answer is the target."""
    samples = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = tokenizer(f"Question: {row['question']}\nAnswer: ", add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            samples.append(
                {
                    "input_ids": prompt + answer,
                    "attention_mask": [1] * len(prompt + answer),
                    "labels": [-100] * len(prompt) + answer,
                    "index": row["id"],  # (log) by this number a sample can be forgotten
                }
            )
    return samples


def ranks_on_cpu() -> dict[str, Any]:
    """Without a GPU accelerate does not find a launcher's other processes by itself, and each trains on all data."""
    if torch.cuda.is_available() or "WORLD_SIZE" not in os.environ:
        return {}
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    PartialState(backend="gloo") if is_deepspeed else PartialState(cpu=True, backend="gloo")
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="JSON lines with id, question, answer")
    parser.add_argument("--log_dir", required=True, help="folder of the trajectory log")
    parser.add_argument("--output", default=None, help="folder for the fine-tuned model")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples of each rank and step")
    options = parser.parse_args()

    on_cpu = ranks_on_cpu()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    arguments = TrainingArguments(
        output_dir=f"{options.log_dir}-trainer",
        per_device_train_batch_size=options.batch,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        remove_unused_columns=False,  # (log) or `index` is dropped
        report_to=[],
        save_strategy="no",
        logging_steps=4,
        **on_cpu,
    )
    logger = TrainingLogger(options.log_dir, save_interval=4, save_batch_data=True)  # (log)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=arguments,
        train_dataset=read_samples(options.data, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        callbacks=[TrainingLoggerCallback(logger)],  # (log)
    )
    trainer.train()
    if options.output is not None:
        trainer.save_model(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
