"""A TCP relay between a process and a real server, which a test can cut, silence and mute."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

Address = tuple[str, int] | str
"""Where the server listens: host and port, or the path of a unix socket."""


class Relay:
    """Passes bytes on in both directions, except for those that a test has it lose."""

    def __init__(self, listener: socket.socket, server: Address) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self._server = server
        self._ends: set[socket.socket] = set()
        self._threads: list[Thread] = []
        self._fatal: re.Pattern[bytes] | None = None
        self._open = Event()
        self._open.set()
        self.lost = Event()
        """Set when a reply has been lost."""

    def lose_the_reply_to(self, request: bytes) -> None:
        """Pass on the next request that matches, wait for its reply, and cut the connection.

        The server has handled the request, and the process does not get the reply.
        """
        self.lost.clear()
        self._fatal = re.compile(request, re.DOTALL)

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        for end in list(self._ends):
            _shut(end)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Accept bytes and pass none on, like a network that loses every packet."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(Thread(target=self._pair, args=(client,)))
            self._threads[-1].start()

    def end(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()

    def _pair(self, client: socket.socket) -> None:
        """Relay one connection until either end, or a lost reply, ends it."""
        family = socket.AF_UNIX if isinstance(self._server, str) else socket.AF_INET
        with client, socket.socket(family) as server, suppress(OSError):
            server.connect(self._server)
            ends = {client, server}
            self._ends |= ends
            muted = Event()
            asking = Thread(target=self._ask, args=(client, server, muted))
            asking.start()
            self._answer(server, client, muted)
            asking.join()
            self._ends -= ends

    def _ask(self, client: socket.socket, server: socket.socket, muted: Event) -> None:
        with suppress(OSError):
            while request := client.recv(65536):
                self._open.wait()
                if self._fatal and self._fatal.search(request):
                    self._fatal = None
                    muted.set()
                server.sendall(request)
        _shut(server)

    def _answer(self, server: socket.socket, client: socket.socket, muted: Event) -> None:
        with suppress(OSError):
            while reply := server.recv(65536):
                self._open.wait()
                if muted.is_set():
                    self.lost.set()
                    break
                client.sendall(reply)
        _shut(client)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def relaying(server: Address) -> Iterator[Relay]:
    """Relay a free port of loopback to a server until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(listener, server)
        thread = Thread(target=relay.serve)
        thread.start()
        try:
            yield relay
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            relay.end()
