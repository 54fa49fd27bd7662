"""Ports for the programs that a test starts."""

import random
import socket
from contextlib import suppress

FIRST, LAST = 20_000, 32_767
"""From 32768 on Linux gives ports to connections: one of them could be first to take the port."""

# Not pytest's seed: runners that share it would try the same ports at the same time.
_ports = random.SystemRandom().sample(range(FIRST, LAST + 1), LAST - FIRST + 1)


def free_port() -> int:
    """Return a port on which nothing listens, and which no connection is given.

    A process gets each port once, so that several of its programs can be given theirs together.
    """
    while True:
        port = _ports.pop()
        with suppress(OSError), socket.create_server(("", port)):
            return port
