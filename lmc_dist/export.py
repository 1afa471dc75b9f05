"""A Hugging Face checkpoint folder from shards, without gathering the model.

Weights have the names and shapes of the module's parameters. For most models these are what `save_pretrained` writes. Where
transformers 5 renames or merges weights as it loads (GPT-NeoX's `embed_out`, Mixtral's experts) `save_pretrained` takes that
back and this does not: transformers has no public way to do it tensor by tensor. `from_pretrained` of transformers 5 reads
both to the same weights; docs/limits.md says what to do for other readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checkpoint import write_checkpoint
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import ShardedVector


def export_model(
    folder: Path,
    theta: ShardedVector,
    dtypes: Mapping[str, torch.dtype],
    model: torch.nn.Module,
    tokenizer: Any = None,
    frozen: ShardedVector | None = None,
) -> str:
    """Writes config, tokenizer and weights; returns the weights' checksum as read back from the files. Collective.

    Args:
        folder: Where to; see `runtime.promoted`.
        theta: The trained weights.
        dtypes: Storage type of each parameter.
        model: A module of the architecture, for its config.
        tokenizer: Saved beside the weights when given.
        frozen: The weights that were not trained (`shards.frozen`).

    A model under a PEFT adapter leaves the adapter, as PEFT's own `save_pretrained` does.

    Raises:
        LmcError: The model has frozen weights that were not given, or an adapter that trains more than LoRA's weights.
    """
    if hasattr(model, "peft_config"):
        return _export_adapter(folder, theta, dtypes, model, tokenizer)
    trained = set(theta.layout.slots) | set(frozen.layout.slots if frozen is not None else ())
    if missing := sorted({name for name, _ in model.named_parameters()} - trained):
        raise LmcError(f"the checkpoint would lack frozen weights, the first {missing[0]}: pass them (frozen=)")
    with agreement(theta.layout.group):
        if theta.layout.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            config = type(model.config).from_dict(model.config.to_dict())  # type: ignore[union-attr,operator]
            config.architectures = [type(model).__name__]
            config.dtype = str(next(iter(dtypes.values()))).removeprefix("torch.")
            config.use_cache = True
            config.save_pretrained(folder)
            if (generation := getattr(model, "generation_config", None)) is not None:
                # not save_pretrained, which refuses what some published models have (a temperature without sampling)
                generation.to_json_file(folder / "generation_config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    every = {name: p.dtype for name, p in model.named_parameters() if name not in dtypes} | dict(dtypes)
    return write_checkpoint(folder, theta, every, frozen=frozen)


def _export_adapter(
    folder: Path, theta: ShardedVector, dtypes: Mapping[str, torch.dtype], model: torch.nn.Module, tokenizer: Any
) -> str:
    """The trained weights as a LoRA adapter that `PeftModel.from_pretrained` loads. Collective."""
    (adapter, settings), *others = model.peft_config.items()  # type: ignore[union-attr,operator]
    names = {slot.spec.name: slot.spec.name.replace(f".{adapter}.", ".") for slot in theta.layout}
    if others or (foreign := [name for name in names if "lora_" not in name]):
        found = f"adapter '{others[0][0]}' beside '{adapter}'" if others else f"{foreign[0]} is trained as well"
        raise LmcError(f"only one LoRA adapter by itself can be written, and {found}: correct the live engine instead")
    old = theta.layout
    specs = [ParamSpec(names[spec.name], spec.shape) for spec in old.params]
    layout = ShardLayout(specs, old.rank, old.world_size, old.rule, old.group)
    with agreement(layout.group):
        if layout.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            settings.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    stored = {names[name]: dtype for name, dtype in dtypes.items()}
    found = write_checkpoint(folder, ShardedVector(layout, theta.flat), stored, max_file_bytes=1 << 62)
    with agreement(layout.group):
        if layout.rank == 0:
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return found
