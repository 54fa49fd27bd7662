"""``preview`` prints what would leave, stores nothing and sends nothing."""

import json

import pytest
from sqlalchemy import Engine, inspect

from app.payload import SCHEMA_VERSION, fields, flat, parse
from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import command, commands
from tests.support.database import count, give_notice, outbox_row, run
from tests.support.receiver import Receiver, answer

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
    heartbeat = parse(body)
    assert heartbeat.canonical() == body
    assert heartbeat.instance_id == NIL
    (reported,) = shown.err.splitlines()
    assert "nil UUID" in reported
    assert row_counts(db) == before
    assert receiver.connections == 0


@pytest.mark.usefixtures("only_readers")
def test_it_works_while_telemetry_is_off_and_says_so_on_stderr(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    known = "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"
    run(db, f"INSERT INTO instance VALUES ('{known}', '2026-01-01', '2026-01-01')")
    before = row_counts(db)
    shown = command(environment, "preview", TELEMETRY_ENABLED="off")
    assert shown.code == 0
    assert parse(shown.out).instance_id == known
    (reported,) = shown.err.splitlines()
    assert "TELEMETRY_ENABLED is false" in reported
    assert row_counts(db) == before
    assert receiver.connections == 0


def test_what_is_written_next_is_what_was_previewed(
    environment: dict[str, str], pipeline: Pipeline, db: Engine
) -> None:
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now())")
    give_notice(db, "2026-01-01")
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


class TestTheDifference:
    def test_to_nothing_sent_is_every_field_with_its_meaning(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        before = row_counts(db)
        shown, reported = commands(environment, "preview --diff", "preview --diff --json")
        assert (shown.code, reported.code) == (0, 0)
        heading, *lines, summary = shown.out.splitlines()
        assert heading == "No heartbeat has been sent from here yet, so every field is new:"
        for line, (name, field) in zip(lines, fields(), strict=True):
            assert line.startswith(f"+ {name} = ")
            assert line.endswith(f"    {field.description}")
        assert summary == f"{len(lines)} fields added, 0 removed, 0 changed."
        assert reported.json["since"] is None
        assert [*reported.json["added"]] == [name for name, _ in fields()]
        assert reported.json["removed"] == reported.json["changed"] == {}
        assert row_counts(db) == before

    def test_is_to_the_last_that_was_sent_and_of_values_too(
        self,
        environment: dict[str, str],
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        receiver: Receiver,
    ) -> None:
        give_notice(db, "2026-01-01")
        receiver.answers = [answer(202), answer(400)]
        for day in ("2026-05-02", "2026-05-03"):
            clock(f"{day}T02:30:00Z")
            assert pipeline.write_heartbeat()
            pipeline.drain()
        here = {**environment, "CONSENTOS_DEPLOYMENT": "helm"}
        shown, reported = commands(here, "preview --diff", "preview --diff --json")
        sent = flat(receiver.requests[0].body.decode())
        heading, sent_at, deployment, summary = shown.out.splitlines()
        assert heading == "Changes since the heartbeat of 2026-05-02, the last one sent:"
        assert sent_at.startswith(f'~ sent_at = "{sent["sent_at"]}" -> "2026-05-03T')
        assert deployment == '~ deployment = "unknown" -> "helm"'
        assert summary == "0 fields added, 0 removed, 2 changed."
        assert (reported.json["since"], reported.json["added"], reported.json["removed"]) == (
            *("2026-05-02", {}),
            {},
        )
        assert reported.json["changed"]["deployment"] == ["unknown", "helm"]
        assert receiver.connections == 2

    def test_names_a_field_that_is_new_and_one_that_is_gone(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        run(
            db,
            "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, created_at,"
            " next_attempt_at, expires_at, finished_at) VALUES (gen_random_uuid(), '2026-05-02',"
            " gen_random_uuid(), :payload, 'sent', now(), now(), now(), now())",
            payload='{"telemetry_schema":0,"counts":{"plugins":"1-10","orgs":"1-10"}}',
        )
        shown = command(environment, "preview", "--diff", TELEMETRY_ENABLED="off")
        assert shown.code == 0
        lines = shown.out.splitlines()
        new = len(dict(fields())) - 2
        assert '- counts.plugins = "1-10"' in lines
        assert f"~ telemetry_schema = 0 -> {SCHEMA_VERSION}" in lines
        assert sum(line.startswith("+ ") for line in lines) == new
        assert lines[-1] == f"{new} fields added, 1 removed, 1 changed."
        assert "Telemetry is off, so nothing is sent" in shown.err
