"""The statements, transactions and connections of each step are counted."""

import re
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import Cost, counted, give_notice, one, outbox_row
from tests.support.steps import DAY_BEGINS, TOMORROW_BEGINS, eventually


@pytest.fixture(autouse=True)
def sent(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """A known install, whose first heartbeat has been written and sent."""
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()
    pipeline.drain()
    assert outbox_row(db)["state"] == "sent"


@pytest.fixture(autouse=True)
def no_session_is_left(sent: None, db: Engine) -> Iterator[None]:  # noqa: ARG001 - pytest runs it first
    """No test leaves a session open."""
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    yield
    eventually(lambda: one(db, sessions) == 0, seconds=5)  # Postgres ends a session a moment later


@pytest.fixture
def off(pipeline: Pipeline, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A worker that was restarted with telemetry off while a heartbeat was pending."""
    clock(TOMORROW_BEGINS)
    assert pipeline.write_heartbeat()
    monkeypatch.setenv("TELEMETRY_ENABLED", "false")
    return Pipeline(Settings.load())


def sweep(pipeline: Pipeline) -> None:
    """Do what the actor ``sweep`` does."""
    with pipeline.connect() as link:
        pipeline.sweep(link)
        pipeline.write_heartbeat(link)
        pipeline.prune(link)


def tables_in(cost: Cost, db: Engine) -> list[set[str]]:
    """Return the tables that each statement names."""
    with db.begin() as connection:
        statement = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        tables = set(connection.scalars(text(statement)))
    return [tables & set(re.findall(r"\w+", statement)) for statement in cost.statements]


def test_a_heartbeat_is_written_in_one_transaction_on_one_connection_by_few_statements(
    pipeline: Pipeline, clock: Clock
) -> None:
    clock(TOMORROW_BEGINS)
    with counted() as cost:
        assert pipeline.write_heartbeat()
    assert cost.each == [12]
    assert (cost.connections, cost.commits) == (1, 1)


def test_all_facts_are_counted_by_one_statement_after_a_look_at_whose_tables_they_are(
    pipeline: Pipeline, clock: Clock, db: Engine
) -> None:
    clock(TOMORROW_BEGINS)
    with counted() as cost:
        assert pipeline.write_heartbeat()
    ours = {"instance", "telemetry_notice", "telemetry_outbox"}
    whose, counted_tables = [tables for tables in tables_in(cost, db) if tables - ours]
    assert whose == {"alembic_version"}
    assert len(counted_tables) == 8


def test_a_sweep_with_nothing_to_do_uses_one_connection_and_few_statements(
    pipeline: Pipeline,
) -> None:
    with counted() as cost:
        sweep(pipeline)
    assert cost.each == [8, 4, 2]  # sweep, rule, prune
    assert (cost.connections, cost.commits) == (1, 3)


def test_a_drain_with_nothing_to_do_is_one_transaction_of_few_statements(
    pipeline: Pipeline,
) -> None:
    with counted() as cost:
        pipeline.drain()
    assert cost.each == [3]
    assert (cost.connections, cost.commits) == (1, 1)


def test_a_delivery_is_a_claim_a_beginning_a_settling_and_a_last_look_each_with_one_commit(
    pipeline: Pipeline, clock: Clock, db: Engine
) -> None:
    clock(TOMORROW_BEGINS)
    pipeline.write_heartbeat()
    with counted() as cost:
        pipeline.drain()
    claim, begin, settle, look = (statements for _, *statements in cost.transactions)
    assert [len(claim), len(begin), len(settle), len(look)] == [1, 1, 5, 2]
    assert (cost.connections, cost.commits) == (3, 4)  # one before the POST, and two after it
    assert one(db, "SELECT count(*) FROM telemetry_outbox WHERE state = 'sent'") == 2


def test_off_a_sweep_uses_the_outbox_and_no_other_table_and_few_statements(
    off: Pipeline, db: Engine
) -> None:
    with counted() as cost:
        sweep(off)
    assert cost.each == [3, 2]
    assert (cost.connections, cost.commits) == (1, 2)
    assert set.union(*tables_in(cost, db)) == {"telemetry_outbox"}


def test_off_a_drain_asks_the_database_for_nothing(off: Pipeline) -> None:
    with counted() as cost:
        off.drain()
    assert cost == Cost()
