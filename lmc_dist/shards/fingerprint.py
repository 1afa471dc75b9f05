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


def model_differences(module: nn.Module, config: dict[str, Any], parameters: list[dict[str, Any]]) -> str:
    """What a model has otherwise than a manifest says: fields of its config, or of its trainable parameters. Local.

    Args:
        module: The model.
        config: The manifest's `model_config`.
        parameters: The manifest's table.
    """
    mine, absent = model_config(module), object()
    fields = [key for key in sorted({*mine, *config} - _VOLATILE) if mine.get(key, absent) != config.get(key, absent)]
    if "model_type" in fields:
        fields = ["model_type"]  # which decides what the others are
    if fields:
        told = [f"{key[:40]} is {_short(mine.get(key))}, the log's {_short(config.get(key))}" for key in fields[:4]]
        return "; ".join(told) + (f"; and {len(fields) - 4} more fields" if len(fields) > 4 else "")
    here, there = ({row["name"]: row["shape"] for row in rows} for rows in (parameter_table(module), parameters))
    names = [name for name in [*here, *there] if here.get(name) != there.get(name)]
    if not names:
        return "other weights are tied"
    first, found = names[0], "is trained in another shape"
    if first not in here or first not in there:
        found = f"is trained in {'the log' if first in there else 'this model'} alone (model.trainable)"
    return f"{first[:100]} {found}"


def _short(value: Any) -> str:
    return repr(value)[:40]
