"""TCP ports for process groups; imports nothing heavy."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
