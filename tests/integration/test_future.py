"""A stored time in the future is reported and ignored, because a clock was ahead once."""

import logging

import pytest
from sqlalchemy import Engine

from app import outbox, report
from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import attempts, give_notice, one, outbox_row, run
from tests.support.receiver import Receiver, answer
from tests.support.steps import days

INSTANCE = (
    "INSERT INTO instance VALUES (gen_random_uuid(), '2026-01-01', '2026-01-01',"
    " CAST(:at AS timestamptz))"
)
BEFORE, NEXT_YEAR = "2026-05-01T12:00Z", "2027-05-02T02:30Z"
NOT_BELIEVED = "is 2027-05-02 02:30 UTC, which is in the future, and is ignored"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture, clock: Clock) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "telemetry")
    clock("2026-05-02T09:00:00Z")
    return caplog


def lines(logged: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [
        r.getMessage() for r in logged.records if r.getMessage().startswith(f"telemetry.{event}")
    ]


class TestAStampInTheFuture:
    @pytest.fixture(autouse=True)
    def stamped(self, db: Engine) -> None:
        give_notice(db, BEFORE)
        run(db, INSTANCE, at=NEXT_YEAR)

    def test_keeps_no_heartbeat_from_being_written_and_sent(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        assert pipeline.write_heartbeat()
        pipeline.drain()
        assert len(receiver.requests) == 1
        assert outbox_row(db)["state"] == "sent"

    def test_is_replaced_by_the_next_send(self, pipeline: Pipeline, db: Engine) -> None:
        pipeline.write_heartbeat()
        pipeline.drain()
        assert one(db, "SELECT last_telemetry_at FROM instance") == attempts(db)[0]["started_at"]

    def test_is_warned_about_once_a_day(
        self, pipeline: Pipeline, clock: Clock, logged: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            pipeline.write_heartbeat()
        (warning,) = lines(logged, "warning")
        assert f"instance.last_telemetry_at {NOT_BELIEVED}" in warning
        clock("2026-05-03T09:00:00Z")
        pipeline.write_heartbeat()
        assert len(lines(logged, "warning")) == 2

    def test_is_shown_by_status_which_promises_nothing_by_it(
        self, environment: dict[str, str]
    ) -> None:
        ended = command(environment, "status", "--json", "--check")
        assert ended.code == 1  # due since half past two, and not written
        (warning,) = [each for each in ended.json["warnings"] if "in the future" in each]
        assert f"instance.last_telemetry_at {NOT_BELIEVED}" in warning
        assert ended.json["next_send"].startswith("2026-05-02T09:00")
        assert ended.json["last_success"] is None

    def test_is_not_carried_over_by_a_rotation(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        assert command(administered, "rotate", "--yes").code == 0
        assert one(db, "SELECT last_telemetry_at FROM instance") is None


class TestANoticeInTheFuture:
    @pytest.fixture(autouse=True)
    def noticed(self, db: Engine) -> None:
        give_notice(db, NEXT_YEAR)

    def test_is_given_again_and_counts_from_then_on(
        self, pipeline: Pipeline, clock: Clock, db: Engine, logged: pytest.LogCaptureFixture
    ) -> None:
        pipeline.sweep()
        pipeline.sweep()
        assert not pipeline.write_heartbeat()
        assert len(lines(logged, "notice")) == 1
        (warning,) = lines(logged, "warning")
        assert f"telemetry_notice.noticed_at {NOT_BELIEVED}" in warning
        assert one(db, "SELECT noticed_at = '2027-05-02T02:30Z' FROM telemetry_notice") is False
        clock("2026-05-03T02:30:00Z")
        assert pipeline.write_heartbeat()

    def test_is_shown_by_status_as_not_given(self, environment: dict[str, str]) -> None:
        shown = command(environment, "status", "--json").json
        assert shown["noticed_at"] is None
        assert [each for each in shown["warnings"] if NOT_BELIEVED in each]


class TestARowOfTheFuture:
    """The clock was ahead when it was written, claimed, or to be tried again."""

    @pytest.fixture(autouse=True)
    def noticed(self, db: Engine) -> None:
        give_notice(db, BEFORE)

    def test_of_a_later_day_is_discarded_and_today_has_its_own(
        self, pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver
    ) -> None:
        clock("2026-05-12T09:00:00Z")
        pipeline.write_heartbeat()
        clock("2026-05-02T09:00:00Z")
        pipeline.sweep()
        assert pipeline.write_heartbeat()
        pipeline.drain()
        assert days(db) == {"2026-05-02": "sent"}
        (request,) = receiver.requests
        assert b"2026-05-02T09:00" in request.body

    def test_that_was_discarded_unsent_does_not_use_up_its_day(
        self,
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        receiver: Receiver,
        logged: pytest.LogCaptureFixture,
    ) -> None:
        clock("2026-05-05T09:00:00Z")
        pipeline.write_heartbeat()
        clock("2026-05-02T09:00:00Z")
        pipeline.sweep()
        assert "its day is in the future" in lines(logged, "discarded")[0]
        clock("2026-05-05T02:30:01Z")
        assert pipeline.write_heartbeat()
        pipeline.drain()
        assert days(db) == {"2026-05-05": "sent"}
        assert b"2026-05-05T02:30" in receiver.requests[0].body

    def test_that_was_tried_stays_on_record_and_never_leaves_again(
        self, pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver
    ) -> None:
        receiver.answers = [answer(503)]
        clock("2026-05-12T09:00:00Z")
        pipeline.write_heartbeat()
        pipeline.drain()
        asked = len(receiver.requests)
        clock("2026-05-02T09:00:00Z")
        pipeline.sweep()
        pipeline.drain()
        assert days(db) == {"2026-05-12": "discarded"}
        assert len(receiver.requests) == asked

    def test_counts_neither_as_the_last_error_nor_as_the_last_sent(
        self, pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver
    ) -> None:
        receiver.answers = [answer(400), answer(202)]
        clock("2026-05-12T09:00:00Z")
        pipeline.write_heartbeat()
        pipeline.drain()
        clock("2026-05-13T09:00:00Z")
        pipeline.write_heartbeat()
        pipeline.drain()
        assert days(db) == {"2026-05-12": "rejected", "2026-05-13": "sent"}
        clock("2026-05-02T09:00:00Z")
        shown = report.status(pipeline)
        assert shown.last_error is None
        assert shown.last_success is None
        with pipeline.transaction() as connection:
            assert outbox.last_sent(connection) is None

    def test_of_the_day_that_another_server_has_just_begun_is_left_alone(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-03T02:30:01Z")
        pipeline.write_heartbeat()
        clock("2026-05-03T02:29:50Z")
        pipeline.sweep()
        assert days(db) == {"2026-05-03": "pending"}

    @pytest.mark.parametrize("column", ["next_attempt_at", "not_before"])
    def test_whose_next_try_lies_beyond_every_wait_is_due_now(
        self, pipeline: Pipeline, db: Engine, receiver: Receiver, column: str
    ) -> None:
        pipeline.write_heartbeat()
        run(db, f"UPDATE telemetry_outbox SET {column} = now() + interval '7 hours 1 minute'")
        assert pipeline.sweep()
        pipeline.send() if column == "not_before" else pipeline.drain()
        assert len(receiver.requests) == 1
        assert outbox_row(db)["state"] == "sent"

    def test_whose_next_try_a_receiver_has_put_off_for_hours_is_not_due(
        self, pipeline: Pipeline, db: Engine, receiver: Receiver
    ) -> None:
        pipeline.write_heartbeat()
        later = "now() + interval '6 hours'"
        run(db, f"UPDATE telemetry_outbox SET next_attempt_at = {later}, not_before = {later}")
        assert not pipeline.sweep()
        pipeline.drain()
        pipeline.send()
        assert receiver.connections == 0

    def test_whose_lease_ends_beyond_every_lease_is_taken_back(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        pipeline.write_heartbeat()
        run(
            db,
            "UPDATE telemetry_outbox SET state = 'sending', lease_token = id,"
            " lease_until = now() + interval '11 minutes'",
        )
        pipeline.sweep()
        assert outbox_row(db)["state"] == "pending"

    def test_whose_lease_runs_is_left_to_its_holder(self, pipeline: Pipeline, db: Engine) -> None:
        pipeline.write_heartbeat()
        run(
            db,
            "UPDATE telemetry_outbox SET state = 'sending', lease_token = id,"
            " lease_until = now() + interval '91 seconds'",
        )
        pipeline.sweep()
        assert outbox_row(db)["state"] == "sending"
