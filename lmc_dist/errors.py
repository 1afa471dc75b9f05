"""The errors users see: bad input, a damaged log, an impossible request; and the end of a job that was asked to stop."""

from __future__ import annotations

from collections.abc import Sequence


class LmcError(ValueError):
    """Says what is wrong, where, and what to do; raised on every rank before any long work."""


class Stopped(LmcError):
    """A job ends because it was asked to, with all it has done on disk: the same command goes on where it stopped."""


def shorten(ids: Sequence[int], most: int = 5) -> str:
    """The first few ids, for messages."""
    return ", ".join(map(str, ids[:most])) + (", …" if len(ids) > most else "")


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
