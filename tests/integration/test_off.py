"""Off means off, as seen by the receiver, the database and the sockets."""

import pytest
from sqlalchemy import Engine, text

from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import count, give_notice, one, outbox_row, run
from tests.support.receiver import Receiver

SWITCHES = [
    {"TELEMETRY_ENABLED": "false"},
    {"TELEMETRY_ENABLED": "flase"},
    {"DO_NOT_TRACK": "1"},
    {"ENVIRONMENT": "development"},
    {"TELEMETRY_TIMEOUT_SECONDS": "soon"},
    {"TELEMETRY_ENDPIONT": "http://127.0.0.1:1/"},
]


@pytest.fixture(params=SWITCHES, ids=lambda switch: "=".join(*switch.items()))
def off(
    request: pytest.FixtureRequest, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    """A worker that was restarted with a switch off."""
    assert environment
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return Pipeline(Settings.load())


def test_a_new_install_that_is_off_leaves_no_trace_at_all(
    off: Pipeline, clock: Clock, db: Engine, receiver: Receiver
) -> None:
    clock("2026-05-02T02:30:00Z")
    assert not off.sweep()
    assert not off.write_heartbeat()
    off.drain()
    for table in ("instance", "telemetry_notice", "telemetry_outbox", "telemetry_attempt"):
        assert count(db, table) == 0
    assert receiver.connections == 0


def test_no_table_of_consentos_is_read(off: Pipeline, clock: Clock, db: Engine) -> None:
    clock("2026-05-02T02:30:00Z")
    hosts = (
        "SELECT string_agg(format('%I', tablename), ', ') FROM pg_tables"
        " WHERE schemaname = 'public' AND tablename NOT LIKE 'telemetry%'"
    )
    tables = one(db, hosts)
    assert "consent_records" in tables
    with db.begin() as connection:
        # Every read of a table now waits and fails.
        connection.execute(text(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE"))
        off.sweep()
        off.write_heartbeat()
        off.drain()


def test_what_was_pending_is_discarded_and_never_leaves(
    pipeline: Pipeline, off: Pipeline, clock: Clock, db: Engine, receiver: Receiver
) -> None:
    give_notice(db, "2026-05-01")
    clock("2026-05-02T02:30:00Z")
    pipeline.write_heartbeat()
    off.drain()
    off.sweep()
    assert outbox_row(db)["state"] == "discarded"
    pipeline.drain()
    assert receiver.connections == 0


def test_what_is_being_sent_is_discarded_when_its_lease_lapses(
    pipeline: Pipeline, off: Pipeline, clock: Clock, db: Engine
) -> None:
    give_notice(db, "2026-05-01")
    clock("2026-05-02T02:30:00Z")
    pipeline.write_heartbeat()
    run(
        db,
        "UPDATE telemetry_outbox SET state = 'sending', lease_token = gen_random_uuid(),"
        " lease_until = now() + interval '35 s'",
    )
    off.sweep()
    assert outbox_row(db)["state"] == "sending"
    clock("2026-05-02T02:31:00Z")
    off.sweep()
    assert outbox_row(db)["state"] == "discarded"


def test_on_again_the_next_days_heartbeat_goes_out(
    pipeline: Pipeline, off: Pipeline, clock: Clock, db: Engine, receiver: Receiver
) -> None:
    give_notice(db, "2026-05-01")
    clock("2026-05-02T02:30:00Z")
    pipeline.write_heartbeat()
    off.sweep()
    assert not pipeline.write_heartbeat()
    clock("2026-05-03T02:30:00Z")
    assert pipeline.write_heartbeat()
    pipeline.drain()
    assert len(receiver.requests) == 1


def test_an_explicit_send_is_refused_too(off: Pipeline, db: Engine, receiver: Receiver) -> None:
    with pytest.raises(PermissionError):
        off.send()
    assert count(db, "telemetry_outbox") == 0
    assert receiver.connections == 0
