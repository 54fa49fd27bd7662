"""How often one client may ask: a token bucket each, in this process's memory.

No address is kept: a bucket is found by a hash of it, under a key that ends with the process. Pure,
but for that key.
"""

import math
from collections import OrderedDict
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_address
from secrets import token_bytes

MAX_CLIENTS = 100_000


class Limiter:
    """Gives each client a bucket of ``rate`` tokens, which fills up in a minute."""

    def __init__(self, rate: int, *, max_clients: int = MAX_CLIENTS) -> None:
        """Remember ``max_clients`` at most: beyond it, who asked longest ago starts anew."""
        self._seconds_a_token = 60 / rate
        self._max_clients = max_clients
        self._key = token_bytes(32)
        # When a client's bucket will be full, which tells how full it is; who asked last is last.
        self._full_at: OrderedDict[bytes, float] = OrderedDict()

    def take(self, address: str, now: float) -> int:
        """Take a token for ``address``; return 0, or the whole seconds until there is one.

        ``now`` is in seconds by a clock that never goes back.
        """
        self._forget_the_full(now)
        client = self._hash(address)
        full_at = max(self._full_at.get(client, now), now)
        without_one = full_at + self._seconds_a_token
        # Rounded, for in floating point 7 * (60 / 7) is more than 60.
        wait = math.ceil(round(without_one - now - 60, 6))
        self._full_at[client] = full_at if wait > 0 else without_one
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._max_clients:
            self._full_at.popitem(last=False)
        return max(wait, 0)

    @property
    def clients(self) -> int:
        """How many are remembered."""
        return len(self._full_at)

    def _forget_the_full(self, now: float) -> None:
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now:
                return
            del self._full_at[client]

    def _hash(self, address: str) -> bytes:
        return blake2b(_client(address), key=self._key, digest_size=16).digest()


def _client(address: str) -> bytes:
    """Return what tells one client from another: whoever has an IPv6 address has 2**64 of them."""
    try:
        ip = ip_address(address)
    except ValueError:  # a unix socket's peer, or a proxy's own word
        return address.encode()
    match ip:
        case IPv6Address(ipv4_mapped=IPv4Address() as mapped):
            return mapped.packed
        case IPv6Address():
            return ip.packed[:8]
    return ip.packed
