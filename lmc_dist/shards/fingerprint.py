"""Fingerprint of a model: its configuration and parameter table, not its weights."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from lmc_dist.digest import json_digest

# Where a config came from and how it is run, not what the model is.
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "attn_implementation",
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
}


def parameter_table(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in model order: name, shape, dtype and the other names they are tied to."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return [
        {
            "name": name,
            "shape": list(getattr(p, "ds_shape", p.shape)),
            "dtype": str(p.dtype).removeprefix("torch."),
            "tied_to": [alias for alias in aliases[id(p)] if alias != name],
        }
        for name, p in module.named_parameters()
        if p.requires_grad
    ]


def model_config(module: nn.Module) -> dict[str, Any]:
    """The model's Hugging Face config as plain JSON; {} for another module."""
    config = getattr(module, "config", None)
    return {} if config is None else json.loads(config.to_json_string(use_diff=False))


def model_fingerprint(module: nn.Module) -> str:
    """Digest of config and parameter table, the same for meta, whole and partitioned models. Local."""
    config = {key: value for key, value in model_config(module).items() if key not in _VOLATILE}
    table = [{key: row[key] for key in ("name", "shape", "tied_to")} for row in parameter_table(module)]
    return json_digest([config, table])
