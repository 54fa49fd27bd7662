"""Which attempt, heartbeat and time an operator is shown as the last and the next."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app import outbox, report
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import give_notice, run, waiting_for_locks
from tests.support.receiver import Receiver, answer
from tests.support.steps import DAY_BEGINS, TODAY, TOMORROW, TOMORROW_BEGINS, eventually, locked

NINE = datetime(2026, 5, 2, 9, tzinfo=UTC)


@pytest.fixture(autouse=True)
def due(db: Engine, clock: Clock) -> None:
    """Half past two, and nothing written yet."""
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)


@pytest.fixture
def written(due: None, pipeline: Pipeline) -> Pipeline:  # noqa: ARG001 - as a fixture
    """The day's heartbeat waits to be sent."""
    assert pipeline.write_heartbeat()
    return pipeline


def fail(pipeline: Pipeline, receiver: Receiver, status: int) -> None:
    """Make one attempt, which fails with a status."""
    receiver.answers = [answer(status, "Retry-After: 7200")]
    pipeline.drain()


def forget_the_wait(db: Engine) -> None:
    run(db, "UPDATE telemetry_outbox SET next_attempt_at = now(), not_before = NULL")


class TestTheLastFailure:
    def test_is_the_latest_of_several(
        self, written: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        for status in (429, 500, 503):
            forget_the_wait(db)
            fail(written, receiver, status)
        shown = report.status(written).last_error
        assert shown
        assert (shown["n"], shown["http_status"]) == (3, 503)

    def test_is_not_an_attempt_that_is_on_its_way(
        self, written: Pipeline, receiver: Receiver
    ) -> None:
        shown: list[Any] = []
        operator = Pipeline(Settings.load())
        receiver.during = lambda: shown.append(report.status(operator).last_error)
        written.drain()
        assert shown == [None]

    def test_is_an_attempt_whose_process_died(
        self, written: Pipeline, clock: Clock, db: Engine
    ) -> None:
        lease = timedelta(seconds=35)
        with db.begin() as connection:
            claim = outbox.claim(connection, lease)
            assert claim
            outbox.begin(connection, claim, lease, endpoint="http://receiver/")
        clock(NINE.isoformat())
        written.sweep()
        shown = report.status(written).last_error
        assert shown
        assert (shown["n"], shown["outcome"]) == (1, None)


class TestTheLastSent:
    def test_is_the_latest_of_several_days(
        self, written: Pipeline, clock: Clock, db: Engine
    ) -> None:
        written.drain()
        clock(TOMORROW_BEGINS)
        assert written.write_heartbeat()
        written.drain()
        with db.begin() as connection:
            last = outbox.last_sent(connection)
        assert last
        assert str(last["day"]) == TOMORROW

    def test_is_not_one_that_waits(self, written: Pipeline, clock: Clock, db: Engine) -> None:
        written.drain()
        clock(TOMORROW_BEGINS)
        assert written.write_heartbeat()
        with db.begin() as connection:
            last = outbox.last_sent(connection)
        assert last
        assert str(last["day"]) == TODAY


class TestTheNextSend:
    def test_of_a_heartbeat_that_nobody_has_sent_for_hours_is_now(
        self, written: Pipeline, clock: Clock
    ) -> None:
        clock(NINE.isoformat())
        shown = report.status(written).next_send
        assert shown
        assert shown >= NINE

    def test_of_a_heartbeat_that_nobody_has_written_for_hours_is_now(
        self, pipeline: Pipeline, clock: Clock
    ) -> None:
        clock(NINE.isoformat())
        shown = report.status(pipeline).next_send
        assert shown
        assert shown >= NINE


class TestAnOperatorsSend:
    def test_of_a_heartbeat_that_waited_is_not_one_of_before(self, written: Pipeline) -> None:
        sent = written.send()
        assert sent.row
        assert (sent.row["state"], sent.sent_before) == ("sent", False)

    def test_of_a_heartbeat_that_was_sent_is_one_of_before(self, written: Pipeline) -> None:
        written.drain()
        assert written.send().sent_before

    def test_of_a_heartbeat_that_was_not_written_is_not_one_of_before(
        self, pipeline: Pipeline
    ) -> None:
        assert not pipeline.send().sent_before


def test_a_status_is_of_one_moment(written: Pipeline, db: Engine) -> None:
    """What was pending is settled while the status waits for a lock, after its first look."""
    settle = "UPDATE telemetry_outbox SET state = 'sent', finished_at = now()"
    with ThreadPoolExecutor(1) as beside:
        with locked(db, "telemetry_attempt") as connection:
            asked = beside.submit(report.status, written)
            eventually(lambda: waiting_for_locks(db) == 1, seconds=1)
            connection.execute(text(settle))
        shown = asked.result()
    assert [row["state"] for row in shown.pending] == ["pending"]
    assert shown.last_success is None
