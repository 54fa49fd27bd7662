"""``send`` writes the day's heartbeat and sends it now; it obeys the switch and the receiver."""

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import PASSWORD, command
from tests.support.database import count, give_notice, one, outbox_row, run
from tests.support.receiver import Receiver, answer

STATES = "SELECT array_agg(state ORDER BY day) FROM telemetry_outbox"


@pytest.fixture
def morning(clock: Clock) -> None:
    clock("2026-05-02T02:30:01Z")


@pytest.fixture
def waiting(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """The day's heartbeat is written; it is left to the tests what it waits for."""
    clock("2026-05-02T02:30:01Z")
    give_notice(db, "2026-01-01")
    assert pipeline.write_heartbeat()


@pytest.mark.usefixtures("morning")
def test_the_day_is_written_and_sent_at_once_and_only_once(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    late = {**environment, "TELEMETRY_SPREAD_SECONDS": "3600"}
    endpoint = f"{receiver.url}?token={PASSWORD}"
    first = command(late, "send", "--json", TELEMETRY_ENDPOINT=endpoint)
    assert first.code == 0
    row = outbox_row(db)
    assert (first.json["sent"], first.json["day"]) == (True, "2026-05-02")
    assert first.json["row"]["payload"] == row["payload"]
    assert first.err.count(f"telemetry.payload {row['payload']}\n") == 1
    assert "has been sent (now, " in first.json["said"]
    again = command(late, "send")
    assert again.code == 0
    assert "has been sent (before, " in again.out
    assert [each.body.decode() for each in receiver.requests] == [row["payload"]]
    assert receiver.connections == 1
    assert row["state"] == "sent"
    assert count(db, "telemetry_notice") == 0


@pytest.mark.usefixtures("waiting")
def test_a_backoff_is_not_waited_for_and_the_log_shows_what_leaves(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    run(db, "UPDATE telemetry_outbox SET next_attempt_at = now() + interval '5 h', drains = 7")
    sent = command(environment, "send")
    assert (sent.code, sent.err) == (0, "")
    row = outbox_row(db)
    assert sent.out.splitlines()[0] == f"telemetry.payload {row['payload']}"
    assert "telemetry.attempt" in sent.out
    assert row["state"] == "sent"
    assert receiver.connections == 1


@pytest.mark.usefixtures("morning")
def test_a_refusal_is_final_for_the_day(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    receiver.answers = [answer(400), answer(202)]
    refused = command(environment, "send")
    assert refused.code == 1
    assert "it is rejected (HTTP 400), so that day gets no other heartbeat" in refused.out
    again = command(environment, "send", "--json")
    assert (again.code, again.json["sent"]) == (1, False)
    assert receiver.connections == 1
    assert one(db, STATES) == ["rejected"]


@pytest.mark.usefixtures("morning")
def test_a_receiver_is_not_asked_before_the_time_that_it_asked_for(
    environment: dict[str, str], clock: Clock, db: Engine, receiver: Receiver
) -> None:
    receiver.answers = [answer(429, "Retry-After: 3600"), answer(202)]
    refused = command(environment, "send")
    assert refused.code == 1
    assert "HTTP 429" in refused.out
    clock("2026-05-02T03:29:00Z")
    early = command(environment, "send")
    assert early.code == 1
    assert "the receiver asks for no attempt before 2026-05-02 03:30:" in early.out
    assert receiver.connections == 1
    clock("2026-05-02T03:31:00Z")
    assert command(environment, "send").code == 0
    assert receiver.connections == 2
    assert one(db, STATES) == ["sent"]


@pytest.mark.usefixtures("morning")
def test_nothing_happens_while_telemetry_is_off(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    off = command(environment, "send", ENVIRONMENT="local")
    assert (off.code, off.out) == (3, "")
    assert off.sentence == "Telemetry is off: ENVIRONMENT is empty or a development one."
    assert receiver.connections == 0
    for table in ("telemetry_outbox", "telemetry_notice", "telemetry_attempt", "instance"):
        assert count(db, table) == 0


@pytest.mark.usefixtures("morning")
def test_what_another_program_has_sent_is_not_sent_again(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    run(
        db,
        "INSERT INTO instance VALUES"
        " (gen_random_uuid(), '2026-01-01', now(), '2026-05-02T02:30:00Z')",
    )
    reported = command(environment, "send", "--json")
    assert (reported.code, reported.json["sent"], reported.json["row"]) == (0, True, None)
    assert "by another program" in reported.json["said"]
    assert receiver.connections == 0
    assert count(db, "telemetry_outbox") == 0


@pytest.mark.usefixtures("waiting")
def test_what_a_worker_is_sending_is_left_to_it(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    run(
        db,
        "UPDATE telemetry_outbox SET state = 'sending', drains = 1,"
        " lease_token = gen_random_uuid(), lease_until = now() + interval '40 s'",
    )
    reported = command(environment, "send")
    assert reported.code == 1
    assert "a worker is sending it right now" in reported.out
    assert receiver.connections == 0


@pytest.mark.usefixtures("waiting")
def test_yesterdays_heartbeat_expires_and_only_todays_is_sent(
    environment: dict[str, str], clock: Clock, db: Engine, receiver: Receiver
) -> None:
    clock("2026-05-03T02:30:00Z")
    assert command(environment, "send").code == 0
    assert one(db, STATES) == ["expired", "sent"]
    assert receiver.connections == 1


@pytest.mark.usefixtures("morning")
def test_what_cannot_be_counted_is_named_and_nothing_is_sent(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    run(db, "ALTER TABLE users DROP COLUMN deleted_at")
    reported = command(environment, "send")
    assert (reported.code, reported.out) == (1, "")
    assert 'column "deleted_at" does not exist' in reported.sentence
    assert receiver.connections == 0
    assert count(db, "telemetry_outbox") == 0
