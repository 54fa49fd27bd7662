"""A real HTTP receiver on loopback, which records every byte and gives the answers of a test."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Condition, Event, Thread

Answer = bytes | Callable[[socket.socket], None]


def answer(status: int, *headers: str, body: bytes = b"") -> bytes:
    """Return a whole HTTP response."""
    lines = [f"HTTP/1.1 {status} -", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def stay_silent(connection: socket.socket) -> None:
    """Do not answer until the client has closed the connection."""
    connection.settimeout(10)
    with suppress(OSError):
        connection.recv(1)


def late(reply: bytes) -> tuple[Answer, Event]:
    """Return an answer that is sent when the test asks for it."""
    wanted = Event()

    def answer_late(connection: socket.socket) -> None:
        wanted.wait(60)
        connection.sendall(reply)

    return answer_late, wanted


@dataclass(frozen=True)
class Request:
    """One request as it came over the wire."""

    head: bytes
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


@dataclass
class Receiver:
    """Answers each request with the next of ``answers``, and then always with the last one."""

    port: int
    answers: list[Answer] = field(default_factory=lambda: [answer(202)])
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    during: Callable[[], object] = lambda: None
    _changed: Condition = field(default_factory=Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/heartbeat"

    def wait_for(self, count: int, seconds: float = 30) -> list[Request]:
        """Wait until ``count`` requests have come."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.requests) >= count, seconds)
        assert came, f"{len(self.requests)} of {count} requests came within {seconds} s"
        return self.requests

    def serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self.connections += 1
            Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = _read(connection)
            if request is None:
                return
            self.during()
            reply = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            with self._changed:
                self.requests.append(request)
                self._changed.notify_all()
            if callable(reply):
                reply(connection)
            else:
                connection.sendall(reply)


def _read(connection: socket.socket) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(Request(head, b"").headers.get("content-length", "0"))
    while len(body) < length:
        body += connection.recv(65536)
    return Request(head, body)


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Listen on a free port of loopback until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        receiver = Receiver(server.getsockname()[1])
        thread = Thread(target=receiver.serve, args=(server,), daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
