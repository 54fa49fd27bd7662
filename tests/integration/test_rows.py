"""What a row says of itself: which is taken first, its last error, and when it ended."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from app import outbox
from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.database import give_notice, outbox_row, run
from tests.support.receiver import Receiver, answer
from tests.support.steps import DAY_BEGINS


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """The day's heartbeat waits to be sent."""
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()


@pytest.mark.parametrize("hours", [-1, 1])
def test_of_two_rows_that_are_due_the_one_that_was_due_first_is_taken(
    db: Engine, hours: int
) -> None:
    """The other row belongs to the day before, and was due an hour earlier or later."""
    run(
        db,
        "INSERT INTO telemetry_outbox"
        " (id, day, instance_id, payload, created_at, next_attempt_at, expires_at)"
        " SELECT gen_random_uuid(), day - 1, instance_id, payload, created_at,"
        " next_attempt_at - interval '5 h' + :hours * interval '1 h', expires_at"
        " FROM telemetry_outbox",
        hours=hours,
    )
    run(
        db,
        "UPDATE telemetry_outbox SET next_attempt_at = next_attempt_at - interval '5 h'"
        " WHERE day = '2026-05-02'",
    )
    with db.begin() as connection:
        claim = outbox.claim(connection, timedelta(seconds=35))
    assert claim
    assert str(claim.day) == ("2026-05-01" if hours < 0 else "2026-05-02")


def test_a_row_that_was_sent_has_no_last_error(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.answers = [answer(429, "Retry-After: 3600"), answer(202)]
    pipeline.drain()
    assert outbox_row(db)["last_error"] == "HTTP 429"
    run(db, "UPDATE telemetry_outbox SET next_attempt_at = now(), not_before = NULL")
    pipeline.drain()
    row = outbox_row(db)
    assert (row["state"], row["last_error"]) == ("sent", None)


def test_a_row_expires_at_the_time_of_the_sweep_that_ends_it(
    pipeline: Pipeline, clock: Clock, db: Engine
) -> None:
    clock("2026-05-03T09:00:00Z")
    pipeline.sweep()
    row = outbox_row(db)
    assert row["state"] == "expired"
    assert timedelta() <= row["finished_at"] - datetime(2026, 5, 3, 9, tzinfo=UTC) < _A_MINUTE


_A_MINUTE = timedelta(minutes=1)


def test_an_attempt_whose_outcome_cannot_be_recorded_is_logged(
    pipeline: Pipeline,
    receiver: Receiver,
    db: Engine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of several tries; the waits between the tries to record it are left out."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    receiver.answers = [answer(503), answer(202)]
    refuse = "CREATE RULE refuse AS ON UPDATE TO telemetry_attempt DO INSTEAD SELECT 1 / 0"
    run(db, refuse)
    with pytest.raises(DBAPIError):
        pipeline.drain()
    (line,) = [each for each in caplog.messages if each.startswith("telemetry.attempt ")]
    assert " n=1 outcome=retryable status=503 " in line
    assert len(receiver.requests) == 1
