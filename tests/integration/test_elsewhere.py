"""A heartbeat that ConsentOS's own task has sent is not sent a second time."""

import logging

import pytest
from sqlalchemy import Engine

from app import outbox
from app.delivery import RECORD_LOST, SENT_ELSEWHERE, lease
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import attempts, count, give_notice, one, outbox_row, run
from tests.support.receiver import Receiver, answer

STAMP = "UPDATE instance SET last_telemetry_at = CAST(:at AS timestamptz)"


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """Every test begins at half past two, with the day's heartbeat written."""
    give_notice(db, "2026-05-01")
    clock("2026-05-02T02:30:01Z")
    assert pipeline.write_heartbeat()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "telemetry")
    return caplog


def warnings(logged: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in logged.records if "telemetry.warning" in r.getMessage()]


def test_no_attempt_begins_once_another_program_has_sent_the_day(
    pipeline: Pipeline, receiver: Receiver, db: Engine, logged: pytest.LogCaptureFixture
) -> None:
    run(db, STAMP, at="2026-05-02T02:30:02Z")
    pipeline.drain()
    assert receiver.connections == 0
    assert attempts(db) == []
    row = outbox_row(db)
    assert (row["state"], row["attempts"], row["lease_token"]) == ("discarded", 0, None)
    discarded = f'telemetry.discarded id={row["id"]} day=2026-05-02 reason="sent elsewhere"'
    assert discarded in [r.getMessage() for r in logged.records]
    for _ in range(3):
        pipeline.sweep()
        assert not pipeline.write_heartbeat()
        pipeline.drain()
    assert warnings(logged) == [
        f'telemetry.warning reason="{SENT_ELSEWHERE}" day=2026-05-02',
    ]


def test_no_further_try_begins_once_another_program_has_sent_the_day(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.answers = [answer(503)]
    receiver.during = lambda: run(db, STAMP, at="2026-05-02T02:30:02Z")
    pipeline.drain()
    assert len(receiver.requests) == 1
    assert [each["outcome"] for each in attempts(db)] == ["retryable"]
    assert outbox_row(db)["state"] == "discarded"


@pytest.mark.parametrize("at", ["2026-05-02T02:29:59Z", "2026-05-02T02:40:00Z"])
def test_a_send_of_yesterday_or_of_the_future_does_not_count_as_todays(
    pipeline: Pipeline, receiver: Receiver, db: Engine, at: str
) -> None:
    run(db, STAMP, at=at)
    pipeline.drain()
    assert len(receiver.requests) == 1
    assert outbox_row(db)["state"] == "sent"


def test_the_clock_of_consentos_may_be_ahead_by_minutes(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    run(db, STAMP, at="2026-05-02T02:34:00Z")
    pipeline.drain()
    assert receiver.connections == 0
    assert outbox_row(db)["state"] == "discarded"


def test_the_stamp_of_a_second_instance_row_counts_as_well(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), '2026-05-02T02:30:02Z')")
    pipeline.drain()
    assert receiver.connections == 0
    assert outbox_row(db)["state"] == "discarded"


def test_an_explicit_send_does_not_send_what_another_program_has_sent(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    run(db, STAMP, at="2026-05-02T02:30:02Z")
    sent = pipeline.send()
    assert receiver.connections == 0
    assert sent.row is not None
    assert (sent.row["state"], sent.row["last_error"]) == ("discarded", "sent elsewhere")


def test_the_command_says_who_has_sent_it_as_a_later_call_does(
    environment: dict[str, str], db: Engine
) -> None:
    run(db, STAMP, at="2026-05-02T02:30:02Z")
    said = (
        "The heartbeat of 2026-05-02 was sent by another program: see instance.last_telemetry_at."
    )
    for _ in range(2):
        ended = command(environment, "send")
        assert ended.code == 0
        assert ended.out.splitlines()[-1] == said


@pytest.mark.parametrize("stamped", [True, False])
def test_what_was_sent_under_a_lease_that_was_lost_is_not_sent_again(
    pipeline: Pipeline, receiver: Receiver, db: Engine, clock: Clock, *, stamped: bool
) -> None:
    def lose_the_lease() -> None:
        run(db, "UPDATE telemetry_outbox SET lease_until = now() - interval '1 second'")
        pipeline.sweep()

    receiver.during = lose_the_lease
    pipeline.drain()
    assert outbox_row(db)["state"] == "pending"
    assert [each["outcome"] for each in attempts(db)] == ["sent"]
    receiver.during = lambda: None
    if not stamped:
        run(db, "UPDATE instance SET last_telemetry_at = NULL")
    clock("2026-05-02T02:40:00Z")
    pipeline.drain()
    assert len(receiver.requests) == 1
    row = outbox_row(db)
    assert (row["state"], row["attempts"], row["last_error"]) == ("sent", 1, None)


class TestAFailover:
    """The database loses committed changes during a POST."""

    def test_to_a_server_without_the_row_is_not_taken_for_another_sender(
        self,
        pipeline: Pipeline,
        receiver: Receiver,
        db: Engine,
        logged: pytest.LogCaptureFixture,
    ) -> None:
        receiver.during = lambda: run(db, "DELETE FROM telemetry_outbox")
        pipeline.drain()
        assert one(db, "SELECT last_telemetry_at FROM instance") is not None
        assert not pipeline.write_heartbeat()
        assert warnings(logged) == [f'telemetry.warning reason="{RECORD_LOST}" day=2026-05-02']
        assert count(db, "telemetry_outbox") == 0

    def test_to_a_server_with_the_row_as_it_was_before_is_not_taken_for_another_sender(
        self,
        pipeline: Pipeline,
        receiver: Receiver,
        db: Engine,
        logged: pytest.LogCaptureFixture,
    ) -> None:
        def fall_back() -> None:
            run(db, "DELETE FROM telemetry_attempt")
            run(
                db,
                "UPDATE telemetry_outbox SET state = 'pending', lease_token = NULL,"
                " lease_until = NULL, attempts = 0, drains = 0",
            )

        receiver.during = fall_back
        pipeline.drain()
        pipeline.drain()
        assert len(receiver.requests) == 1
        assert outbox_row(db)["state"] == "discarded"
        assert warnings(logged) == [f'telemetry.warning reason="{RECORD_LOST}" day=2026-05-02']

    def test_has_another_process_name_both_possible_causes(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine, logged: pytest.LogCaptureFixture
    ) -> None:
        receiver.during = lambda: run(db, "DELETE FROM telemetry_outbox")
        pipeline.drain()
        assert not Pipeline(Settings.load()).write_heartbeat()
        assert warnings(logged) == [f'telemetry.warning reason="{SENT_ELSEWHERE}" day=2026-05-02']


def test_a_claim_that_was_lost_is_not_discarded(db: Engine, pipeline: Pipeline) -> None:
    with pipeline.transaction() as connection:
        claim = outbox.claim(connection, lease(pipeline.settings))
    assert claim is not None
    run(db, "UPDATE telemetry_outbox SET lease_token = gen_random_uuid()")
    with pipeline.transaction() as connection:
        assert not outbox.discard(connection, claim, "sent elsewhere")
    assert outbox_row(db)["state"] == "sending"
