"""The audit shows what was sent: the bytes, the attempts, and the state of the row."""

import logging
import re
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app import database
from app.outbox import claim
from app.payload import SCHEMA_VERSION
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import attempts, count, give_notice, one, outbox_row, run
from tests.support.ports import free_port
from tests.support.receiver import Receiver, answer
from tests.support.steps import eventually

DAY_BEGINS = "2026-05-02T02:30:00Z"


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """Every test begins at half past two, with the day's heartbeat written."""
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "telemetry")
    return caplog


def lines(logged: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [
        r.getMessage() for r in logged.records if r.getMessage().startswith(f"telemetry.{event}")
    ]


class TestDelivered:
    def test_row_request_and_log_hold_the_same_bytes(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, logged: pytest.LogCaptureFixture
    ) -> None:
        stored = outbox_row(db)["payload"]
        pipeline.drain()
        (request,) = receiver.requests
        assert request.body == stored.encode()
        assert lines(logged, "payload") == [f"telemetry.payload {stored}"]
        assert outbox_row(db)["payload"] == stored

    def test_nothing_but_the_listed_headers_is_sent(
        self, pipeline: Pipeline, receiver: Receiver
    ) -> None:
        pipeline.drain()
        (request,) = receiver.requests
        assert request.head.startswith(b"POST /v1/heartbeat HTTP/1.1\r\n")
        assert request.headers == {
            "host": f"127.0.0.1:{receiver.port}",
            "content-type": "application/json",
            "content-length": str(len(request.body)),
            "user-agent": f"consentos-telemetry/{SCHEMA_VERSION}",
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "close",
        }

    def test_the_row_is_sent_and_the_instance_stamped(self, pipeline: Pipeline, db: Engine) -> None:
        pipeline.drain()
        row = outbox_row(db)
        assert (row["state"], row["drains"], row["attempts"]) == ("sent", 1, 1)
        assert (row["lease_token"], row["lease_until"], row["last_error"]) == (None, None, None)
        assert one(db, "SELECT last_telemetry_at FROM instance") == attempts(db)[0]["started_at"]

    def test_a_locked_instance_is_not_stamped_and_nothing_is_sent_again(
        self,
        pipeline: Pipeline,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        database_url: str,
        logged: pytest.LogCaptureFixture,
    ) -> None:
        with database.engine(database_url).connect() as operator:
            operator.execute(text("DELETE FROM instance"))  # and does not commit
            pipeline.drain()
            clock("2026-05-02T04:00:00Z")
            pipeline.sweep()
            pipeline.drain()
        assert (outbox_row(db)["state"], len(receiver.requests)) == ("sent", 1)
        assert lines(logged, "failed stage=stamp")

    def test_an_answer_after_the_end_of_its_day_does_not_block_the_next_day(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver
    ) -> None:
        clock("2026-05-03T02:29:58Z")
        receiver.during = lambda: clock("2026-05-03T02:30:04Z")
        pipeline.drain()
        assert pipeline.write_heartbeat()

    def test_the_attempt_is_on_record_before_the_first_byte_leaves(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        seen: list[dict[str, Any]] = []
        receiver.during = lambda: seen.extend(attempts(db))
        pipeline.drain()
        (before,) = seen
        assert (before["n"], before["outcome"], before["finished_at"]) == (1, None, None)
        (after,) = attempts(db)
        assert (after["n"], after["outcome"], after["http_status"]) == (1, "sent", 202)
        assert after["endpoint"] == receiver.url

    def test_no_transaction_is_open_during_the_post(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        sessions: list[int] = []
        ours = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )

        def look() -> None:
            with suppress(AssertionError):  # a session takes a moment to leave
                eventually(lambda: one(db, ours) == 0, seconds=2)
            sessions.append(one(db, ours))

        receiver.during = look
        pipeline.drain()
        assert sessions == [0]

    def test_it_is_sent_once(self, pipeline: Pipeline, receiver: Receiver) -> None:
        for _ in range(3):
            pipeline.drain()
        assert len(receiver.requests) == 1

    @pytest.mark.parametrize("status", [200, 201, 202, 204])
    def test_every_2xx_status_counts_as_sent(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, status: int
    ) -> None:
        receiver.answers = [answer(status)]
        pipeline.drain()
        assert outbox_row(db)["state"] == "sent"


class TestRetried:
    def test_a_drain_makes_three_tries_each_on_record_with_the_same_bytes(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, logged: pytest.LogCaptureFixture
    ) -> None:
        receiver.answers = [answer(503)]
        pipeline.drain()
        assert len({request.body for request in receiver.requests}) == 1
        assert [(a["n"], a["outcome"], a["http_status"]) for a in attempts(db)] == [
            (1, "retryable", 503),
            (2, "retryable", 503),
            (3, "retryable", 503),
        ]
        assert len(lines(logged, "attempt")) == 3
        assert lines(logged, "payload") == []

    def test_then_the_row_waits_in_the_table(
        self, pipeline: Pipeline, db: Engine, receiver: Receiver
    ) -> None:
        receiver.answers = [answer(500)]
        pipeline.drain()
        row = outbox_row(db)
        assert (row["state"], row["drains"], row["last_error"]) == ("pending", 1, "HTTP 500")
        waits = row["next_attempt_at"] - attempts(db)[-1]["finished_at"]
        assert timedelta(minutes=1) <= waits <= timedelta(minutes=1.25)
        pipeline.drain()
        assert len(receiver.requests) == 3

    def test_a_later_drain_delivers_what_an_earlier_one_could_not(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503), answer(503), answer(503), answer(202)]
        pipeline.drain()
        clock("2026-05-02T02:32:00Z")
        pipeline.drain()
        row = outbox_row(db)
        assert (row["state"], row["drains"], row["attempts"]) == ("sent", 2, 4)
        assert len({request.body for request in receiver.requests}) == 1

    def test_a_try_that_succeeds_ends_the_drain(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503), answer(202)]
        pipeline.drain()
        assert [a["outcome"] for a in attempts(db)] == ["retryable", "sent"]

    def test_a_long_retry_after_ends_the_drain_and_is_kept(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(429, "Retry-After: 7200")]
        pipeline.drain()
        row = outbox_row(db)
        (attempt,) = attempts(db)
        assert row["not_before"] - attempt["finished_at"] == timedelta(hours=2)
        assert row["next_attempt_at"] == row["not_before"]

    def test_a_port_without_a_listener_is_recorded_as_refused(
        self, db: Engine, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
    ) -> None:
        port = free_port()
        monkeypatch.setenv("TELEMETRY_ENDPOINT", f"http://127.0.0.1:{port}/?token=secret")
        Pipeline(Settings.load()).drain()
        assert [(a["outcome"], a["http_status"], a["error"]) for a in attempts(db)] == [
            ("retryable", None, "refused")
        ] * 3
        assert "secret" not in logged.text
        assert "secret" not in str(attempts(db))


class TestRejected:
    @pytest.mark.parametrize("status", [301, 302, 307, 400, 404, 410, 413, 422])
    def test_a_refusal_is_final_and_tried_once(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, status: int
    ) -> None:
        receiver.answers = [answer(status, "Location: http://127.0.0.1:1/", "Set-Cookie: a=b")]
        pipeline.drain()
        row = outbox_row(db)
        assert (row["state"], row["last_error"]) == ("rejected", f"HTTP {status}")
        assert len(receiver.requests) == receiver.connections == 1
        assert one(db, "SELECT last_telemetry_at FROM instance") is None


class TestTheLease:
    def test_a_process_that_has_lost_it_changes_only_its_attempt(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, logged: pytest.LogCaptureFixture
    ) -> None:
        other = "11111111-1111-1111-1111-111111111111"
        receiver.during = lambda: run(db, "UPDATE telemetry_outbox SET lease_token = :t", t=other)
        pipeline.drain()
        row = outbox_row(db)
        assert (row["state"], str(row["lease_token"])) == ("sending", other)
        assert attempts(db)[0]["outcome"] == "sent"
        assert len(lines(logged, "lease_lost")) == 1

    def test_a_try_does_not_follow_when_it_has_lapsed_in_between(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503)]
        receiver.during = lambda: clock("2026-05-02T02:31:00Z")
        pipeline.drain()
        assert len(receiver.requests) == 1
        assert outbox_row(db)["state"] == "pending"

    def test_it_outlasts_the_deadline_of_the_post_by_half_a_minute(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        leases: list[timedelta] = []
        rest = "SELECT lease_until - started_at FROM telemetry_outbox, telemetry_attempt"
        receiver.during = lambda: leases.append(one(db, rest))
        pipeline.drain()
        assert leases == [timedelta(seconds=35)]

    def test_one_that_lapsed_is_taken_back_and_the_same_bytes_go_out(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        with db.begin() as connection:
            taken = claim(connection, timedelta(seconds=35))
        assert taken
        pipeline.sweep()
        assert outbox_row(db)["state"] == "sending"
        clock("2026-05-02T02:31:00Z")
        pipeline.sweep()
        assert outbox_row(db)["state"] == "pending"
        clock("2026-05-02T02:33:00Z")
        pipeline.drain()
        assert [request.body.decode() for request in receiver.requests] == [taken.body]
        assert outbox_row(db)["drains"] == 2


class TestNeverAgain:
    def test_nothing_leaves_after_its_day(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        clock("2026-05-03T02:30:00Z")
        pipeline.drain()
        assert receiver.connections == 0
        pipeline.sweep()
        assert outbox_row(db)["state"] == "expired"

    def test_a_try_does_not_follow_when_the_day_ends_in_between(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503)]
        receiver.during = lambda: run(db, "UPDATE telemetry_outbox SET expires_at = now()")
        pipeline.drain()
        assert len(receiver.requests) == 1
        pipeline.sweep()
        assert outbox_row(db)["state"] == "expired"

    def test_a_try_does_not_follow_when_the_instance_is_wiped_in_between(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503)]
        receiver.during = lambda: run(db, "DELETE FROM instance")
        pipeline.drain()
        assert len(receiver.requests) == 1
        pipeline.sweep()
        row = outbox_row(db)
        assert row["state"] == "discarded"
        pipeline.drain()
        assert len(receiver.requests) == 1

    def test_what_was_pending_under_a_wiped_id_never_leaves(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        old = outbox_row(db)["instance_id"]
        run(db, "DELETE FROM instance")
        pipeline.drain()
        assert receiver.connections == 0
        pipeline.sweep()
        assert not pipeline.write_heartbeat()
        clock("2026-05-03T02:30:00Z")
        assert pipeline.write_heartbeat()
        pipeline.drain()
        (request,) = receiver.requests
        assert str(old).encode() not in request.body


class TestPruned:
    def test_what_finished_longer_ago_than_the_retention_is_deleted_with_its_attempts(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        pipeline.drain()
        clock("2027-05-02T02:29:59Z")
        pipeline.prune()
        assert count(db, "telemetry_outbox") == 1
        clock("2027-05-02T02:31:00Z")
        pipeline.prune()
        assert count(db, "telemetry_outbox") == count(db, "telemetry_attempt") == 0

    def test_a_locked_row_is_deleted_later(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        pipeline.drain()
        clock("2027-05-02T02:31:00Z")
        with db.begin() as operator:
            operator.execute(text("SELECT FROM telemetry_outbox FOR UPDATE"))
            pipeline.prune()
        assert count(db, "telemetry_outbox") == 1
        pipeline.prune()
        assert count(db, "telemetry_outbox") == 0

    def test_a_retention_of_zero_deletes_nothing(
        self, pipeline: Pipeline, clock: Clock, db: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline.drain()
        monkeypatch.setenv("TELEMETRY_RETENTION_DAYS", "0")
        clock("2036-05-02T02:31:00Z")
        Pipeline(Settings.load()).prune()
        assert count(db, "telemetry_outbox") == 1


def test_every_attempt_line_has_the_words_that_operators_grep(
    pipeline: Pipeline, receiver: Receiver, logged: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [answer(503, "Retry-After: 120")]
    pipeline.drain()
    (line,) = lines(logged, "attempt")
    assert re.fullmatch(
        r"telemetry\.attempt id=[0-9a-f-]{36} n=1 outcome=retryable status=503 duration_ms=\d+"
        r" error=- next_attempt_at=2026-05-02T02:32:0\d\+00:00",
        line,
    )
