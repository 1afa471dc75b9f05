"""The one error users see: bad input, a damaged log, an impossible request."""


class LmcError(ValueError):
    """Says what is wrong, where, and what to do; raised on every rank before any long work."""


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
