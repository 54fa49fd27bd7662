"""Limits on connections: their number, how long each may take, and what a request may look like.

uvicorn has no deadline for the head of a request and no limit on connections. Silent clients could
use up all file descriptors, and then nobody else could connect. Here each connection is in one of
four stages, each with a deadline. If there are too many connections, the one whose client has been
idle for longest is closed.

httptools parses requests fast, but accepts more than it should: heads of any size, several hosts,
any number of requests at once. So the parser gets one request at a time, with a complete head, and
a request that two servers could read in two ways is refused.
"""

import asyncio
import re
import resource
import socket
from enum import Enum
from http import HTTPStatus
from itertools import chain, islice
from operator import itemgetter

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.collector.lines import Tally

MOST = 4_000
RESERVED = 256
"""File descriptors for the database, the log, and sockets that are accepted and not counted yet."""
ACCEPTED_AT_ONCE = 32
"""asyncio accepts so many before anything else runs. Three such batches may be open at once."""
QUEUED = 4_096
"""How many connections may wait in the kernel; it may allow fewer."""
READ_BYTES = 16 * 1024
"""How much is read at once, and how much may wait behind the request that is being answered."""
END = b"\r\n\r\n"
FRAMING = (b"host", b"content-length", b"transfer-encoding")
MAX_HEAD_BYTES = 8 * 1024
MAX_CHUNKED_BYTES = 128 * 1024
"""A chunked body with its sizes and trailers: 16 KiB take 96 KiB if each byte is a chunk."""

_REQUEST_LINE = re.compile(rb"(?!CONNECT )[A-Z]+ /[!\"$-~]* HTTP/1\.[01]\r\n")
"""The parser accepts other lines too, and takes a part of some as the path."""
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
_TOO_LONG = re.compile(rb"\r\ncontent-length:[ \t]*[0-9]{19,20}[ \t]*\r\n", re.IGNORECASE)
"""A length that overflows the parser's integer."""
_LONG_SIZE = re.compile(rb"\n[0-9A-Fa-f]{21}")
"""A chunk size with too many digits; the parser would skip leading zeros without end."""


class Stage(Enum):
    """What a connection waits for."""

    HEAD = "head"
    """The end of a request's head, since the connection was opened or since the last answer."""
    BODY = "body"
    """The end of the request's body."""
    ANSWER = "answer"
    """The application."""
    READING = "reading"
    """The client, which must read the rest of its answer."""


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
        """Keep at most ``most`` connections open."""
        super().__init__()
        self._most = most
        # When each connection entered its stage, by the event loop's clock; the oldest is first.
        self._since: dict[Stage, dict[Connection, float]] = {stage: {} for stage in Stage}
        self._closed = Tally("collector.too_many_connections")

    def make_room(self, newcomer: "Connection", now: float) -> None:
        """Close a connection if there are too many, including ``newcomer``.

        The one to close is the one whose client has been idle for longest, while sending its
        request or reading its answer; or ``newcomer``, if all wait for the application.
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

    def set_stage(self, connection: "Connection", stage: Stage, now: float) -> None:
        """Note that a connection is in ``stage`` from ``now`` on."""
        self.forget(connection)
        self._since[stage][connection] = now

    def forget(self, connection: "Connection") -> None:
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
        self.forget(connection)
        self.connections.discard(connection)
        # Not close(): that would wait until the client has read everything.
        connection.transport.abort()


class AmbiguousError(Exception):
    """A request could be read in two ways."""


class Connection(HttpToolsProtocol):
    """A connection that tracks its stage, and gives its parser one request at a time."""

    server_state: Connections
    _stage: Stage | None = None
    _awaited = Stage.HEAD
    """HEAD, BODY, or ANSWER once the request is complete."""
    _left = 0
    """How many bytes of the body are missing; of a chunked one, how many more it may have."""
    _chunked = b""
    """The last bytes of a chunked body that have arrived."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows the type too
        """Wait for a head, if there is room."""
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # a selector transport has it; its default is 256 KiB
        self._unread = bytearray()
        self.server_state.make_room(self, self.loop.time())
        self._note_stage()

    def data_received(self, data: bytes) -> None:
        """Continue to read, and note the new stage."""
        self._unread += data
        self._read()

    def on_message_begin(self) -> None:
        """Begin to read a head."""
        if self._awaited is not Stage.HEAD:
            raise AmbiguousError
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Accept a line of the head; a trailer is ignored."""
        if self._awaited is Stage.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the head could be read in two ways."""
        names = [name for name, _ in self.headers]
        hosts, lengths, codings = (names.count(name) for name in FRAMING)
        version = self.parser.get_http_version()
        if (
            hosts > 1
            or (hosts == 0 and version == "1.1")
            or lengths + codings > 1
            or (codings and version == "1.0")
        ):
            raise AmbiguousError
        found = dict(self.headers)
        if codings and found[b"transfer-encoding"].lower() != b"chunked":
            raise AmbiguousError
        super().on_headers_complete()
        self._awaited = Stage.BODY
        self._left = int(found.get(b"content-length", 0))
        if codings:
            self._left = MAX_CHUNKED_BYTES
            self._chunked = b"\n"
            # Only the parser can find the end of the body, so no request may follow it.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Wait for the answer; the next head is read after it."""
        super().on_message_complete()
        self._awaited = Stage.HEAD if self.cycle.response_complete else Stage.ANSWER

    def on_response_complete(self) -> None:
        """Wait for the next head, which may have arrived already."""
        self.server_state.total_requests += 1
        if self._awaited is Stage.ANSWER:
            self._awaited = Stage.HEAD
        self._stage = None
        if not self.transport.is_closing():
            self.flow.resume_reading()
        self._read()

    def resume_writing(self) -> None:
        """Continue to read, because the client has read its answers."""
        super().resume_writing()
        self.flow.resume_reading()
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove it from the open connections."""
        super().connection_lost(exc)
        self.server_state.forget(self)

    def _read(self) -> None:
        """Give the parser what has arrived, up to the end of the current request."""
        while self._unread and not self.transport.is_closing() and (size := self._size()):
            piece = bytes(self._unread[:size])
            del self._unread[:size]
            self._left -= size
            self._feed(piece)
        if self._unread and (self._awaited is Stage.ANSWER or self.flow.write_paused):
            self.flow.pause_reading()
        self._note_stage()

    def _size(self) -> int:
        """Return how many bytes the parser may get: a complete head, or a part of the body."""
        match self._awaited:
            case Stage.HEAD if self.flow.write_paused:
                return 0  # the client must read its answers first
            case Stage.HEAD:
                end = self._unread.find(END, 0, MAX_HEAD_BYTES)
                begun = self._unread[:1].isupper()
                if end < 0 and (len(self._unread) >= MAX_HEAD_BYTES or not begun):
                    self._refuse(HTTPStatus.BAD_REQUEST)
                return 0 if end < 0 else end + len(END)
            case Stage.BODY:
                return min(self._left, len(self._unread))
        return 0

    def _feed(self, piece: bytes) -> None:
        if self._awaited is Stage.HEAD:
            if not _REQUEST_LINE.match(piece):
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            if b"\r\nupgrade:" in piece.lower():
                # Because of this line the parser would not read the body.
                piece = _UPGRADE.sub(b"", piece)
        elif self._chunked:
            self._chunked += piece
            if _LONG_SIZE.search(self._chunked):
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            self._chunked = self._chunked[-21:]
        try:
            self.parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._awaited is Stage.ANSWER:
                self._unread.clear()  # ignore what follows a chunked body
            elif self._awaited is Stage.HEAD and _TOO_LONG.search(piece):
                self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            else:
                self._refuse(HTTPStatus.BAD_REQUEST)
        if self._awaited is Stage.BODY and self._left == 0:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer, unless another answer has begun, and close."""
        if self._awaited is Stage.HEAD or not self.cycle.response_started:
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}",
                "content-type: text/plain; charset=utf-8",
                f"content-length: {len(status.phrase)}",
                "connection: close",
            )
            self.transport.write("\r\n".join((*head, "", status.phrase)).encode())
        self.transport.close()

    def _note_stage(self) -> None:
        stage = self._find_stage()
        if stage is not self._stage:
            self._stage = stage
            self.server_state.set_stage(self, stage, self.loop.time())

    def _find_stage(self) -> Stage:
        if self._awaited is Stage.BODY:
            return Stage.BODY
        if self.cycle and not self.cycle.response_complete:
            return Stage.ANSWER
        unread = self.transport.is_closing() or self.transport.get_write_buffer_size()
        return Stage.READING if unread else Stage.HEAD


class Server(uvicorn.Server):
    """uvicorn's server, with deadlines for its connections and a limit on their number."""

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
        """Close connections that are late; uvicorn calls this ten times a second."""
        self.server_state.close_late(asyncio.get_running_loop().time())
        return await super().on_tick(counter)


def at_most(descriptors: int) -> int:
    """Return how many connections may be open if a process may have so many ``descriptors``."""
    if descriptors == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(descriptors - RESERVED, descriptors // 2))
