"""The collector as it is run: a real process, real sockets, a real Postgres."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import NullPool, create_engine, text
from starlette.applications import Starlette

from app.collector import intake, store, web
from app.collector.__main__ import server
from app.payload import NEWEST
from app.settings.collector import CollectorSettings
from tests.conftest import Databases
from tests.support.collector import (
    BODY,
    EXAMPLE,
    JSON,
    NOWHERE,
    Collector,
    answer,
    changed,
    head,
    query,
    run,
    serving,
)


@pytest.fixture(scope="module")
def shared(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """One collector for the tests of this module that leave it as it is."""
    log = tmp_path_factory.mktemp("collector") / "log"
    with databases.copy_of("template1") as url:
        assert run("release", COLLECTOR_DATABASE_URL=url).returncode == 0
        with serving(url, log) as running:
            yield running


@pytest.fixture
def collector(shared: Collector) -> Collector:
    """The collector, with nothing stored."""
    query(shared.url, "TRUNCATE heartbeat, install")
    return shared


def test_a_heartbeat_is_stored_as_the_schema_reads_it(collector: Collector) -> None:
    response = collector.post(f"\n{BODY}  ")

    assert (response.status_code, response.content) == (202, b"")
    [(instance_id, sent_at, received_at, body)] = collector.rows()
    assert str(instance_id) == EXAMPLE["instance_id"]
    assert sent_at.isoformat() == EXAMPLE["sent_at"]
    assert abs(time.time() - received_at.timestamp()) < 60
    assert body == EXAMPLE


def test_a_repeated_heartbeat_is_accepted_and_stored_once(collector: Collector) -> None:
    assert [collector.post(BODY).status_code for _ in range(3)] == [202, 202, 202]
    assert len(collector.rows()) == 1


def test_twenty_posts_at_once_make_one_row(collector: Collector) -> None:
    together = threading.Barrier(20)

    def post(_: int) -> int:
        together.wait(10)
        return collector.post(BODY).status_code

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(post, range(20))) == {202}
    assert len(collector.rows()) == 1


def test_another_day_and_another_instance_are_rows_of_their_own(collector: Collector) -> None:
    collector.post(BODY)
    collector.post(changed(sent_at="2026-05-03T02:30:00+00:00"))
    collector.post(changed(instance_id="ffffffff-7e62-4a4e-9b6f-1a4e2d2dfd99"))
    assert len(collector.rows()) == 3


def test_one_connection_carries_several_heartbeats(collector: Collector) -> None:
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        for more in ("keep-alive", "keep-alive", "close"):
            fields = (f"Content-Length: {len(BODY)}", f"Connection: {more}")
            connection.sendall(head(*fields) + BODY.encode())
        assert answer(connection).count(b"HTTP/1.1 202") == 3


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        (changed(telemetry_schema=0), "telemetry_schema", "Input should be 1"),
        (changed(telemetry_schema=-1), "telemetry_schema", "Input should be 1"),
        (changed(telemetry_schema="2"), "telemetry_schema", "valid integer"),
        (changed(telemetry_schema=2.0), "telemetry_schema", "valid integer"),
        (changed(telemetry_schema=True), "telemetry_schema", "valid integer"),
        (changed(telemetry_schema=None), "telemetry_schema", "valid integer"),
        (changed(platform="opensesame"), "platform", "should be 'linux'"),
        (changed(counts={**EXAMPLE["counts"], "orgs": 7}), "counts.orgs", "should be '0'"),
        (changed(domain="opensesame"), "domain", "not permitted"),
        (changed(**{"opén\0sesame": 1}), "op?n?sesame", "not permitted"),
        (changed(**{"x" * 500: 1}), "x" * 64, "not permitted"),
        (changed(sent_at="2026-02-31T02:30:00+00:00"), "sent_at", "not possible"),
        (changed(deployment="a\0b"), "deployment", "should match"),
        (BODY.replace('"ce"', '"c\0e"'), "", "control character"),
        (BODY.replace("linux", "\\ud800"), "", "Invalid JSON"),
        ("[" * 16_000, "", "recursion limit"),
        ("[]", "", "should be an object"),
        (BODY + "{}", "", "trailing"),
        ("\ufeff" + BODY, "", "Invalid JSON"),
        ("", "", "EOF"),
    ],
)
def test_a_refusal_names_the_field_and_no_value(body: str, field: str, problem: str) -> None:
    with pytest.raises(intake.NotAHeartbeat) as refused:
        intake.parse(body.encode())

    assert "telemetry_schema 1" in refused.value.detail
    [detail] = refused.value.details
    assert detail["field"] == field
    assert problem in detail["problem"]
    assert "opensesame" not in detail["problem"]


@pytest.mark.parametrize(
    "body",
    [
        BODY.replace("{", '{"edition": "ee", ', 1),
        BODY.replace("{", '{"\\u0065dition": "ce", ', 1),
        BODY.replace('"orgs"', '"orgs": "0", "orgs"'),
        BODY.replace("{", '{"counts": {"a": 1, "a": 2}, ', 1),
        BODY.replace("{", '{"version": %s, ' % ("[" * 190 + "]" * 190), 1),
        BODY.replace("{", '{"version": %s, ' % ("9" * 4_300), 1),
    ],
)
def test_a_field_given_twice_is_refused(body: str) -> None:
    assert NEWEST.model_validate_json(body)
    with pytest.raises(intake.NotAHeartbeat, match="names a field twice"):
        intake.parse(body.encode())


def test_a_bad_body_is_answered_in_json_with_at_most_ten_details(collector: Collector) -> None:
    response = collector.post(changed(**{f"field_{n}": "opensesame" for n in range(50)}))

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error", "details"}
    assert len(response.json()["details"]) == 10
    assert "opensesame" not in response.text
    not_utf8 = collector.post(BODY.encode().replace(b"linux", b"li\xffnux"))
    assert (not_utf8.status_code, not_utf8.json()["details"]) == (400, [])
    assert collector.rows() == []


def test_json_is_accepted_with_parameters(collector: Collector) -> None:
    for kind in ("application/json", "Application/JSON ; charset=utf-8"):
        response = collector.post(BODY, content_type=kind, content_encoding="Identity")
        assert response.status_code == 202


def test_another_media_type_or_coding_is_415(collector: Collector) -> None:
    for headers in (
        {"content_type": "text/plain"},
        {"content_type": "application/jsonp"},
        {"content_type": ""},
        {"content_encoding": "gzip"},
        {"content_encoding": "identity, br"},
    ):
        response = collector.post(BODY, **headers)
        assert response.status_code == 415
        assert response.json()["error"].startswith("Content-")
    assert collector.rows() == []


def test_other_methods_are_405_and_other_paths_404(collector: Collector) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        response = collector.client.request(method, "/v1/heartbeat")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json() == {"error": "Method Not Allowed"}
    for path in ("/v1", "/v1/heartbeat/", "/v1//heartbeat", "/v2/heartbeat", "/%00%ff"):
        response = collector.client.post(path, content=BODY, headers=JSON)
        assert (response.status_code, response.json()) == (404, {"error": "Not Found"})
    assert collector.client.head("/v1/heartbeat").status_code == 405
    assert collector.rows() == []


def test_a_body_of_16_kib_is_read_and_one_byte_more_is_413(collector: Collector) -> None:
    assert collector.post(BODY.ljust(16_384)).status_code == 202
    response = collector.post(BODY.ljust(16_385))
    assert response.status_code == 413
    assert "16384" in response.json()["error"]


def test_a_content_length_that_is_too_large_is_refused_before_the_body(
    collector: Collector,
) -> None:
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        connection.sendall(head("Content-Length: 99999999999999999999", "Expect: 100-continue"))
        assert answer(connection).startswith(b"HTTP/1.1 413")


def test_an_endless_chunked_body_is_cut_off(collector: Collector) -> None:
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        with suppress(ConnectionError):
            for _ in range(100_000):
                connection.sendall(chunk)
            pytest.fail("the collector read 400 MB")
    assert collector.post(BODY).status_code == 202
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        connection.sendall(head("Transfer-Encoding: chunked") + chunk * 5)
        assert answer(connection).startswith(b"HTTP/1.1 413")


def test_what_is_not_http_is_answered_400_and_not_logged(own: Collector) -> None:
    for nonsense in (
        b"opensesame\r\n\r\n",
        b"BREW /v1/heartbeat HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"a" * 9_000,
        head("X-Filler: " + "a" * 9_000),
        head("Content-Length: -1"),
        head("Content-Length: 5", "Content-Length: 6"),
        head("Transfer-Encoding: gzip"),
        head("Transfer-Encoding: chunked") + b"opensesame\r\n",
    ):
        with socket.create_connection(("127.0.0.1", own.port)) as connection:
            connection.sendall(nonsense)
            assert answer(connection).startswith(b"HTTP/1.1 400")
    assert own.log() == [f"collector.ready port={own.port}"]
    assert own.post(BODY).status_code == 202


def test_a_caller_who_leaves_early_leaves_nothing(own: Collector) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY[:100].encode())
    assert own.post(BODY).status_code == 202
    assert len(own.rows()) == 1
    assert own.log() == [f"collector.ready port={own.port}"]


def test_a_body_that_drips_is_408_in_time(migrated: str) -> None:
    with inside(application(migrated)) as port:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(f"Content-Length: {len(BODY)}"))
            dripping = threading.Thread(target=drip, args=(connection,))
            dripping.start()
            received = answer(connection)
            dripping.join()
    assert received.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 3


def application(url: str) -> Starlette:
    """Return the application, which waits half a second for a body."""
    return web.create_app(store.connect(url), CollectorSettings(), body_seconds=0.5)


def drip(connection: socket.socket) -> None:
    with suppress(OSError):
        for byte in BODY.encode():
            connection.sendall(bytes([byte]))
            time.sleep(0.05)


@contextmanager
def inside(app: Starlette) -> Iterator[int]:
    """Serve ``app`` from a thread of this process and yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = server(app)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


def test_nothing_about_the_caller_reaches_the_table_or_the_log(own: Collector) -> None:
    marks = {
        "User-Agent": "opensesame",
        "X-Forwarded-For": "203.0.113.77",
        "Forwarded": "for=203.0.113.77",
        "Cookie": "opensesame=1",
        "Upgrade": "websocket",
        "Connection": "upgrade",
        **JSON,
    }

    def post(body: str) -> int:
        path = "/v1/heartbeat?opensesame=203.0.113.77"
        return own.client.post(path, content=body, headers=marks).status_code

    bodies = (BODY, changed(opensesame=1), "opensesame", BODY.ljust(20_000))
    assert [post(body) for body in bodies] == [202, 400, 400, 413]
    assert own.client.get("/opensesame", headers=marks).status_code == 404
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    assert post(BODY) == 503
    query(own.url, "ALTER TABLE hidden RENAME TO heartbeat")

    [(row,)] = query(own.url, "SELECT heartbeat::text FROM heartbeat")
    for mark in ("opensesame", "203.0.113.77", "127.0.0.1", EXAMPLE["deployment"]):
        assert mark not in "\n".join(own.log())
    for mark in ("opensesame", "203.0.113.77", "127.0.0.1"):
        assert mark not in row
    columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'heartbeat'"
    names = {name for (name,) in query(own.url, columns)}
    assert names == {"instance_id", "sent_at", "received_at", "body"}


def test_a_response_does_not_say_what_serves_it(collector: Collector) -> None:
    assert "server" not in collector.post(BODY).headers


def test_a_database_that_fails_is_503_and_heals_without_a_restart(own: Collector) -> None:
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    response = own.post(BODY)
    assert (response.status_code, response.headers["retry-after"]) == (503, "60")
    assert response.json() == {"error": "The database is not available."}
    assert own.failures() == ["collector.failed stage=commit error=UndefinedTable"]
    query(own.url, "ALTER TABLE hidden RENAME TO heartbeat")
    end_backends = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    query(own.url, end_backends)
    assert own.post(BODY).status_code == 202


def test_an_unreachable_database_is_503(tmp_path: Path) -> None:
    with serving(NOWHERE, tmp_path / "log") as own:
        assert own.post(BODY).status_code == 503
        assert set(own.log()[1:]) == {
            'collector.not_ready reason="the database cannot be reached"',
            *(
                f"collector.failed stage={stage} error=OperationalError"
                for stage in ("weeks", "count", "prune", "commit")
            ),
        }


def test_a_statement_that_waits_is_given_up_and_nothing_is_acknowledged(
    own: Collector,
) -> None:
    engine = create_engine(own.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE heartbeat IN ACCESS EXCLUSIVE MODE"))
        assert own.post(BODY).status_code == 503
    assert own.failures() == ["collector.failed stage=commit error=LockNotAvailable"]
    assert own.rows() == []


BROKEN = """
import sqlalchemy
from app.collector.__main__ import main

@sqlalchemy.event.listens_for(sqlalchemy.Engine, "do_connect")
def fail(*_):
    raise RuntimeError("opensesame")

main()
"""


def test_an_unexpected_error_is_500_without_its_message(tmp_path: Path) -> None:
    broken = [sys.executable, "-c", BROKEN, "serve"]
    with serving(NOWHERE, tmp_path / "log", broken) as own:
        response = own.post(BODY)
        assert (response.status_code, response.json()) == (500, {"error": "The collector failed."})
    assert own.failures("error=") == ["collector.failed error=RuntimeError"]
    assert "opensesame" not in "".join(own.log())


def test_sigterm_does_not_wait_for_a_slow_caller(own: Collector) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall(head("Content-Length: 100") + b"{")
        time.sleep(0.2)
        began = time.monotonic()
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(10) == 0
        assert time.monotonic() - began < 6


def test_migrate_says_what_it_did_and_may_be_repeated(collector_database: str) -> None:
    first = run("release", COLLECTOR_DATABASE_URL=collector_database)
    again = run("release", COLLECTOR_DATABASE_URL=collector_database)
    assert (first.returncode, first.stdout) == (0, "collector.migrated from=base to=0006\n")
    assert (again.returncode, again.stdout) == (0, "collector.migrated from=0006 to=0006\n")


def test_a_database_from_a_later_version_is_refused_in_one_sentence(migrated: str) -> None:
    query(migrated, "UPDATE collector_alembic_version SET version_num = '9999'")
    failed(run("release", COLLECTOR_DATABASE_URL=migrated), 1, "9999")


def test_an_unreachable_database_fails_the_release_in_one_sentence() -> None:
    failed(run("release", COLLECTOR_DATABASE_URL=NOWHERE), 1, "OperationalError")


@pytest.mark.parametrize("process", ["release", "web"])
def test_a_database_url_that_is_missing_or_wrong_is_reported_without_its_value(
    process: str,
) -> None:
    failed(run(process), 2, "COLLECTOR_DATABASE_URL is not set.")
    wrong = run(process, COLLECTOR_DATABASE_URL="mysql://opensesame@db/x")
    failed(wrong, 2, "COLLECTOR_DATABASE_URL must be a URL")


@pytest.mark.parametrize(
    ("port", "problem"),
    [
        ("", "must be a number"),
        ("http", "must be a number"),
        ("0", "must be greater than or equal to 1"),
        ("65536", "must be less than or equal to 65535"),
    ],
)
def test_an_invalid_port_is_reported_in_one_sentence(port: str, problem: str) -> None:
    failed(run("web", COLLECTOR_DATABASE_URL=NOWHERE, PORT=port), 2, f"PORT {problem}.")


def test_a_port_in_use_is_reported_in_one_sentence() -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        failed(run("web", COLLECTOR_DATABASE_URL=NOWHERE, PORT=port), 1, f"port {port}")


def failed(result: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """Assert that a command ended with one sentence on stderr, and none of a URL in it."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert "opensesame" not in result.stderr
    assert "127.0.0.1" not in result.stderr


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("1-10")
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Return the example with a few fields replaced, added or dropped, somewhere in it."""
    body = deepcopy(EXAMPLE)
    for _ in range(draw(st.integers(0, 3))):
        inner = draw(st.sampled_from([body, *(v for v in body.values() if isinstance(v, dict))]))
        name = draw(st.sampled_from([*inner, "extra"]) | st.text(max_size=5))
        if draw(st.booleans()):
            inner[name] = draw(values)
        else:
            inner.pop(name, None)
    return json.dumps(body)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated())
@example(BODY)
def test_whatever_json_comes_is_stored_when_it_fits_and_refused_otherwise(
    collector: Collector, body: str
) -> None:
    version = json.loads(body).get("telemetry_schema")
    try:
        NEWEST.model_validate_json(body)
        expected = 202
    except ValidationError:
        expected = 503 if type(version) is int and version > 1 else 400
    assert collector.post(body).status_code == expected


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(BODY)), st.integers(0, 3), st.binary(max_size=4))
def test_whatever_bytes_come_the_collector_does_not_fail(
    collector: Collector, at: int, dropped: int, put: bytes
) -> None:
    body = BODY.encode()
    response = collector.post(body[:at] + put + body[at + dropped :])
    newer = response.status_code == 503 and response.headers["retry-after"] == "21600"
    assert newer or response.status_code in {202, 400}
