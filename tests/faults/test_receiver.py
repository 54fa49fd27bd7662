"""A receiver that fails, hangs or attacks costs the deadline of one POST, and nothing else."""

import resource
import socket
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Event

import psutil
import pytest
import trustme
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from app import sender
from app.pipeline import Pipeline
from app.retry import Outcome
from tests.conftest import Clock
from tests.support.database import attempts, one, outbox_row, run
from tests.support.ports import free_port
from tests.support.processes import Processes
from tests.support.receiver import Receiver, answer, receiving, stay_silent
from tests.support.steps import (
    MORE_THAN_A_BACKOFF,
    do,
    eventually,
    left,
    put_a_row,
    ready,
    until_worked_off,
    without_harm,
)

DEADLINE = 1.0
BODY = b'{"telemetry_schema":1}'
SIX_HOURS = timedelta(hours=6)


UNKNOWN_ISSUER = "tls: unable to get local issuer certificate"


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


def go_on_informing(connection: socket.socket) -> None:
    """Send informational responses without end."""
    for _ in range(100_000):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def pour(
    head: bytes, chunk: bytes = b"\0" * 65_536, meanwhile: Callable[[], object] = lambda: None
) -> Callable[[socket.socket], None]:
    """Answer with success and then with a body that does not end."""

    def answer_without_end(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(20_000):
            meanwhile()
            connection.sendall(chunk)

    return answer_without_end


def gzip_bomb() -> tuple[bytes, bytes]:
    """Return the beginning of a gzip stream, and a block of 10 MB that may follow for ever."""
    packer = zlib.compressobj(wbits=31)

    def block() -> bytes:
        return packer.compress(bytes(10_000_000)) + packer.flush(zlib.Z_SYNC_FLUSH)

    return block(), block()


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
def test_one_that_misbehaves_is_recorded_in_a_word_and_given_up_at_the_deadline(
    receiver: Receiver, behaviour: Callable[[socket.socket], None], error: str
) -> None:
    receiver.answers = [behaviour]
    outcome, seconds = post(receiver.url)
    assert (outcome.result, outcome.status, outcome.error) == ("retryable", None, error)
    assert seconds < DEADLINE + 0.5


ENDLESS = b"HTTP/1.1 202 Accepted\r\n\r\n"
PACKED = b"HTTP/1.1 202 Accepted\r\nContent-Encoding: gzip\r\nContent-Length: 9999999999\r\n\r\n"


@pytest.mark.parametrize("packed", [False, True], ids=["endless", "gzip bomb"])
def test_an_answers_body_is_not_read(receiver: Receiver, *, packed: bool) -> None:
    start, block = gzip_bomb()
    receiver.answers = [pour(PACKED + start, block) if packed else pour(ENDLESS)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, seconds = post(receiver.url)
    assert outcome.result == "sent"
    assert seconds < DEADLINE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, status: int) -> None:
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


def test_a_port_without_a_listener_refuses_at_once() -> None:
    port = free_port()
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


def test_an_unknown_name_is_retryable() -> None:
    outcome, _ = post("http://collector.invalid/")
    assert (outcome.result, outcome.error) == ("retryable", "dns")


def test_a_slow_resolver_is_not_waited_for() -> None:
    outcome, seconds = post("http://slow.invalid/")
    assert (outcome.result, outcome.error) == ("retryable", "deadline")
    assert seconds < DEADLINE + 0.5


def test_an_untrusted_certificate_is_retryable(over_tls: str, receiver: Receiver) -> None:
    outcome, _ = post(over_tls)
    assert (outcome.result, outcome.error) == ("retryable", UNKNOWN_ISSUER)
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


def tries(db: Engine) -> list[tuple[str | None, int | None, str | None]]:
    """Return the outcome, status and kind of failure of each attempt."""
    return [(a["outcome"], a["http_status"], a["error"]) for a in attempts(db)]


def waits_for_its_backoff(db: Engine) -> bool:
    """Whether the row's next attempt is a minute after its last one, or little more."""
    row = outbox_row(db)
    wait = row["next_attempt_at"] - attempts(db)[-1]["finished_at"]
    free = row["state"] == "pending" and row["not_before"] is None
    return free and timedelta(minutes=1) <= wait <= timedelta(minutes=1.25)


@pytest.mark.usefixtures("pending")
class TestThroughAWorker:
    @pytest.mark.parametrize("status", [400, 410, 413])
    def test_a_refusal_is_final_and_tried_once(
        self, processes: Processes, receiver: Receiver, db: Engine, status: int
    ) -> None:
        receiver.answers = [answer(status, body=b"what it says about it")]
        worker = processes.start("worker")
        processes.wake("drain")
        worker.wait_for("telemetry.rejected")
        do(processes, "drain")
        assert outbox_row(db)["state"] == "rejected"
        assert tries(db) == [("rejected", status, None)]
        assert len(receiver.requests) == receiver.connections == 1
        assert "what it says about it" not in worker.output()

    def test_a_retryable_failure_is_tried_three_times_and_later_again_with_the_same_bytes(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        passing = (408, 425, 429, 500, 599)
        receiver.answers = [*map(answer, passing), answer(202)]
        worker = processes.start("worker")
        do(processes, "drain")
        assert len(receiver.requests) == 3
        assert waits_for_its_backoff(db)
        clock(MORE_THAN_A_BACKOFF)
        do(processes, "drain")
        assert tries(db) == [("retryable", status, None) for status in passing] + [
            ("sent", 202, None)
        ]
        row = outbox_row(db)
        assert (row["state"], row["drains"]) == ("sent", 2)
        assert left(receiver, db, times=6)
        assert len(worker.lines("telemetry.attempt")) == 6
        assert len(worker.lines("telemetry.payload")) == 1

    def test_a_worker_follows_no_redirect(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        with receiving() as other:
            receiver.answers = [answer(307, f"Location: {other.url}", "Refresh: 0; url=/else")]
            worker = processes.start("worker")
            processes.wake("drain")
            worker.wait_for("telemetry.rejected")
        assert tries(db) == [("rejected", 307, None)]
        assert other.connections == 0
        assert str(receiver.port) in processes.trace.read_text()
        assert str(other.port) not in processes.trace.read_text()

    def test_one_that_reads_it_and_never_answers_is_given_up_at_the_deadline(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        worker = processes.start("worker", TELEMETRY_TIMEOUT_SECONDS="1")
        processes.wake("drain")
        worker.wait_for("telemetry.payload")
        until_worked_off(processes)
        assert tries(db) == [("retryable", None, "deadline"), ("sent", 202, None)]
        assert 1000 <= attempts(db)[0]["duration_ms"] < 2000
        assert left(receiver, db, times=2)

    def test_an_unknown_name_is_tried_again_later(self, processes: Processes, db: Engine) -> None:
        worker = processes.start("worker", TELEMETRY_ENDPOINT="http://collector.invalid/")
        do(processes, "drain")
        assert tries(db) == [("retryable", None, "dns")] * 3
        assert waits_for_its_backoff(db)
        assert without_harm(worker)

    def test_a_slow_name_look_up_does_not_delay_a_sweep(
        self, processes: Processes, db: Engine
    ) -> None:
        slow = {"TELEMETRY_ENDPOINT": "http://slow.invalid/", "TELEMETRY_TIMEOUT_SECONDS": "3"}
        worker = processes.start("worker", **slow)
        processes.wake("drain")
        eventually(lambda: attempts(db))
        put_a_row(db, day="2026-04-01")
        processes.wake("sweep")
        worker.wait_for("telemetry.expired")
        assert tries(db) == [(None, None, None)]
        worker.wait_for("telemetry.attempt")
        assert tries(db)[0] == ("retryable", None, "deadline")
        assert 3000 <= attempts(db)[0]["duration_ms"] < 4000

    def test_one_with_an_untrusted_certificate_gets_no_byte_of_the_request(
        self, over_tls: str, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = processes.start("worker", TELEMETRY_ENDPOINT=over_tls)
        do(processes, "drain")
        assert tries(db) == [("retryable", None, UNKNOWN_ISSUER)] * 3
        assert waits_for_its_backoff(db)
        assert receiver.requests == []
        assert without_harm(worker)

    def test_one_that_the_operators_own_authority_certifies_gets_the_heartbeat(
        self,
        over_tls: str,
        authority: trustme.CA,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        with authority.cert_pem.tempfile() as bundle:
            processes.start("worker", TELEMETRY_ENDPOINT=over_tls, SSL_CERT_FILE=bundle)
            do(processes, "drain")
        assert tries(db) == [("sent", 202, None)]
        assert left(receiver, db, times=1)

    def test_one_on_ipv6_gets_the_heartbeat(
        self, over_ipv6: str, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        processes.start("worker", TELEMETRY_ENDPOINT=over_ipv6)
        do(processes, "drain")
        assert tries(db) == [("sent", 202, None)]
        assert receiver.requests[0].headers["host"].startswith("[::1]:")

    def test_hostile_answers_cost_neither_memory_nor_more_than_the_deadline(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        # A row that fails then waits for long. No row's day has begun, so that the stamp of one
        # success does not count for the others.
        later = "expires_at = expires_at + interval '30 minutes'"
        run(db, f"UPDATE telemetry_outbox SET drains = 5, {later}")
        run(
            db,
            "INSERT INTO telemetry_outbox"
            " (id, day, instance_id, payload, drains, created_at, next_attempt_at, expires_at)"
            " SELECT gen_random_uuid(), day - n, instance_id, payload, drains, created_at,"
            " next_attempt_at, expires_at FROM telemetry_outbox, generate_series(1, 39) AS n",
        )
        worker = ready(processes, TELEMETRY_TIMEOUT_SECONDS="1")
        (child,) = psutil.Process(worker.pid).children()
        used: list[int] = []

        def measure() -> None:
            used.append(child.memory_info().rss)

        start, block = gzip_bomb()
        many_headers = b"HTTP/1.1 202 Accepted\r\n" + b"X-Many: headers\r\n" * 100_000
        harmless = [answer(202)] * 10
        hostile = [
            drip,
            go_on_informing,
            lambda connection: connection.sendall(many_headers),
            lambda connection: connection.sendall(b"HTTP/1.1 202 " + b"x" * 2_000_000),
            *[pour(ENDLESS, meanwhile=measure), pour(PACKED + start, block, measure)] * 12,
        ]
        receiver.answers = [*harmless, *hostile, answer(202)]
        receiver.during = measure
        do(processes, "drain")
        assert len(receiver.requests) >= len(harmless) + len(hostile)
        assert max(attempt["duration_ms"] for attempt in attempts(db)) < 2000
        assert [error for _, _, error in tries(db) if error].count("protocol") == 2
        assert max(used) - used[len(harmless)] < 8_000_000


@pytest.mark.usefixtures("pending")
class TestRetryAfter:
    @pytest.mark.parametrize(
        "header", ["soon", "-120", "Sat, 02 May 2026 02:00:00 GMT"], ids=["words", "-120", "past"]
    )
    def test_one_that_asks_for_no_wait_counts_as_absent(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, header: str
    ) -> None:
        receiver.answers = [answer(503, f"Retry-After: {header}")]
        pipeline.drain()
        assert tries(db) == [("retryable", 503, None)] * 3
        assert waits_for_its_backoff(db)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        status=st.sampled_from([429, 503]),
        seconds=st.integers(5, 86_400) | st.integers(5, 10**18),
        as_date=st.booleans(),
        drains=st.integers(0, 20),
    )
    @example(status=429, seconds=21_600, as_date=False, drains=0)
    @example(status=503, seconds=21_601, as_date=True, drains=0)
    @example(status=503, seconds=10**60, as_date=False, drains=0)
    def test_the_next_try_is_never_sooner_than_asked_and_never_later_than_six_hours(  # noqa: PLR0913 - fixtures and a parameter
        self,
        pipeline: Pipeline,
        receiver: Receiver,
        db: Engine,
        *,
        status: int,
        seconds: int,
        as_date: bool,
        drains: int,
    ) -> None:
        put_back(db, drains)
        asked = timedelta(seconds=min(seconds, 200 * 365 * 86_400))
        date: datetime = one(db, "SELECT now()").astimezone(UTC) + asked
        header = format_datetime(date, usegmt=True) if as_date else str(seconds)
        receiver.requests.clear()
        receiver.answers = [answer(status, f"Retry-After: {header}")]
        pipeline.drain()
        row = outbox_row(db)
        (attempt,) = attempts(db)
        assert (row["state"], attempt["http_status"]) == ("pending", status)
        assert len(receiver.requests) == 1
        end = attempt["finished_at"]
        if as_date:
            asked = date.replace(microsecond=0) - end
        assert end + min(asked, SIX_HOURS) <= row["not_before"] <= end + SIX_HOURS
        assert row["not_before"] <= end + asked + timedelta(seconds=1)
        assert max(row["not_before"], end + timedelta(minutes=1)) <= row["next_attempt_at"]
        assert row["next_attempt_at"] <= max(row["not_before"], end + timedelta(hours=1))


def put_back(db: Engine, drains: int) -> None:
    """Make the row pending as before its first attempt, but with a number of drains."""
    run(db, "DELETE FROM telemetry_attempt")
    run(
        db,
        "UPDATE telemetry_outbox SET attempts = 0, drains = :drains, next_attempt_at = now(),"
        " not_before = NULL",
        drains=drains,
    )
