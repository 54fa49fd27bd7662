"""Whatever some clients do, the collector answers the others; and one client has only so much."""

import asyncio
import resource
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from app.collector import connections, intake
from app.collector.__main__ import server
from app.collector.connections import Connections, Stage, at_most
from app.collector.outcomes import BUSIEST
from app.settings.collector import CollectorSettings
from tests.support.collector import (
    BODY,
    INSTANCE,
    Collector,
    answer,
    changed,
    command,
    head,
    of,
    query,
    serving,
)

GET = b"GET /v1/openapi.json HTTP/1.1\r\nHost: collector\r\n\r\n"
SPOKEN = len(GET) / 2
"""Seconds: half of what a head takes that drips, so that a busy machine is no failure."""
FULL = "collector.too_many_connections count="


def limited(descriptors: int) -> list[str]:
    """Return the command of a collector that may open so many files and sockets."""
    words = f'ulimit -n {descriptors} && exec "$@"'
    return ["sh", "-c", words, "sh", *command("web")]


@pytest.fixture
def many_sockets() -> Iterator[None]:
    """Have this process be allowed thousands of sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4_096:
        pytest.skip("this process may not open 4,096 sockets")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4_096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Flood:
    """So many connections, each of which says ``words`` and no more, and is opened anew.

    At most ``pace`` are opened in 5 ms: what is tested is the bound, and not how fast a machine is.
    """

    def __init__(self, port: int, number: int, words: bytes, pace: int) -> None:
        self._port = port
        self._number = number
        self._words = words
        self._pace = pace
        self._ended = threading.Event()
        self.opened = 0

    @contextmanager
    def going(self) -> Iterator[None]:
        thread = threading.Thread(target=self._go)
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while self.opened < self._number:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
        finally:
            self._ended.set()
            thread.join()

    def _go(self) -> None:
        with selectors.DefaultSelector() as open_ones:
            while not self._ended.is_set():
                for _ in range(min(self._pace, self._number - len(open_ones.get_map()))):
                    connection = socket.create_connection(("127.0.0.1", self._port))
                    connection.sendall(self._words)
                    open_ones.register(connection, selectors.EVENT_READ)
                    self.opened += 1
                time.sleep(0.005)
                for key, _ in open_ones.select(0):
                    assert isinstance(key.fileobj, socket.socket)
                    open_ones.unregister(key.fileobj)
                    key.fileobj.close()
            for key in list(open_ones.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()


def seconds_for(ask: Callable[[], int], expected: int) -> float:
    began = time.monotonic()
    assert ask() == expected
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("words", "pace"),
    [(b"", 10), (b"POST /v1/hea", 10), (head("Content-Length: 100") + b"{", 2)],
    ids=["silent", "part of a head", "part of a body"],
)
@pytest.mark.usefixtures("many_sockets")
def test_a_flood_of_silent_connections_keeps_nobody_waiting_for_a_second(
    migrated: str, tmp_path: Path, words: bytes, pace: int
) -> None:
    with serving(migrated, tmp_path / "log", limited(1_024)) as own:

        def post() -> int:
            with socket.create_connection(("127.0.0.1", own.port), timeout=10) as connection:
                body = BODY.encode()
                connection.sendall(head(f"Content-Length: {len(body)}", "Connection: close") + body)
                return int(connection.recv(100)[9:12] or 0)

        def get() -> int:
            with socket.create_connection(("127.0.0.1", own.port), timeout=10) as connection:
                connection.sendall(GET)
                return int(connection.recv(100)[9:12] or 0)

        flood = Flood(own.port, 1_200, words, pace)
        with flood.going():
            waits = []
            until = time.monotonic() + 7
            while time.monotonic() < until:
                waits += [seconds_for(post, 202), seconds_for(get, 200)]
                time.sleep(0.1)
        assert flood.opened > 1_500
        # Not each of them: the machine may be busy with something else for a moment.
        assert statistics.median(waits) < 1
        assert max(waits) < 8
        assert own.post(of(1)).status_code == 202
        assert len(own.log()) == 2
        assert own.log()[1].startswith(FULL)


def test_where_even_the_bound_is_too_much_it_is_one_line_and_it_recovers(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", limited(64)) as own:
        for _ in range(3):
            silent = [socket.create_connection(("127.0.0.1", own.port)) for _ in range(300)]
            time.sleep(0.5)
            for connection in silent:
                connection.close()
        deadline = time.monotonic() + 10
        while own.post(BODY).status_code != 202:
            assert time.monotonic() < deadline
        lines = own.log()[1:]
        assert len(lines) == len(set(lines)) <= 3
        assert "127.0.0.1" not in "".join(lines)


def closed_after(connection: socket.socket, words: bytes, began: float) -> float:
    """Say a byte of ``words`` a second, and return how long after ``began`` one is cut off."""
    connection.settimeout(1)
    for byte in words:
        try:
            connection.sendall(bytes([byte]))
            if not connection.recv(1):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_heads_that_drip_are_cut_off_after_five_seconds_however_many_they_are(
    own: Collector,
) -> None:
    with ThreadPoolExecutor(200) as pool:
        began = [time.monotonic()]
        dripping = []
        for _ in range(200):
            dripping.append(socket.create_connection(("127.0.0.1", own.port)))
            began.append(time.monotonic())
        found = [*pool.map(closed_after, dripping, [GET] * 200, began)]
        assert own.post(BODY).status_code == 202
        assert min(found) > 4.9
        assert max(found) < SPOKEN
    for connection in dripping:
        connection.close()
    assert own.log() == [f"collector.ready port={own.port}"]


def test_a_head_that_drips_after_an_answer_is_cut_off_as_well(own: Collector) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall(GET)
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65_536)
        assert received.startswith(b"HTTP/1.1 200")
        answered = time.monotonic()
        assert 4.5 < closed_after(connection, GET, answered) < SPOKEN


def test_a_head_in_time_may_come_in_parts(own: Collector) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        for part in (GET[:20], GET[20:]):
            time.sleep(1)
            connection.sendall(part)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@contextmanager
def inside(app: ASGIApp, most: int) -> Iterator[int]:
    """Serve ``app`` from a thread, with so many connections ``most``, and yield its port."""
    running = server(app)
    running.server_state = Connections(most)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield port
        finally:
            running.should_exit = True
            thread.join()


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer after a second and a half."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await asyncio.sleep(1.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with more than any socket's buffers hold."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b" " * 50_000_000})


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with more than the kernel takes for a caller that does not read."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    length = [(b"content-length", b"1000000")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": bytes(1_000_000)})


def test_where_all_wait_for_an_answer_it_is_the_newcomer_that_is_closed() -> None:
    with inside(slow, 3) as port:
        busy = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for connection in busy:
            connection.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", port)) as late:
            assert answer(late) == b""
        for connection in busy:
            with connection:
                assert answer(connection).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", port)) as later:
            later.sendall(GET)
            assert later.recv(100).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.SECONDS, Stage.READING, 1.0)
    with (
        inside(endless, 1) as port,
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.sendall(GET)
        time.sleep(2)
        assert len(answer(connection)) < 50_000_000


def assert_that_unread_answers_make_room(app: ASGIApp, requests: bytes) -> None:
    with inside(app, 2) as port, ExitStack() as unread:
        for _ in range(5):
            connection = unread.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(requests)
            time.sleep(0.3)  # for the server to fill the socket's buffers
        with socket.create_connection(("127.0.0.1", port)) as late:
            late.sendall(GET)
            assert late.recv(100).startswith(b"HTTP/1.1 200")


def test_those_who_do_not_read_their_answers_make_room() -> None:
    assert_that_unread_answers_make_room(endless, GET)


def test_those_who_ask_on_and_read_no_answer_make_room() -> None:
    assert_that_unread_answers_make_room(whole, GET * 100)


def test_who_reads_late_gets_every_answer_to_what_it_has_asked_at_once() -> None:
    with (
        inside(whole, 2) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(GET * 20 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        time.sleep(0.5)
        assert answer(connection).count(b"HTTP/1.1 200") == 21


@pytest.mark.parametrize(
    ("descriptors", "expected"),
    [(1_024, 768), (4_096, 3_840), (1_048_576, 4_000), (resource.RLIM_INFINITY, 4_000), (64, 32)],
)
def test_the_bound_leaves_room_for_the_database_and_the_log(
    descriptors: int, expected: int
) -> None:
    assert at_most(descriptors) == expected


# Installs a day


def test_a_client_that_brings_too_many_installs_is_429_until_the_day_ends(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", COLLECTOR_CLIENT_INSTALLS="2") as own:
        assert own.post("{}").status_code == 400
        assert [own.post(of(number)).status_code for number in (1, 2)] == [202, 202]
        for _ in range(3):
            refused = own.post(of(3))
            assert (refused.status_code, refused.json()) == (429, {"error": "Too many installs."})
            left = 86_400 - time.time() % 86_400
            assert left - 60 < int(refused.headers["retry-after"]) < left + 60
        assert own.post(of(3), x_forwarded_for="203.0.113.77").status_code == 202
        assert own.held(INSTANCE).status_code == 404
        assert own.forget(INSTANCE).status_code == 204
        assert len(own.rows()) == 3
    assert own.log()[1:] == ["collector.too_many_ids count=1"]
    outcomes = dict(query(migrated, "SELECT outcome, requests FROM ingest"))
    assert outcomes == {"accepted": 3, "invalid": 1, "too many ids": 3, BUSIEST: 5}


def test_an_install_that_was_brought_on_this_day_is_accepted_again(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", COLLECTOR_CLIENT_INSTALLS="1") as own:
        assert own.post(BODY).status_code == 202
        assert own.post(of(1)).status_code == 429
        for day in (2, 3):
            assert own.post(changed(sent_at=f"2026-05-0{day}T02:30:00+00:00")).status_code == 202


def test_zero_sets_no_limit_and_fifty_is_the_default(own: Collector) -> None:
    assert {own.post(of(number)).status_code for number in range(60)} == {202}
    assert CollectorSettings().collector_client_installs == 50


@pytest.mark.parametrize("digit", ["0", "f"])
def test_the_nil_and_the_max_uuid_are_rejected(digit: str) -> None:
    nobody = "-".join(digit * length for length in (8, 4, 4, 4, 12))
    with pytest.raises(intake.NotAHeartbeat) as refused:
        intake.parse(changed(instance_id=nobody).encode())
    [detail] = refused.value.details
    assert detail["field"] == "instance_id"
    assert nobody not in str(refused.value.details)
