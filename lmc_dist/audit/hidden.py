"""Settings without ids; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SALTED = "salted:"  # what stands in place of ids in settings begins so


def hidden(forget: Mapping[str, Any], digest: str, with_split: bool = False) -> dict[str, Any]:
    """A section of settings (`forget`, `request`) with the request's digest in place of ids, and of a split's name if asked. Pure."""
    keys = ("samples", "ids", "batches", "split") if with_split else ("samples", "ids", "batches")
    return {key: SALTED + digest if key in keys and value is not None else value for key, value in forget.items()}


def is_hidden(forget: Mapping[str, Any]) -> bool:
    """Whether ids of a section `forget`, or a split's name, are replaced by a digest. Pure."""
    return any(str(forget.get(key)).startswith(SALTED) for key in ("samples", "batches", "split"))
