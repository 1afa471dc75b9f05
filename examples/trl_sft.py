"""Supervised fine-tuning with TRL's SFTTrainer. What keeps the log is marked with (log).

python examples/trl_sft.py --model runs/example/base --data runs/example/data.jsonl --log_dir runs/example/trl_log
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trainer import ranks_on_cpu, read_samples
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer
from trl import SFTConfig, SFTTrainer

from lmc_dist import TrainingLogger, TrainingLoggerCallback


class LoggedSFTTrainer(SFTTrainer):
    """TRL 1.x takes its loss from log-probabilities beside the model's own; (log) needs the model to know what it divides by."""

    compute_loss = Trainer.compute_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="JSON lines with id, question, answer")
    parser.add_argument("--log_dir", required=True, help="folder of the trajectory log")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples of each rank and step")
    options = parser.parse_args()

    on_cpu = ranks_on_cpu()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    arguments = SFTConfig(
        output_dir=f"{options.log_dir}-trainer",
        per_device_train_batch_size=options.batch,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # (log) rows are tokens already: one sample a row, no packing
        remove_unused_columns=False,  # (log) or `index` is dropped
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **{key: value for key, value in on_cpu.items() if key != "use_cpu"},
    )
    logger = TrainingLogger(options.log_dir, save_interval=4, save_batch_data=True)  # (log)
    trainer = LoggedSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(read_samples(options.data, tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        processing_class=tokenizer,
        callbacks=[TrainingLoggerCallback(logger)],  # (log)
    )
    trainer.train()


if __name__ == "__main__":
    main()
