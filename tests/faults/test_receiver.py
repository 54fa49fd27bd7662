"""A receiver that fails, lingers or attacks costs one POST's deadline, and nothing else."""

import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from threading import Event, Thread

import pytest
import trustme

from app import sender
from app.retry import Outcome
from tests.receiver import Receiver, answer, receiving

DEADLINE = 1.0
BODY = b'{"telemetry_schema":1}'


def post(url: str) -> tuple[Outcome, float]:
    """POST with a deadline of a second; return the outcome and the seconds it took."""
    started = time.monotonic()
    target = sender.Target(url, schema=1, timeout=DEADLINE)
    outcome = sender.post(target, BODY, at=datetime.now(UTC), stopping=Event())
    return outcome, time.monotonic() - started


def drip(connection: socket.socket) -> None:
    """Send a head that never ends, a byte at a time."""
    connection.sendall(b"HTTP/1.1 202 Accepted\r\nX-Drip: ")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


def reset(connection: socket.socket) -> None:
    """End the connection as a crashed peer does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def stay_silent(connection: socket.socket) -> None:
    connection.settimeout(10)
    with suppress(OSError):
        connection.recv(1)


def go_on_informing(connection: socket.socket) -> None:
    """Announce an answer for ever."""
    for _ in range(100_000):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def pour(head: bytes) -> Callable[[socket.socket], None]:
    """Answer with success and then with a body that does not end."""

    def answer_without_end(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(20_000):
            connection.sendall(b"\0" * 65_536)

    return answer_without_end


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (drip, "deadline"),
        (stay_silent, "deadline"),
        (go_on_informing, "deadline"),
        (reset, "reset"),
        (lambda connection: connection.close(), "protocol"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "protocol"),
        (lambda connection: connection.sendall(b"HTTP/1.1 202 " + b"x" * 200_000), "protocol"),
    ],
    ids=[
        "drips",
        "silent",
        "informs",
        "resets",
        "closes",
        "is no HTTP server",
        "never ends its line",
    ],
)
def test_one_that_misbehaves_is_told_in_a_word_and_left_at_the_deadline(
    receiver: Receiver, behaviour: Callable[[socket.socket], None], error: str
) -> None:
    receiver.answers = [behaviour]
    outcome, seconds = post(receiver.url)
    assert (outcome.result, outcome.status, outcome.error) == ("retryable", None, error)
    assert seconds < DEADLINE + 0.5


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.1 202 Accepted\r\nContent-Encoding: gzip\r\nContent-Length: 9999999999\r\n\r\n",
    ],
    ids=["endless", "gzip bomb"],
)
def test_an_answers_body_is_not_read(receiver: Receiver, head: bytes) -> None:
    receiver.answers = [pour(head.replace(b"Transfer-Encoding: identity\r\n", b""))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, seconds = post(receiver.url)
    assert outcome.result == "sent"
    assert seconds < DEADLINE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_leads_nowhere(receiver: Receiver, status: int) -> None:
    with receiving() as other:
        receiver.answers = [answer(status, f"Location: {other.url}", "Set-Cookie: id=1")]
        outcome, _ = post(receiver.url)
    assert (outcome.result, outcome.status) == ("rejected", status)
    assert other.connections == 0


def test_no_cookie_comes_back(receiver: Receiver) -> None:
    receiver.answers = [answer(202, "Set-Cookie: id=1; Max-Age=9999999; Path=/")]
    for _ in range(2):
        post(receiver.url)
    assert all("cookie" not in request.headers for request in receiver.requests)


def test_nobody_at_home_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    outcome, _ = post(f"http://127.0.0.1:{port}/")
    assert (outcome.result, outcome.error) == ("retryable", "refused")


def test_a_connection_that_is_not_accepted_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        outcome, seconds = post(f"http://127.0.0.1:{full.getsockname()[1]}/")
        for each in waiting:
            each.close()
    assert (outcome.result, outcome.error) == ("retryable", "deadline")
    assert seconds < DEADLINE + 0.5


def test_a_name_that_nobody_knows_is_a_failure_to_try_again() -> None:
    outcome, _ = post("http://collector.invalid/")
    assert (outcome.result, outcome.error) == ("retryable", "dns")


def test_a_slow_resolver_is_not_waited_for() -> None:
    outcome, seconds = post("http://slow.invalid/")
    assert (outcome.result, outcome.error) == ("retryable", "deadline")
    assert seconds < DEADLINE + 0.5


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def over_tls(receiver: Receiver, authority: trustme.CA) -> Iterator[str]:
    """The address of a server on loopback that speaks TLS, with a certificate for that address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        server = context.wrap_socket(plain, server_side=True)
        Thread(target=receiver.serve, args=(server,), daemon=True).start()
        yield f"https://127.0.0.1:{server.getsockname()[1]}/v1/heartbeat"
        server.close()


def test_a_certificate_that_nobody_vouches_for_is_a_failure_to_try_again(
    over_tls: str, receiver: Receiver
) -> None:
    outcome, _ = post(over_tls)
    assert (outcome.result, outcome.error) == ("retryable", "tls")
    assert receiver.requests == []


def test_an_operators_own_authority_is_trusted_by_ssl_cert_file(
    over_tls: str,
    receiver: Receiver,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with authority.cert_pem.tempfile() as bundle:
        monkeypatch.setenv("SSL_CERT_FILE", bundle)
        outcome, _ = post(over_tls)
    assert outcome.result == "sent"
    assert receiver.requests[0].body == BODY


def test_a_proxy_is_used_as_elsewhere(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{receiver.port}")
    outcome, _ = post("http://collector.invalid/v1/heartbeat")
    assert outcome.result == "sent"
    assert receiver.requests[0].head.startswith(b"POST http://collector.invalid/v1/heartbeat ")
