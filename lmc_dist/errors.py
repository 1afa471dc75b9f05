"""The one error users see: bad input, a damaged log, an impossible request."""


class LmcError(ValueError):
    """Says what is wrong, where, and what to do; raised on every rank before any long work."""
