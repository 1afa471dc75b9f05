"""The models that many tests run over, small enough for dense float64 oracles."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

VOCAB = 29


def model_config(kind: str, **changes: Any) -> Any:
    """A tiny Hugging Face config. `kind` is a model type, with `-tied` or `-untied`."""
    import transformers

    family, _, tie = kind.partition("-")
    common = {"vocab_size": VOCAB, "tie_word_embeddings": tie == "tied", "bos_token_id": 0, "eos_token_id": 1}
    small = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 3 if family == "llama" else 4,
        "max_position_embeddings": 32,
    }
    if family == "llama":
        small["head_dim"] = 4
        return transformers.LlamaConfig(**common, **small | changes)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, **small | changes)
    if family == "gpt2":
        gpt2 = {"n_embd": 12, "n_layer": 2, "n_head": 4, "n_positions": 32}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(**common, **gpt2 | dropout | changes)
    if family in OTHERS:
        kind_config = getattr(transformers, OTHERS[family])
        experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        # the grouped kernel of mixtures of experts has no forward mode
        more = experts | {"experts_implementation": "eager"} if family == "qwen3moe" else {}
        return kind_config(**common, **small | more | changes)
    raise ValueError(kind)


OTHERS = {"mistral": "MistralConfig", "qwen2": "Qwen2Config", "gemma": "GemmaConfig", "qwen3moe": "Qwen3MoeConfig"}
OTHER_MODELS = ["mistral-untied", "qwen2-tied", "gemma-tied", "qwen3moe-untied"]
MODELS = ["llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied", "qwen3-tied", "qwen3-untied"]


class KeepDouble(TorchFunctionMode):
    """Float64 all the way: transformers' norms and losses cast to float32, which would hide errors below 1e-7."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def token_batch(seed: int, samples: int, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels with masked prompts, sample weights) of a random batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (samples, length), generator=generator)
    labels = ids.clone()
    for i in range(samples):
        labels[i, : 2 + i % 3] = -100
    return ids, labels, torch.rand(samples, generator=generator, dtype=torch.float64) + 0.1
