"""What happened on the wire is recorded although the database fails for a moment."""

from collections.abc import Callable
from datetime import timedelta
from threading import Thread

import pytest
from sqlalchemy import Engine, text

from app import report
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.database import attempts, one, outbox_row, run
from tests.receiver import Receiver, answer


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01')")
    clock("2026-05-02T02:30:00Z")
    assert pipeline.write_heartbeat()


def lock_for(db: Engine, seconds: float) -> Callable[[], None]:
    """Lock the outbox for a while, longer than a statement waits for a lock."""

    def hold(started: Thread) -> None:
        with db.begin() as connection:
            connection.execute(text("LOCK TABLE telemetry_outbox IN ACCESS EXCLUSIVE MODE"))
            locked.append(started)
            connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})

    locked: list[Thread] = []

    def lock() -> None:
        thread = Thread(target=lambda: hold(thread))
        thread.start()
        while not locked:
            thread.join(0.01)

    return lock


def test_a_retry_after_is_kept_although_the_row_was_locked_when_it_came(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.answers = [answer(429, "Retry-After: 7200")]
    receiver.during = lock_for(db, 2.5)
    pipeline.drain()
    (attempt,) = attempts(db)
    assert (attempt["outcome"], attempt["http_status"]) == ("retryable", 429)
    assert outbox_row(db)["not_before"] >= attempt["finished_at"] + timedelta(hours=2)


def test_a_delivery_is_settled_although_every_session_was_ended_meanwhile(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.during = lambda: one(
        db,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    pipeline.drain()
    assert outbox_row(db)["state"] == "sent"
    assert len(receiver.requests) == 1


def test_a_row_that_is_deleted_during_its_post_is_not_written_anew(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.during = lambda: run(db, "DELETE FROM telemetry_outbox")
    pipeline.drain()
    assert one(db, "SELECT last_telemetry_at FROM instance") is not None
    assert not pipeline.write_heartbeat()
    pipeline.drain()
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(("name", "value"), [("timezone", "Asia/Tokyo"), ("datestyle", "SQL, DMY")])
def test_the_databases_own_habits_with_times_change_nothing(
    pipeline: Pipeline, receiver: Receiver, db: Engine, name: str, value: str
) -> None:
    database = one(db, "SELECT current_database()")
    run(db, f"ALTER DATABASE \"{database}\" SET {name} = '{value}'")
    pipeline.drain()
    shown = report.status(pipeline)
    assert shown.last_success
    assert shown.last_success.isoformat().startswith("2026-05-02T02:30:0")
    assert shown.next_send
    assert shown.next_send.isoformat() == "2026-05-03T02:30:00+00:00"
    assert len(receiver.requests) == 1


def test_what_keeps_a_heartbeat_from_being_written_is_shown(
    environment: dict[str, str], clock: Clock, db: Engine
) -> None:
    assert environment
    clock("2026-05-03T09:00:00Z")
    run(db, "ALTER TABLE scan_jobs RENAME TO moved")
    shown = report.status(Pipeline(Settings.load()))
    assert shown.overdue
    assert shown.cannot_write == 'relation "scan_jobs" does not exist'
