"""What a command of `lmc` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmc_dist.config import Config

# What a command prints on rank 0, and its exit status where that is not 0.
Outcome = str | tuple[str, int]
Joins = Literal["engine", "files", "nobody", "alone"]


@dataclass(frozen=True)
class Command:
    """A command of `lmc`.

    Attributes:
        description: One line for the listing.
        examples: Shown under its options.
        settings: Fields of `Config` that it uses; a configuration file may hold the others, since one file serves all.
        work: Does it, given settings and runtime; imports what it needs.
        joins: Whom it runs with: the ranks of an `engine`, ranks that work on `files`, or `nobody`; or which of these, by
            the settings. `alone` is nobody, and without torch.
        positional: Arguments without a name → the settings they are, with dots.
        short: Options → the settings that they are short for.
        several: Arguments of `positional` that may be several; the setting has commas between.
    """

    description: str
    examples: str
    settings: tuple[str, ...]
    work: Callable[[Config, Any], Outcome]
    joins: Joins | Callable[[Config], Joins] = "engine"
    positional: Mapping[str, str] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)
    several: tuple[str, ...] = ()


LOG = {"LOG": "log_dir"}
