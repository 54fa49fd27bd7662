"""What the collector says to Postgres can be said to one whose tables are sharded by the id.

No sharded Postgres is at hand here, so the form of every statement is held instead.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, event

from app.collector import check, daily, outcomes, recount, releases, store, suspects, weeks
from app.payload import parse
from tests.support.collector import BODY, INSTANCE, of

DAY = timedelta(days=1)
NOW = datetime.now(UTC)


@pytest.fixture
def engine(migrated: str) -> Iterator[Engine]:
    made = store.connect(migrated)
    yield made
    made.dispose()


@pytest.fixture
def transactions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Do everything that a collector does, and return its statements by their transaction."""
    done: list[list[str]] = []

    @event.listens_for(Engine, "begin")
    def began(_: Connection) -> None:
        done.append([])

    def said(_c: object, _cursor: object, statement: str, *_: object) -> None:
        done[-1].append(statement)

    def said_at_once(_: Connection, statements: Sequence[str], values: Any) -> list[list[Any]]:
        done[-1] += statements
        return send(_, statements, values)

    send = store.send
    monkeypatch.setattr(store, "send", said_at_once)
    event.listen(Engine, "before_cursor_execute", said)
    try:
        _everything(engine)
    finally:
        event.remove(Engine, "before_cursor_execute", said)
        event.remove(Engine, "begin", began)
    return done


def _everything(engine: Engine) -> None:
    weeks.make(engine)
    with engine.begin() as connection:
        for days_ago in range(40, 0, -1):
            sent = [
                parse(of(number).replace("05-02T02", f"05-02T{days_ago % 24:02}"))
                for number in range(3)
            ]
            store.insert(connection, sent, established_days=2, at=NOW - days_ago * DAY)
    with engine.begin() as connection:
        store.insert(connection, [parse(BODY)])
        store.seen(connection, UUID(INSTANCE))
        store.held(connection, UUID(INSTANCE), after=None, limit=9)
        store.add_outcomes(connection, {"accepted": 1})
        outcomes.of_day(connection, NOW.date())
        releases.add(connection, "0.1.0", NOW.date())
        daily.live(connection)
        suspects.groups(connection, 2)
    with engine.begin() as connection:
        store.forget(connection, UUID(INSTANCE))
    recount.catch_up(engine, now=NOW - DAY)
    recount.catch_up(engine)
    chosen = suspects.Selector(ids=[UUID(parse(of(1)).instance_id)])
    suspects.exclude(engine, chosen, "a test")
    suspects.include(engine, suspects.Selector(why="a test"))
    recount.catch_up(engine)
    check.check(engine.url.render_as_string(hide_password=False))
    with engine.begin() as connection:
        store.prune_marks(connection)
    store.prune(engine, store.cutoff(engine, 20 * DAY))


def test_no_statement_names_a_row_by_its_ctid(transactions: list[list[str]]) -> None:
    assert not [each for said in transactions for each in said if "ctid" in each]


def test_no_statement_locks_rows_by_a_clause(transactions: list[list[str]]) -> None:
    clause = re.compile(r"\bFOR\s+(NO\s+KEY\s+)?(UPDATE|KEY|SHARE)\b|SKIP LOCKED", re.IGNORECASE)
    assert not [each for said in transactions for each in said if clause.search(each)]


def test_no_order_of_what_is_stored_or_deleted_rests_on_an_advisory_lock(
    transactions: list[list[str]],
) -> None:
    writes = re.compile(r"(INSERT INTO|UPDATE|DELETE FROM)\s+(heartbeat|install)\b")
    writing = [said for said in transactions if any(map(writes.search, said))]
    assert len(writing) > 5
    assert not [each for said in writing for each in said if "advisory" in each]


def test_a_day_is_counted_by_one_aggregate_over_rows_that_are_on_one_shard(
    transactions: list[list[str]],
) -> None:
    counts = [each for said in transactions for each in said if "AS known" in each]
    of_tables = {
        " ".join(re.findall(r"(?:FROM|JOIN) (?:install|replay)\b(?: USING \(instance_id\))?", each))
        for each in counts
    }
    assert of_tables == {"FROM install", "FROM replay JOIN install USING (instance_id)"}
    for each in counts:
        assert not re.search(r"\b(OVER|OFFSET|DISTINCT|WITH|LIMIT)\b", each)


def test_every_table_is_written_by_its_own_key(transactions: list[list[str]]) -> None:
    """A row is inserted, changed or deleted by its ``instance_id``, on the shard where it is."""
    changes = re.compile(r"(UPDATE|DELETE FROM)\s+(heartbeat\w*|install)\b(?!_)", re.IGNORECASE)
    changing = [each for said in transactions for each in said if changes.search(each)]
    assert len(changing) > 3
    assert not [each for each in changing if "instance_id" not in each and "sent_at" not in each]
