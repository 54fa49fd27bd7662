"""Limits for one client: requests a minute, and installs a day; in this process's memory.

No address and no id is stored: a client is found by a keyed hash of its address, and the key ends
with the process. Pure, except for that key.
"""

import math
from collections import OrderedDict
from contextlib import suppress
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_address
from secrets import token_bytes
from socket import AF_INET, inet_pton
from uuid import UUID

from starlette.types import Scope

MAX_CLIENTS = 100_000
MAX_IDS = 100_000
BUSY_CLIENTS = 100
"""How many clients are counted at once to find the busiest."""
FIRST = 1
"""A client's first request of a day does not count for the busiest: every client sends one, and
each new process would add another."""
NETWORK = 64
"""Bits: a host with an IPv6 address has 2**64 of them."""
SITE = 48
"""Bits: a provider may give one customer 2**16 such networks."""
DAY_SECONDS = 24 * 60 * 60


class Limiter:
    """Gives each client a bucket of ``rate`` tokens, which refills in a minute."""

    def __init__(self, rate: int, *, max_clients: int = MAX_CLIENTS) -> None:
        """Remember at most ``max_clients``; beyond that, forget the one idle for longest."""
        self._seconds_a_token = 60 / rate
        self._max_clients = max_clients
        self._key = token_bytes(32)
        # When each bucket will be full, which also shows how full it is; ordered by last use.
        self._full_at: OrderedDict[bytes, float] = OrderedDict()

    def take(self, address: str, now: float) -> int:
        """Take a token for ``address``; return 0, or the whole seconds until there is one.

        ``now`` is in seconds by a clock that never goes back.
        """
        self._forget_the_full(now)
        client = _hash(_client(address, NETWORK), self._key)
        wait = self._wait(client, now)
        full_at = max(self._full_at.get(client, now), now)
        self._full_at[client] = full_at if wait else full_at + self._seconds_a_token
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._max_clients:
            self._full_at.popitem(last=False)
        return wait

    def wait(self, address: str, now: float) -> int:
        """Return 0 if there is a token for ``address``, or the seconds until then; take none."""
        return self._wait(_hash(_client(address, NETWORK), self._key), now)

    @property
    def clients(self) -> int:
        """How many are remembered."""
        return len(self._full_at)

    def _wait(self, client: bytes, now: float) -> int:
        without_one = max(self._full_at.get(client, now), now) + self._seconds_a_token
        # Rounded, because in floating point 7 * (60 / 7) is more than 60.
        return max(math.ceil(round(without_one - now - 60, 6)), 0)

    def _forget_the_full(self, now: float) -> None:
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now:
                return
            del self._full_at[client]


class DailyInstalls:
    """Limits of how many different installs a client may send heartbeats in a UTC day."""

    def __init__(self, most: int, *, max_ids: int = MAX_IDS) -> None:
        """Admit ``most`` ids a client; remember at most ``max_ids``, or those of one client.

        Beyond that, forget the client that has been idle longest.
        """
        self._most = most
        self._max_ids = max_ids
        self._day: int | None = None
        self._key = b""
        self._ids: OrderedDict[bytes, set[bytes]] = OrderedDict()  # ordered by last use
        self._remembered = 0

    def admit(self, address: str, instance_id: UUID, now: float) -> int:
        """Return 0 if ``address`` may send for ``instance_id``, or the whole seconds until it may.

        It may send again for an id that it has sent on this day. ``now`` is in seconds since 1970.
        """
        self._begin(int(now // DAY_SECONDS))
        client = _hash(_client(address, SITE), self._key)
        ids = self._ids.setdefault(client, set())
        self._ids.move_to_end(client)
        one = _hash(instance_id.bytes, self._key)
        if one in ids:
            return 0
        if len(ids) >= self._most:
            return math.ceil(DAY_SECONDS - now % DAY_SECONDS)
        ids.add(one)
        self._remembered += 1
        while self._remembered > self._max_ids and len(self._ids) > 1:
            self._remembered -= len(self._ids.popitem(last=False)[1])
        return 0

    @property
    def remembered(self) -> int:
        """How many ids are remembered."""
        return self._remembered

    def _begin(self, day: int) -> None:
        if day != self._day:
            self._day, self._key = day, token_bytes(32)
            self._ids.clear()
            self._remembered = 0


class Busiest:
    """Counts how many requests the busiest client of a UTC day has made, but not who it is.

    At most ``clients`` are counted at once. If one more sends a request, each of them loses one
    (the algorithm of Misra and Gries). So the number is never too large. It is too small by at most
    ``FIRST`` and a share of 1/``clients`` of all requests.
    """

    def __init__(self, *, clients: int = BUSY_CLIENTS) -> None:
        """Begin at zero."""
        self._clients = clients
        self._day: int | None = None
        self._key = b""
        self._made: dict[bytes, int] = {}
        self._most = FIRST

    def count(self, address: str, now: float) -> bool:
        """Count a request; return whether the number of the busiest client is now one higher.

        ``now`` is in seconds since 1970.
        """
        self._begin(int(now // DAY_SECONDS))
        client = _hash(_client(address, NETWORK), self._key)
        made = self._made.get(client, 0) + 1
        if made == 1 and len(self._made) >= self._clients:
            self._made = {each: of - 1 for each, of in self._made.items() if of > 1}
            return False
        self._made[client] = made
        grown = made > self._most
        self._most += grown
        return grown

    @property
    def clients(self) -> int:
        """How many are remembered."""
        return len(self._made)

    def _begin(self, day: int) -> None:
        if day != self._day:
            self._day, self._key = day, token_bytes(32)
            self._made.clear()
            self._most = FIRST


def caller(scope: Scope) -> str:
    """Return the address of the client, which the server may have read from a trusted proxy."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _hash(what: bytes, key: bytes) -> bytes:
    return blake2b(what, key=key, digest_size=16).digest()


def _client(address: str, bits: int) -> bytes:
    """Return what identifies a client: an IPv4 address, or an IPv6 network of ``bits``."""
    if ":" not in address:
        with suppress(OSError, ValueError):  # ip_address() takes ten times as long
            return inet_pton(AF_INET, address)
    try:
        ip = ip_address(address)
    except ValueError:  # the peer of a unix socket, or a word of a proxy
        return address.encode()
    match ip:
        case IPv6Address(ipv4_mapped=IPv4Address() as mapped):
            return mapped.packed
        case IPv6Address():
            return ip.packed[: bits // 8]
    return ip.packed
