"""A POST takes the proxy that other tools would take, and no variable keeps it from leaving."""

import base64
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event, Thread
from urllib.parse import quote, urlsplit

import pytest
import trustme
from sqlalchemy import Engine

from app import sender
from app.pipeline import Pipeline
from app.retry import Outcome
from app.settings import Settings
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import give_notice, outbox_row, run
from tests.support.proxy import LOGIN, Proxy, proxying
from tests.support.receiver import Receiver

NAMED = "http://collector.invalid/v1/heartbeat"
"""A host that only the proxy can resolve."""

BODY = b'{"telemetry_schema":1}'
SEVEN = {
    *("host", "content-type", "content-length", "user-agent", "accept"),
    *("accept-encoding", "connection"),
}
QUOTED_LOGIN = ":".join(quote(word, safe="") for word in LOGIN)


@pytest.fixture
def http_proxy(receiver: Receiver) -> Iterator[Proxy]:
    with proxying("http", receiver.port) as proxy:
        yield proxy


@pytest.fixture
def socks_proxy(receiver: Receiver) -> Iterator[Proxy]:
    with proxying("socks", receiver.port) as proxy:
        yield proxy


@contextmanager
def trusted(authority: trustme.CA) -> Iterator[None]:
    """Have SSL_CERT_FILE name an authority until the block ends."""
    with authority.cert_pem.tempfile() as bundle, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", bundle)
        sender.tls_context.cache_clear()
        yield
    sender.tls_context.cache_clear()


def post(endpoint: str, **environment: str) -> Outcome:
    """POST as a delivery does in a process that has these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TELEMETRY_ENDPOINT": endpoint, **environment}.items():
            patch.setenv(name, value)
        settings = Settings.load()
        target = sender.Target(
            endpoint=settings.telemetry_endpoint,
            schema=1,
            timeout=settings.telemetry_timeout_seconds,
            proxy=settings.proxy,
        )
        return sender.post(target, BODY, at=datetime.now(UTC), stopping=Event())


def test_plain_http_goes_through_the_proxy(http_proxy: Proxy, receiver: Receiver) -> None:
    assert post(NAMED, HTTP_PROXY=f"127.0.0.1:{http_proxy.port}").result == "sent"
    assert http_proxy.asked[0].startswith(f"POST {NAMED} HTTP/1.1\r\n")
    assert receiver.requests[0].body == BODY


@pytest.mark.parametrize(
    "no_proxy",
    [
        *("10.0.0.0/8", "fd00::/8", "host:8443", "::1", "[::1]:8443", "[::1]", "[fd00::]/8"),
        *("*.svc", ".svc", "svc.", "10.0.0.1:80", ",", " , ", "localhost,127.0.0.1,::1,.local"),
        *("[", "]", "[::1", "h:port", "h:99999999", "10.0.0.0/99", "http://", "http://[::1", "://"),
        *("*.*", "a*b", "\udcff", "é.example", "a b;c", "<local>", "x" * 70_000, "\x1b[31m"),
    ],
)
def test_no_entry_of_no_proxy_keeps_a_post_from_leaving(
    http_proxy: Proxy, receiver: Receiver, no_proxy: str
) -> None:
    proxy = f"http://127.0.0.1:{http_proxy.port}"
    assert post(NAMED, HTTP_PROXY=proxy, NO_PROXY=no_proxy).result == "sent"
    assert len(http_proxy.asked) == len(receiver.requests) == 1


@pytest.mark.parametrize(
    "no_proxy",
    [
        *(
            "*",
            "127.0.0.1",
            "127.0.0.1:{port}",
            "127.0.0.0/8",
            "127.1.2.3/8",
            "10.0.0.0/8,127.0.0.1",
        ),
        *("a.com 127.0.0.1", "[, 127.0.0.1 ,"),
    ],
)
@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_leads_past_the_proxy(
    http_proxy: Proxy, receiver: Receiver, no_proxy: str, variable: str
) -> None:
    exempted = {variable: no_proxy.format(port=receiver.port)}
    proxy = f"http://127.0.0.1:{http_proxy.port}"
    assert post(receiver.url, ALL_PROXY=proxy, **exempted).result == "sent"
    assert http_proxy.asked == []
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("no_proxy", ["::1", "[::1]", "[::1]:{port}", "::/64", "[::]/64"])
def test_no_proxy_leads_past_the_proxy_over_ipv6(
    http_proxy: Proxy, over_ipv6: str, receiver: Receiver, no_proxy: str
) -> None:
    exempted = no_proxy.format(port=urlsplit(over_ipv6).port)
    proxy = f"http://127.0.0.1:{http_proxy.port}"
    assert post(over_ipv6, HTTP_PROXY=proxy, NO_PROXY=exempted).result == "sent"
    assert http_proxy.asked == []
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "proxy", ["http://[::1", "ftp://x", "socks9://x", "http://h:port", "\udcff", "http://u:p/w@h:1"]
)
def test_an_invalid_proxy_is_ignored(receiver: Receiver, proxy: str) -> None:
    assert post(receiver.url, HTTP_PROXY=proxy, ALL_PROXY=proxy).result == "sent"
    assert len(receiver.requests) == 1


def test_over_tls_the_proxy_sees_a_connect_and_alone_gets_its_login(
    over_tls: str, receiver: Receiver, authority: trustme.CA
) -> None:
    port = urlsplit(over_tls).port or 0
    with proxying("http", port) as proxy, trusted(authority):
        login = f"http://{QUOTED_LOGIN}@127.0.0.1:{proxy.port}"
        assert post(f"https://collector.invalid:{port}/v1", HTTPS_PROXY=login).result == "sent"
    (asked,) = proxy.asked
    assert asked.startswith(f"CONNECT collector.invalid:{port} HTTP/1.1\r\n")
    assert base64.b64encode(":".join(LOGIN).encode()).decode() in asked
    assert {*receiver.requests[0].headers} == SEVEN


def test_a_proxy_may_speak_tls_itself_under_an_operators_own_authority(
    over_tls: str, receiver: Receiver, authority: trustme.CA
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    port = urlsplit(over_tls).port or 0
    with proxying("http", port, context) as proxy, trusted(authority):
        for endpoint in (over_tls, f"https://collector.invalid:{port}/v1"):
            sent = post(endpoint, HTTPS_PROXY=f"https://127.0.0.1:{proxy.port}")
            assert (sent.result, sent.error) == ("sent", None)
    assert len(proxy.asked) == len(receiver.requests) == 2


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS5"])
@pytest.mark.parametrize("login", ["", f"{QUOTED_LOGIN}@"], ids=["open", "login"])
def test_a_socks_proxy_looks_the_name_up(
    socks_proxy: Proxy, receiver: Receiver, scheme: str, login: str
) -> None:
    proxy = f"{scheme}://{login}127.0.0.1:{socks_proxy.port}"
    assert post(NAMED, ALL_PROXY=proxy).result == "sent"
    assert socks_proxy.asked == ["collector.invalid:80"]
    assert socks_proxy.logins == ([LOGIN] if login else [])
    assert {*receiver.requests[0].headers} == SEVEN


def test_https_goes_through_a_socks_proxy(
    over_tls: str, receiver: Receiver, authority: trustme.CA
) -> None:
    port = urlsplit(over_tls).port or 0
    with proxying("socks", port) as proxy, trusted(authority):
        sent = post("https://collector.invalid/v1", ALL_PROXY=f"socks5://127.0.0.1:{proxy.port}")
    assert (sent.result, sent.error) == ("sent", None)
    assert proxy.asked == ["collector.invalid:443"]
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "answers",
    [b"", b"\x05", b"\x05\xff", b"\x05\x07", b"\x05\x02", b"HTTP/1.1 400 -\r\n\r\n"],
)
@pytest.mark.parametrize("login", ["", "u:p@", f"{'u' * 300}:p@"])
def test_a_socks_proxy_with_an_invalid_answer_is_retryable(
    receiver: Receiver, answers: bytes, login: str
) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(3)
        connection.sendall(answers)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = Thread(target=serve)
        thread.start()
        proxy = f"socks5://{login}127.0.0.1:{server.getsockname()[1]}"
        outcome = post(NAMED, ALL_PROXY=proxy)
        thread.join()
    assert (outcome.result, outcome.status) == ("retryable", None)
    assert outcome.error in {"proxy", "protocol", "connection", "reset"}
    assert receiver.requests == []


def test_a_silent_proxy_is_given_up_at_the_deadline_and_its_connection_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for scheme in ("socks5", "http"):
            silent = f"{scheme}://127.0.0.1:{server.getsockname()[1]}"
            assert (
                post(NAMED, TELEMETRY_TIMEOUT_SECONDS="0.5", ALL_PROXY=silent).error == "deadline"
            )
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                while connection.recv(65_536):  # times out where the other end stays open
                    pass


@pytest.mark.usefixtures("environment")
def test_a_heartbeat_takes_the_proxy_and_nothing_shows_its_password(
    http_proxy: Proxy,
    receiver: Receiver,
    clock: Clock,
    db: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    give_notice(db, "2026-05-01")
    clock("2026-05-02T02:30:00Z")
    monkeypatch.setenv("HTTP_PROXY", f"http://{QUOTED_LOGIN}@127.0.0.1:{http_proxy.port}")
    monkeypatch.setenv("TELEMETRY_ENDPOINT", NAMED)
    pipeline = Pipeline(Settings.load())
    assert pipeline.write_heartbeat()
    pipeline.drain()
    assert outbox_row(db)["state"] == "sent"
    assert receiver.requests[0].body == outbox_row(db)["payload"].encode()
    assert len(http_proxy.asked) == 1
    assert not any(word in caplog.text for word in (*LOGIN, QUOTED_LOGIN))


def test_a_receiver_is_asked_to_delete_through_the_proxy(
    administered: dict[str, str], http_proxy: Proxy, receiver: Receiver, db: Engine
) -> None:
    run(
        db,
        "INSERT INTO instance (id, created_at, updated_at)"
        " VALUES (gen_random_uuid(), now(), now())",
    )
    through = {"HTTP_PROXY": f"http://127.0.0.1:{http_proxy.port}", "TELEMETRY_ENDPOINT": NAMED}
    ended = command({**administered, **through}, "forget", "--remote", "--yes")
    assert ended.code == 0, ended.err
    assert http_proxy.asked[0].startswith("DELETE http://collector.invalid/v1/installs/")
    assert len(receiver.requests) == 1


def test_status_reports_an_invalid_proxy_without_repeating_it(
    environment: dict[str, str],
) -> None:
    wrong = {"HTTP_PROXY": "ftp://s3cret-CANARY", "TELEMETRY_ENDPOINT": "http://localhost/"}
    ended = command({**environment, **wrong}, "status", "--json")
    (warning,) = ended.json["warnings"]
    assert warning.startswith("HTTP_PROXY is not a valid proxy URL")
    assert "CANARY" not in ended.out + ended.err
