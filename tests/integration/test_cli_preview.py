"""``preview`` prints what would leave, stores nothing and sends nothing."""

import json

import pytest
from sqlalchemy import Engine, inspect

from app.payload import Heartbeat
from app.pipeline import Pipeline
from tests.command import command
from tests.conftest import Clock
from tests.database import count, outbox_row, run
from tests.receiver import Receiver

NIL = "00000000-0000-0000-0000-000000000000"

# Whoever asks for the time in a transaction that could write gets an error instead.
READERS_CLOCK = """
CREATE OR REPLACE FUNCTION clock.now() RETURNS timestamptz STABLE LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_read_only') = 'off' THEN
        RAISE EXCEPTION 'this transaction could write';
    END IF;
    RETURN pg_catalog.now();
END
$$
"""


@pytest.fixture
def only_readers(clock: Clock, db: Engine) -> None:
    clock("2026-05-02T09:00:00Z")
    run(db, READERS_CLOCK)


def row_counts(db: Engine) -> dict[str, int]:
    return {table: count(db, table) for table in inspect(db).get_table_names(schema="public")}


@pytest.mark.usefixtures("only_readers")
def test_a_new_install_reads_one_valid_line_under_the_nil_id_and_nothing_is_stored(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    before = row_counts(db)
    shown = command(environment, "preview")
    assert shown.code == 0
    body = shown.out.removesuffix("\n")
    assert len(body.splitlines()) == 1
    heartbeat = Heartbeat.model_validate_json(body)
    assert heartbeat.canonical() == body
    assert heartbeat.instance_id == NIL
    (told,) = shown.err.splitlines()
    assert "nil UUID" in told
    assert row_counts(db) == before
    assert receiver.connections == 0


@pytest.mark.usefixtures("only_readers")
def test_it_works_while_telemetry_is_off_and_says_so_beside_the_body(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    known = "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"
    run(db, f"INSERT INTO instance VALUES ('{known}', '2026-01-01', '2026-01-01')")  # noqa: S608
    before = row_counts(db)
    shown = command(environment, "preview", TELEMETRY_ENABLED="off")
    assert shown.code == 0
    assert Heartbeat.model_validate_json(shown.out).instance_id == known
    (told,) = shown.err.splitlines()
    assert "TELEMETRY_ENABLED is false" in told
    assert row_counts(db) == before
    assert receiver.connections == 0


def test_what_is_written_next_is_what_was_previewed(
    environment: dict[str, str], pipeline: Pipeline, db: Engine
) -> None:
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now())")
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-01-01')")
    previewed = command(environment, "preview").out.removesuffix("\n")
    assert pipeline.write_heartbeat()
    written = outbox_row(db)["payload"]
    moments = [json.loads(body)["sent_at"] for body in (previewed, written)]
    assert previewed.replace(*moments) == written


def test_a_table_that_is_missing_is_named_and_no_body_is_made_up(
    environment: dict[str, str], db: Engine
) -> None:
    run(db, "ALTER TABLE org_configs RENAME TO moved")
    shown = command(environment, "preview")
    assert (shown.code, shown.out) == (1, "")
    assert 'relation "org_configs" does not exist' in shown.sentence


@pytest.mark.usefixtures("only_readers")
def test_status_reads_in_a_transaction_that_cannot_write_either(
    environment: dict[str, str],
) -> None:
    assert command(environment, "status", "--json").json["enabled"]
