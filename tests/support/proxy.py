"""Real proxies on loopback, HTTP, SOCKS 5 and plain tunnels, which all lead to one port."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread

LOGIN = ("operator", "pass:wörd")


@dataclass
class Proxy:
    """Records its requests: the heads of HTTP requests, or HOST:PORT of SOCKS."""

    leads_to: int
    port: int = 0
    asked: list[str] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)
    _ends: list[asyncio.StreamWriter] = field(default_factory=list)

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.decode("latin-1"))
        if head.startswith(b"CONNECT "):
            writer.write(b"HTTP/1.1 200 -\r\n\r\n")
            await self._lead(reader, writer)
        else:
            await self._lead(reader, writer, head)

    async def socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (_, count) = await reader.readexactly(2)
        wants_to_log_in = 2 in await reader.readexactly(count)
        writer.write(b"\x05\x02" if wants_to_log_in else b"\x05\x00")
        if wants_to_log_in:
            await reader.readexactly(1)
            name, password = [await _word(reader), await _word(reader)]
            self.logins.append((name.decode(), password.decode()))
            writer.write(b"\x01\x00")
        kind = (await reader.readexactly(4))[3]
        host = await (_word(reader) if kind == 3 else reader.readexactly({1: 4, 4: 16}[kind]))
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append(f"{host.decode() if kind == 3 else host.hex()}:{port}")
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        await self._lead(reader, writer)

    async def tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._lead(reader, writer)

    async def _lead(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes = b""
    ) -> None:
        answers, onward = await asyncio.open_connection("127.0.0.1", self.leads_to)
        self._ends += [writer, onward]
        onward.write(head)
        with suppress(OSError):
            await asyncio.gather(_pass_on(reader, onward), _pass_on(answers, writer))

    async def hang_up(self) -> None:
        """Close every connection, and wait until that is done."""
        for end in self._ends:
            end.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


async def _word(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly((await reader.readexactly(1))[0])


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()


@contextmanager
def proxying(kind: str, leads_to: int, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Run a proxy, ``http``, ``socks`` or ``tunnel``, on a free port until the block ends."""
    proxy = Proxy(leads_to)
    up, loop = Event(), asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        talk = {"http": proxy.http, "socks": proxy.socks, "tunnel": proxy.tunnel}[kind]
        server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls)
        proxy.port = server.sockets[0].getsockname()[1]
        up.set()
        await ended.wait()
        server.close()
        await proxy.hang_up()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = Thread(target=run)
    thread.start()
    assert up.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
