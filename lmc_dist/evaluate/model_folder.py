"""A Hugging Face checkpoint folder, as the result of a run: on shards for its probabilities, whole for its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmc_dist.data import IGNORED, SampleDataset
from lmc_dist.errors import LmcError, first_line
from lmc_dist.runtime import agreement
from lmc_dist.shards.checkpoint import read_checkpoint
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.exchange import all_gather, this_rank
from lmc_dist.trajectory.files import read_json


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint that is there, with its tokenizer; no weights are read yet."""

    path: Path
    config: Any
    tokenizer: Any


def find_model(folder: str | Path) -> ModelFolder:
    """The checkpoint in a folder, or in its subfolder `model` as an unlearning run leaves it. Local.

    Raises:
        LmcError: There is none, it is an adapter, its weights are not in safetensors files, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = next((p for p in (Path(folder), Path(folder) / "model") if (p / "config.json").exists()), None)
    if path is None:
        adapter = any((p / "adapter_config.json").exists() for p in (Path(folder), Path(folder) / "model"))
        raise LmcError(
            f"{folder} holds an adapter: merge it into its model first, and evaluate that"
            if adapter
            else f"no model in {folder}: neither it nor its folder model/ has a config.json"
        )
    if not any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise LmcError(f"{path} has no model.safetensors: save the model with safe serialization")
    try:
        return ModelFolder(path, AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise LmcError(f"model and tokenizer in {path} cannot be read: {first_line(error)}") from None


def read_on_shards(found: ModelFolder, device: torch.device | str = "cpu") -> tuple[ShardedModule, ShardedVector]:
    """The model without weights, and this rank's shards of them in float32, over all ranks. Local.

    Raises:
        LmcError: The files lack a parameter of the model, or have it in another shape.
    """
    skeleton = build_skeleton(found.config, device, attn_implementation=None)
    layout = ShardLayout.of_module(skeleton)
    try:
        check_shapes(found.path, layout)
        theta = read_checkpoint(found.path, ShardedVector.zeros(layout))
    except (OSError, SafetensorError) as error:
        raise LmcError(f"the weights in {found.path} are not those of its config: {first_line(error)}") from None
    return ShardedModule(skeleton, layout, device), theta


def check_shapes(folder: Path, layout: ShardLayout) -> None:
    """Checks that files hold the parameters of a layout: a slice of a larger tensor would be read without complaint. Local.

    Raises:
        LmcError: One has another shape.
        SafetensorError: One is missing, or a file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    where = read_json(index)["weight_map"] if index.exists() else {}
    for name, slot in layout.slots.items():
        with safe_open(folder / where.get(name, "model.safetensors"), framework="pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
        if shape != slot.spec.shape:
            raise LmcError(
                f"the weights in {folder} are not those of its config: {name} has shape {shape} against {slot.spec.shape}"
            )


def prompts_of(dataset: SampleDataset) -> list[list[int]]:
    """The tokens of each sample before its first target."""
    prompts = []
    for item in dataset.by_id(dataset.ids):
        first = next(i for i, label in enumerate(item["labels"]) if label != IGNORED)
        prompts.append(item["input_ids"][:first])
    return prompts


def greedy_texts(
    found: ModelFolder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 200,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> list[str]:
    """What the model says after each prompt, taking the most likely token each time; on every rank. Collective.

    Each rank loads the whole model and takes its own part of the prompts: generation runs the model once for every token,
    and gathering it as often would take longer than anything else.
    """
    from transformers import AutoModelForCausalLM

    rank, world_size = this_rank()
    mine = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[rank::world_size]
    texts: dict[int, str] = {}
    with agreement():
        model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).to(device).eval()
        for start in range(0, len(mine), batch_size):
            positions = mine[start : start + batch_size]
            batch = generate(model, found.tokenizer, [prompts[i] for i in positions], max_new_tokens)
            texts.update(zip(positions, batch, strict=True))
    everywhere = {position: text for part in all_gather(texts) for position, text in part.items()}
    return [everywhere[i] for i in range(len(prompts))]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of a batch of prompts, as text without special tokens. Local."""
    from transformers import GenerationConfig

    longest, end = max(map(len, prompts)), tokenizer.eos_token_id
    fill = next(token for token in (tokenizer.pad_token_id, end, 0) if token is not None)
    ids = torch.full((len(prompts), longest), fill)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all go on from the same place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    room = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    # The model's own settings may hold penalties and the like, which are not greedy.
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, pad_token_id=fill, eos_token_id=end, bos_token_id=tokenizer.bos_token_id
    )
    said = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(1, min(max_new_tokens, room - longest)),
        use_cache=True,
    )
    return [text.strip() for text in tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)]
