"""The server's connections: how many there may be, and how long each may take.

uvicorn has no deadline for a request's head and no bound on connections. A caller that says nothing
would keep its connection, and so its file descriptor, until nobody else can connect. Here each
connection is in one of four stages, each with a deadline; where there are too many, the one that
has kept us waiting for longest is closed to make room.
"""

import asyncio
import resource
import socket
from enum import Enum
from itertools import chain, islice
from operator import itemgetter

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.collector.lines import Tally

MOST = 4_000
RESERVED = 256
"""File descriptors for the database, the log, and sockets that are accepted and not counted yet."""
ACCEPTED_AT_ONCE = 32
"""asyncio accepts so many before anything else runs. Three such batches may be under way."""
QUEUED = 4_096
"""Connections that wait in the kernel for their turn; it may allow fewer."""


class Stage(Enum):
    """What a connection waits for."""

    HEAD = "head"
    """The end of a request's head, since it was opened or since the answer before."""
    BODY = "body"
    """The end of the request's body."""
    ANSWER = "answer"
    """The application."""
    READING = "reading"
    """The caller, to read the rest of its answer."""


SECONDS = {
    Stage.HEAD: 5.0,
    Stage.BODY: 15.0,  # the application gives up sooner, unless it does not read the body
    Stage.ANSWER: 60.0,
    Stage.READING: 60.0,
}
"""How long a connection may be in a stage."""


class Connections(ServerState):
    """The open connections of one server."""

    def __init__(self, most: int) -> None:
        """Keep at most ``most`` open."""
        super().__init__()
        self._most = most
        # Since when each is in its stage, by the event loop's clock; the oldest is the first.
        self._since: dict[Stage, dict[Connection, float]] = {stage: {} for stage in Stage}
        self._closed = Tally("collector.too_many_connections")

    def make_room(self, newcomer: "Connection", now: float) -> None:
        """Close a connection if there are too many, as ``newcomer`` counts already.

        It is the one whose caller has not gone on, with its request or with reading the answer, for
        longest; or, where all wait for the application, the newcomer.
        """
        if len(self.connections) <= self._most:
            return
        oldest = chain.from_iterable(
            islice(connections.items(), 1)
            for stage, connections in self._since.items()
            if stage is not Stage.ANSWER
        )
        longest, _ = min(oldest, key=itemgetter(1), default=(newcomer, now))
        self._close(longest)
        self._closed.add(now)

    def enter(self, connection: "Connection", stage: Stage, now: float) -> None:
        """Have a connection be in ``stage`` from ``now`` on."""
        self.leave(connection)
        self._since[stage][connection] = now

    def leave(self, connection: "Connection") -> None:
        """Forget a connection's stage."""
        for connections in self._since.values():
            connections.pop(connection, None)

    def close_late(self, now: float) -> None:
        """Close each connection that has been in its stage for too long."""
        for stage, connections in self._since.items():
            while connections:
                connection, since = next(iter(connections.items()))
                if now < since + SECONDS[stage]:
                    break
                self._close(connection)

    def _close(self, connection: "Connection") -> None:
        self.leave(connection)
        self.connections.discard(connection)
        # Not close(): that would wait until the caller has read all that was written.
        connection.transport.abort()


class Connection(H11Protocol):
    """One connection, which notes its stage."""

    server_state: Connections
    _stage: Stage | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a head, if there is room."""
        super().connection_made(transport)
        self.server_state.make_room(self, self.loop.time())
        self._note()

    def data_received(self, data: bytes) -> None:
        """Note how far the request has come."""
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """Wait for the next head."""
        super().on_response_complete()
        self._stage = None
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free its place."""
        super().connection_lost(exc)
        self.server_state.leave(self)

    def _note(self) -> None:
        stage = self._find_stage()
        if stage is not self._stage:
            self._stage = stage
            self.server_state.enter(self, stage, self.loop.time())

    def _find_stage(self) -> Stage:
        if self.conn.their_state is h11.SEND_BODY:
            return Stage.BODY
        if self.cycle and not self.cycle.response_complete:
            return Stage.ANSWER
        unread = self.transport.is_closing() or self.transport.get_write_buffer_size()
        return Stage.READING if unread else Stage.HEAD


class Server(uvicorn.Server):
    """uvicorn's server, with deadlines for its connections and a bound on their number."""

    server_state: Connections

    def __init__(self, config: uvicorn.Config) -> None:
        """Take a ``config`` whose protocol is ``Connection``, with a backlog ACCEPTED_AT_ONCE."""
        super().__init__(config)
        self.server_state = Connections(at_most(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with a longer queue in the kernel than asyncio accepts at once."""
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(QUEUED)

    async def on_tick(self, counter: int) -> bool:
        """Close what is late; uvicorn calls this ten times a second."""
        self.server_state.close_late(asyncio.get_running_loop().time())
        return await super().on_tick(counter)


def at_most(descriptors: int) -> int:
    """Return how many connections may be open where a process may have so many ``descriptors``."""
    if descriptors == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(descriptors - RESERVED, descriptors // 2))
