"""The tables of telemetry refuse invalid rows from every writer."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from app import database
from app.models import FINAL, STATES
from migrations import migrate
from tests.conftest import Databases
from tests.support.database import CONSENTOS_0005, run

ROW_ID = "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"
MOMENT = "2026-05-02T02:30:00Z"
LEASE = {"lease_token": ROW_ID, "lease_until": MOMENT}
FINISHED = {"finished_at": MOMENT}
BODY = '{"b" : 1,  "a":\t2, "a": "\\u0000"}'

ROW: dict[str, object] = {
    "id": ROW_ID,
    "day": "2026-05-02",
    "instance_id": ROW_ID,
    "payload": BODY,
    "created_at": MOMENT,
    "next_attempt_at": MOMENT,
    "expires_at": MOMENT,
}
ATTEMPT: dict[str, object] = {
    "outbox_id": ROW_ID,
    "n": 1,
    "started_at": MOMENT,
    "endpoint": "https://collector.invalid/",
}


@pytest.fixture(scope="module")
def migrated(databases: Databases) -> Iterator[Engine]:
    with databases.copy_of("template1") as url:
        engine = database.engine(url)
        run(engine, CONSENTOS_0005)
        with engine.connect() as connection:
            migrate(connection, "telemetry")
        yield engine


@pytest.fixture
def connection(migrated: Engine) -> Iterator[Connection]:
    """A connection to empty tables, whose transaction is rolled back."""
    with migrated.connect() as connection:
        yield connection


def insert(connection: Connection, table: str, row: dict[str, object]) -> None:
    values = ", ".join(f":{column}" for column in row)
    statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"
    connection.execute(text(statement), row)


def refusal(connection: Connection, table: str, row: dict[str, object]) -> str:
    """Return the name of the constraint that refuses a row."""
    with pytest.raises(IntegrityError) as refused:
        insert(connection, table, row)
    error: Any = refused.value.orig
    return str(error.diag.constraint_name or error.diag.column_name)


class TestTheOutbox:
    @pytest.mark.parametrize(
        ("row", "constraint"),
        [
            pytest.param({"state": "lost"}, "state", id="an unknown state"),
            pytest.param({"state": ""}, "state", id="an empty state"),
            pytest.param({"state": "sending"}, "leased", id="sending without a lease"),
            pytest.param(
                {"state": "sending", "lease_token": ROW_ID}, "leased", id="a lease without an end"
            ),
            pytest.param(
                {"state": "sending", "lease_until": MOMENT}, "leased", id="a lease without a token"
            ),
            pytest.param({"state": "pending", **LEASE}, "leased", id="pending and leased"),
            pytest.param(
                {"state": "pending", "lease_until": MOMENT}, "leased", id="pending, half a lease"
            ),
            pytest.param(
                {"state": "sending", **LEASE, **FINISHED}, "finished", id="sending and finished"
            ),
            pytest.param({"state": "pending", **FINISHED}, "finished", id="pending and finished"),
            pytest.param({"drains": -1}, "counted", id="less than no drain"),
            pytest.param({"attempts": -1}, "counted", id="less than no attempt"),
            *(
                pytest.param({"state": state}, "finished", id=f"{state} at no time")
                for state in FINAL
            ),
            *(
                pytest.param({"state": state, **FINISHED, **LEASE}, "leased", id=f"{state}, leased")
                for state in FINAL
            ),
        ],
    )
    def test_a_half_set_state_cannot_be_stored(
        self, connection: Connection, row: dict[str, object], constraint: str
    ) -> None:
        broken = refusal(connection, "telemetry_outbox", {**ROW, **row})
        assert broken == f"telemetry_outbox_{constraint}"

    @pytest.mark.parametrize("state", STATES)
    def test_every_state_of_the_models_can_be_stored_whole(
        self, connection: Connection, state: str
    ) -> None:
        whole = FINISHED if state in FINAL else LEASE if state == "sending" else {}
        insert(connection, "telemetry_outbox", {**ROW, "state": state, **whole})

    def test_a_row_begins_pending_and_untried(self, connection: Connection) -> None:
        insert(connection, "telemetry_outbox", ROW)
        begun = connection.execute(text("SELECT state, drains, attempts FROM telemetry_outbox"))
        assert tuple(begun.one()) == ("pending", 0, 0)

    @pytest.mark.parametrize("column", ROW)
    def test_no_required_column_may_be_null(self, connection: Connection, column: str) -> None:
        assert refusal(connection, "telemetry_outbox", {**ROW, column: None}) == column

    def test_a_day_has_one_row(self, connection: Connection) -> None:
        insert(connection, "telemetry_outbox", ROW)
        again = {**ROW, "id": uuid4(), "state": "sent", **FINISHED}
        assert refusal(connection, "telemetry_outbox", again) == "telemetry_outbox_day_key"

    def test_the_payload_is_kept_as_the_text_it_is(self, connection: Connection) -> None:
        insert(connection, "telemetry_outbox", ROW)
        assert connection.scalar(text("SELECT payload::text FROM telemetry_outbox")) == BODY

    @pytest.mark.parametrize(("index", "state"), [("pending", "pending"), ("sending", "sending")])
    def test_what_waits_and_what_is_sent_has_a_partial_index(
        self, connection: Connection, index: str, state: str
    ) -> None:
        defined = connection.scalar(
            text("SELECT indexdef FROM pg_indexes WHERE indexname = :name"),
            {"name": f"telemetry_outbox_{index}"},
        )
        assert f"WHERE (state = '{state}'::text)" in str(defined)


class TestTheFrozenRow:
    @pytest.mark.parametrize(
        "change",
        [
            "day = day + 1",
            "day = day - 1, state = 'sent', finished_at = now()",
            "instance_id = gen_random_uuid()",
            "id = gen_random_uuid()",
            "payload = '{}'",
            "payload = (payload::text || ' ')::json",
            "payload = replace(payload::text, chr(9), ' ')::json",
            """payload = '{"b" : 1,  "a": "\\u0000"}'""",
        ],
    )
    def test_day_instance_and_payload_never_change(
        self, connection: Connection, change: str
    ) -> None:
        insert(connection, "telemetry_outbox", ROW)
        with pytest.raises(IntegrityError, match="never change"):
            connection.exec_driver_sql(f"UPDATE telemetry_outbox SET {change}")

    @pytest.mark.parametrize(
        "change",
        [
            f"state = 'sending', lease_token = '{ROW_ID}', lease_until = now(), drains = 1",
            "state = 'sent', finished_at = now()",
            "state = 'discarded', finished_at = now()",
            "next_attempt_at = now(), not_before = now(), attempts = 3, last_error = 'dns'",
            "payload = payload, day = day, instance_id = instance_id",
        ],
    )
    def test_its_state_does(self, connection: Connection, change: str) -> None:
        insert(connection, "telemetry_outbox", ROW)
        changed = connection.exec_driver_sql(f"UPDATE telemetry_outbox SET {change}")
        assert changed.rowcount == 1
        assert connection.scalar(text("SELECT payload::text FROM telemetry_outbox")) == BODY


class TestTheAttempts:
    @pytest.mark.parametrize(
        ("row", "constraint"),
        [
            pytest.param({"outcome": "sent"}, "finished", id="an outcome at no time"),
            pytest.param({"finished_at": MOMENT}, "finished", id="an end without an outcome"),
            pytest.param(
                {"outcome": "lost", "finished_at": MOMENT}, "outcome_check", id="no outcome of ours"
            ),
            pytest.param({"n": 0}, "n_check", id="a number below one"),
            pytest.param({"outbox_id": str(uuid4())}, "outbox_id_fkey", id="of no row"),
        ],
    )
    def test_a_half_recorded_attempt_cannot_be_stored(
        self, connection: Connection, row: dict[str, object], constraint: str
    ) -> None:
        insert(connection, "telemetry_outbox", ROW)
        broken = refusal(connection, "telemetry_attempt", {**ATTEMPT, **row})
        assert broken == f"telemetry_attempt_{constraint}"

    @pytest.mark.parametrize("outcome", ["sent", "retryable", "rejected", None])
    def test_every_outcome_can_be_stored(self, connection: Connection, outcome: str | None) -> None:
        insert(connection, "telemetry_outbox", ROW)
        ended = {"outcome": outcome, "finished_at": MOMENT} if outcome else {}
        insert(connection, "telemetry_attempt", {**ATTEMPT, **ended})

    def test_a_number_is_given_once_a_row(self, connection: Connection) -> None:
        insert(connection, "telemetry_outbox", ROW)
        insert(connection, "telemetry_attempt", ATTEMPT)
        broken = refusal(connection, "telemetry_attempt", ATTEMPT)
        assert broken == "telemetry_attempt_pkey"

    def test_they_go_with_their_row(self, connection: Connection) -> None:
        other = {**ROW, "id": uuid4(), "day": "2026-05-03"}
        insert(connection, "telemetry_outbox", ROW)
        insert(connection, "telemetry_outbox", other)
        for n in (1, 2):
            insert(connection, "telemetry_attempt", {**ATTEMPT, "n": n})
        insert(connection, "telemetry_attempt", {**ATTEMPT, "outbox_id": other["id"]})
        connection.execute(text("DELETE FROM telemetry_outbox WHERE id = :id"), {"id": ROW_ID})
        left = connection.scalars(text("SELECT outbox_id FROM telemetry_attempt")).all()
        assert left == [other["id"]]
