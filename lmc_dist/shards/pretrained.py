"""The weights of a Hugging Face checkpoint by the names of the module, read one at a time from its safetensors files.

transformers' `from_pretrained` renames, merges and splits what it reads for some models, and knows other formats. Where a
checkpoint needs that, `why_not` says so, and the caller lets transformers read the whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lmc_dist.errors import LmcError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_folder(name: str) -> Path:
    """Where the weights of a checkpoint are: a folder, or the hub's cache, to which they are brought. Local.

    What cannot be found is left for `from_pretrained` to say.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", INDEX]))
    except (OSError, ValueError):
        return Path(name)


class CheckpointWeights:
    """A checkpoint's weights by the names of a module.

    Args:
        folder: Of the checkpoint.
        module: Whose weights they are; its parameters may be on the meta device.

    Attributes:
        why_not: Why the module's weights cannot be read by name; empty where they can.

    Raises:
        LmcError: A file is missing or damaged.
    """

    def __init__(self, folder: Path, module: nn.Module) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
            self.why_not = f"it has no {SINGLE}"
            return
        self.files = self._index()
        self.why_not = self._obstacle(module)

    def __call__(self, name: str) -> torch.Tensor:
        """A parameter's value, as it is stored. Local."""
        value: torch.Tensor = self._file(self.files[name]).get_tensor(name)
        return value

    def _index(self) -> dict[str, str]:
        """The file of each weight; of a single file and an index transformers takes the file."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        try:
            found = json.loads(index.read_text())["weight_map"]
            names = {str(name): Path(str(file)).name for name, file in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LmcError(f"{index} is damaged: it has no weight_map") from None
        present = {file: set(self._file(file).keys()) for file in set(names.values())}
        if missing := sorted(name for name, file in names.items() if name not in present[file]):
            raise LmcError(f"{self.folder}: {names[missing[0]]} lacks {missing[0][:100]}, which {INDEX} says is in it")
        return names

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise LmcError(f"cannot read {self.folder / name}: {error}") from None
        return self._open[name]

    def _obstacle(self, module: nn.Module) -> str:
        config: Any = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is not None:
            return "it is quantized"
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for first, *tied in names.values():
            if first not in self.files:
                return f"it has no {first}"
            if both := [name for name in tied if name in self.files]:
                return f"it has {first} and {both[0]}, which are tied"
            shape = tuple(self._file(self.files[first]).get_slice(first).get_shape())
            if shape != tuple(module.get_parameter(first).shape):
                return f"its {first} is of another shape"
        if buffers := sorted({name for name, _ in module.named_buffers()} & set(self.files)):
            return f"it has the buffer {buffers[0]}"
        return _renamed(module, [first for first, *_ in names.values()])


def _renamed(module: nn.Module, names: list[str]) -> str:
    """Which of these names transformers would read otherwise than as it is."""
    if getattr(module, "_checkpoint_conversion_mapping", None):  # transformers 4
        return "transformers renames its weights"
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return ""
    for transform in get_model_conversion_mapping(module):  # type: ignore[arg-type]
        for name in names:
            if transform.rename_source_key(name) != (name, None):
                return f"transformers converts {name}"
    return ""
