"""Ports for the programs that a test starts."""

import secrets
import socket
from contextlib import suppress

FIRST, LAST = 20_000, 32_767
"""From 32768 on Linux gives ports to connections: one of them could be first to take the port."""


def free_port() -> int:
    """Return a port on which nothing listens, and which no connection is given."""
    while True:
        port = FIRST + secrets.randbelow(LAST - FIRST + 1)
        with suppress(OSError), socket.create_server(("", port)):
            return port
