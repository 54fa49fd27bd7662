"""Heartbeats are kept in weeks, which are made ahead and dropped, and none is lost by it."""

import runpy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from app.collector import daily, store, weeks
from app.payload import parse
from migrations import migrate
from tests.support.collector import BODY, INSTANCE, changed, of, query, serving
from tests.support.processes import ROOT

DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)
MONDAY = NOW.date() - NOW.weekday() * DAY
RETENTION = 100 * DAY
BY_HOUR = 3_000
"""So many heartbeats are there before an upgrade, one an hour, the last one an hour ago."""


@pytest.fixture
def engine(migrated: str) -> Iterator[Engine]:
    made = store.connect(migrated)
    yield made
    made.dispose()


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def bring(engine: Engine, number: int, sent_at: datetime, received_at: datetime) -> None:
    body = of(number).replace("2026-05-02T02:30:00+00:00", sent_at.isoformat())
    with engine.begin() as connection:
        store.insert(connection, [parse(body)], established_days=1, at=received_at)


def made_long_ago(engine: Engine, begins: date) -> str:
    """Make a week of the past, as if it had been made in time; return its name."""
    week = weeks.Partition.week(begins)
    query(
        url_of(engine),
        f"CREATE TABLE {week.name} PARTITION OF heartbeat"
        f" FOR VALUES FROM ('{week.begins} 00:00+00') TO ('{week.ends} 00:00+00')",
    )
    return week.name


def names(engine: Engine) -> list[str]:
    with engine.begin() as connection:
        return [each.name for each in weeks.partitions(connection)]


def where(engine: Engine) -> dict[str, int]:
    """Return how many heartbeats each partition has, where it has any."""
    statement = "SELECT CAST(tableoid AS regclass)::text, count(*) FROM heartbeat GROUP BY 1"
    return dict(query(url_of(engine), statement))


def test_this_week_the_one_before_and_four_more_are_made_and_once_only(engine: Engine) -> None:
    for _ in range(2):
        weeks.make(engine)
        assert names(engine) == [
            *(f"heartbeat_{MONDAY + number * weeks.WEEK:%Y%m%d}" for number in range(-1, 5)),
            "heartbeat_default",
        ]


def test_a_running_collector_makes_them(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log") as own:
        deadline = time.monotonic() + 10
        while len(names(create_engine(migrated, poolclass=NullPool))) < 7:
            assert time.monotonic() < deadline
        own.post(changed(sent_at=NOW.isoformat()))
        own.post(changed(sent_at="9999-12-31T23:59:59+00:00"))
    found = where(create_engine(migrated, poolclass=NullPool))
    assert found == {f"heartbeat_{MONDAY:%Y%m%d}": 1, "heartbeat_default": 1}


def test_what_was_sent_in_a_week_before_it_was_made_is_moved_to_it(engine: Engine) -> None:
    bounds = (MONDAY - weeks.WEEK, MONDAY, MONDAY + weeks.WEEK)
    for number, day in enumerate(bounds):
        moment = daily.begins(day)
        bring(engine, number, moment, NOW)
        bring(engine, number, moment - timedelta(seconds=1), NOW)
    weeks.make(engine)
    assert where(engine) == {
        "heartbeat_default": 1,
        f"heartbeat_{bounds[0]:%Y%m%d}": 2,
        f"heartbeat_{bounds[1]:%Y%m%d}": 2,
        f"heartbeat_{bounds[2]:%Y%m%d}": 1,
    }
    with engine.begin() as connection:
        again = of(1).replace("2026-05-02T02:30:00+00:00", daily.begins(MONDAY).isoformat())
        assert store.insert(connection, [parse(again)]) == [store.Fate(new=False)]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whoever makes or drops a week wait for longer, so that it can be met there."""
    monkeypatch.setattr(weeks, "_BOUND", text("SELECT set_config('lock_timeout', '10s', true)"))


def waiting(engine: Engine, number: int) -> None:
    """Return when so many wait for a lock of a table."""
    deadline = time.monotonic() + 10
    statement = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
    while query(url_of(engine), statement) != [(number,)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("patient")
def test_several_that_make_a_week_at_once_while_heartbeats_come_lose_none(engine: Engine) -> None:
    with ThreadPoolExecutor(6) as pool:
        with engine.begin() as held:
            held.execute(text("LOCK TABLE heartbeat_default IN ACCESS EXCLUSIVE MODE"))
            making = [pool.submit(weeks.make, engine) for _ in range(2)]
            storing = [pool.submit(bring, engine, number, NOW, NOW) for number in range(2)]
            waiting(engine, 4)
        for each in (*making, *storing):
            each.result()
    assert where(engine) == {f"heartbeat_{MONDAY:%Y%m%d}": 2}
    assert len(names(engine)) == 7


def test_a_week_is_dropped_when_all_in_it_is_too_old_and_no_sooner(engine: Engine) -> None:
    begins = MONDAY - 20 * weeks.WEEK
    ends = daily.begins(begins + weeks.WEEK)
    name = made_long_ago(engine, begins)
    bring(engine, 1, ends - timedelta(minutes=5), ends + timedelta(hours=20))  # a retry
    bring(engine, 2, ends - 3 * DAY, ends - 3 * DAY)
    weeks.drop(engine, ends + timedelta(hours=20))
    with engine.begin() as connection:
        assert not weeks.delete(connection, ends + timedelta(hours=20))
    assert where(engine) == {name: 2}
    weeks.drop(engine, ends + timedelta(hours=20, seconds=1))
    assert where(engine) == {}
    assert name not in names(engine)


def test_a_clock_that_is_wrong_does_not_keep_what_is_too_old(engine: Engine) -> None:
    begins = MONDAY - 20 * weeks.WEEK
    name = made_long_ago(engine, begins)
    for number in range(5):
        bring(engine, number, daily.begins(begins), daily.begins(begins))
    bring(engine, 9, daily.begins(begins), NOW)
    store.prune(engine, store.cutoff(engine, RETENTION))
    assert where(engine) == {name: 1}
    assert query(url_of(engine), "SELECT CAST(instance_id AS text) FROM heartbeat") == [
        (parse(of(9)).instance_id,)
    ]


def test_a_clock_that_was_ahead_keeps_nothing_for_longer(engine: Engine) -> None:
    weeks.make(engine)
    bring(engine, 1, NOW + 20 * DAY, NOW - RETENTION - DAY)
    bring(engine, 2, NOW + 20 * DAY, NOW - RETENTION + DAY)
    assert "heartbeat_default" not in where(engine)
    store.prune(engine, store.cutoff(engine, RETENTION))
    assert sum(where(engine).values()) == 1


def test_what_is_in_no_week_is_deleted_by_its_receipt(engine: Engine) -> None:
    weeks.make(engine)
    bring(engine, 1, NOW + 999 * DAY, NOW - RETENTION - DAY)
    bring(engine, 2, NOW + 999 * DAY, NOW - RETENTION + DAY)
    bring(engine, 3, NOW - 999 * DAY, NOW - RETENTION - DAY)
    assert store.prune(engine, store.cutoff(engine, RETENTION)) is False
    assert query(url_of(engine), "SELECT right(left(instance_id::text, 8), 1) FROM heartbeat") == [
        ("2",)
    ]


def test_what_is_new_of_the_same_install_is_not_deleted_with_what_is_old(engine: Engine) -> None:
    for number in (1, 2):
        bring(engine, number, NOW + 999 * DAY, NOW - RETENTION - DAY)
        bring(engine, number, NOW + 998 * DAY, NOW)
    store.prune(engine, store.cutoff(engine, RETENTION))
    assert query(url_of(engine), "SELECT count(*), min(sent_at) FROM heartbeat") == [
        (2, NOW + 998 * DAY)
    ]


def test_no_fresh_heartbeat_is_deleted_with_the_old_ones(
    engine: Engine,
) -> None:
    old = made_long_ago(engine, MONDAY - 20 * weeks.WEEK)
    weeks.make(engine)
    for number in range(100):
        sent = daily.begins(MONDAY - 20 * weeks.WEEK)
        bring(engine, number, sent, sent)
        bring(engine, 1_000 + number, NOW, NOW)
        bring(engine, 2_000 + number, NOW + 900 * DAY, NOW)
        bring(engine, 3_000 + number, sent, NOW)
    while store.prune(engine, store.cutoff(engine, RETENTION)):
        pass
    assert where(engine) == {old: 100, f"heartbeat_{MONDAY:%Y%m%d}": 100, "heartbeat_default": 100}
    assert query(url_of(engine), "SELECT count(*) FROM install") == [(300,)]


def test_dropping_waits_for_no_lock_and_delays_writers_for_an_instant(engine: Engine) -> None:
    name = made_long_ago(engine, MONDAY - 20 * weeks.WEEK)
    weeks.make(engine)
    with engine.begin() as storing:
        store.insert(storing, [parse(BODY)])
        began = time.monotonic()
        weeks.drop(engine, NOW)
        assert time.monotonic() - began < 3
        assert name in names(engine)
    weeks.drop(engine, NOW)
    assert name not in names(engine)


@pytest.mark.usefixtures("patient")
def test_a_heartbeat_that_comes_while_its_week_is_dropped_is_kept(engine: Engine) -> None:
    begins = MONDAY - 20 * weeks.WEEK
    name = made_long_ago(engine, begins)
    body = BODY.replace("2026-05-02T02:30:00+00:00", daily.begins(begins).isoformat())
    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as storing:
            store.insert(storing, [parse(body)])
            dropping = pool.submit(weeks.drop, engine, NOW - RETENTION)
            waiting(engine, 1)
        dropping.result()
    assert where(engine) == {name: 1}


def as_before(url: str) -> Engine:
    """Make the tables as they were before there were weeks, with heartbeats of every kind."""
    made = create_engine(url, poolclass=NullPool)
    with made.connect() as connection:
        migrate(connection, "collector", "0004")
    query(
        url,
        "INSERT INTO heartbeat (instance_id, sent_at, received_at, body)"
        " SELECT md5(number::text)::uuid, now() - number * interval '1 hour',"
        f" now() - number * interval '1 hour', '{BODY}'"
        f" FROM generate_series(1, {BY_HOUR}) AS number;"
        f"INSERT INTO heartbeat VALUES ('{INSTANCE}', '2099-01-01', now(), '{BODY}');"
        "INSERT INTO install (instance_id, first_seen, last_seen, body)"
        " SELECT instance_id, received_at, received_at, body FROM heartbeat",
    )
    return made


def upgrade(made: Engine) -> None:
    with made.connect() as connection:
        migrate(connection, "collector")


def test_an_upgrade_keeps_every_heartbeat_and_the_weeks_begin_after_it(
    collector_database: str,
) -> None:
    made = as_before(collector_database)
    everything = "SELECT instance_id, sent_at, received_at, body FROM heartbeat ORDER BY 1, 2"
    before = query(collector_database, everything)
    upgrade(made)
    assert query(collector_database, everything) == before
    weeks.make(made)
    first = MONDAY + 2 * weeks.WEEK
    assert names(made) == [
        *(f"heartbeat_{first + number * weeks.WEEK:%Y%m%d}" for number in range(3)),
        f"heartbeat_before_{first:%Y%m%d}",
        "heartbeat_default",
    ]
    assert where(made) == {f"heartbeat_before_{first:%Y%m%d}": BY_HOUR, "heartbeat_default": 1}
    store.prune(made, store.cutoff(made, RETENTION))
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(100 * 24 - 1 + 1,)]
    with made.connect() as connection:
        migrate(connection, "collector", "base")


def test_the_table_of_before_is_dropped_in_the_end(collector_database: str) -> None:
    made = as_before(collector_database)
    upgrade(made)
    weeks.drop(made, NOW + 30 * DAY)
    assert where(made) == {"heartbeat_default": 1}
    assert names(made) == ["heartbeat_default"]


STATEMENTS = runpy.run_path(str(ROOT / "migrations/collector/0005_weeks.py"))["_statements"]()


@pytest.mark.parametrize("done", range(len(STATEMENTS) + 1))
def test_an_upgrade_that_was_interrupted_is_run_again(collector_database: str, done: int) -> None:
    made = as_before(collector_database)
    for statement in STATEMENTS[:done]:
        query(collector_database, statement)
    upgrade(made)
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(BY_HOUR + 1,)]


@pytest.mark.parametrize(
    "sent_at", ["sent_at", "now() + interval '8 days'"], ids=["at once", "a week after it began"]
)
def test_what_is_deleted_during_an_upgrade_stays_deleted(
    collector_database: str, sent_at: str
) -> None:
    made = as_before(collector_database)
    for statement in STATEMENTS:
        query(collector_database, statement)
    # By now it may belong to the table of before.
    query(collector_database, f"UPDATE heartbeat_default SET sent_at = {sent_at}")
    for table in ("install", "heartbeat"):
        query(collector_database, f"DELETE FROM {table} WHERE instance_id = '{INSTANCE}'")
    upgrade(made)
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(BY_HOUR,)]


def test_heartbeats_are_taken_during_an_upgrade(collector_database: str) -> None:
    made = as_before(collector_database)
    query(
        collector_database,
        "INSERT INTO heartbeat SELECT md5(number::text)::uuid, now() - number * interval '1 min',"
        f" now(), '{BODY}' FROM generate_series(1, 200000) AS number ON CONFLICT DO NOTHING",
    )
    [(before,)] = query(collector_database, "SELECT count(*) FROM heartbeat")
    waits: list[float] = []
    ended = threading.Event()

    def keep_storing() -> None:
        storing = store.connect(collector_database)
        while not ended.is_set():
            began = time.monotonic()
            bring(storing, 1_000_000 + len(waits), NOW, NOW)
            waits.append(time.monotonic() - began)
        storing.dispose()

    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(keep_storing)
        try:
            upgrade(made)
        finally:
            ended.set()
        storing.result()
    assert max(waits) < 4
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(before + len(waits),)]


def test_an_upgrade_that_fails_leaves_the_table_as_it_was(
    collector_database: str,
) -> None:
    made = as_before(collector_database)
    query(
        collector_database,
        "CREATE FUNCTION heartbeat_no_ctid() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RETURN NULL; END $$",
    )
    with pytest.raises(DBAPIError, match="already exists"):
        upgrade(made)
    query(collector_database, "DROP FUNCTION heartbeat_no_ctid()")
    assert query(collector_database, "SELECT to_regclass('heartbeat_default')") == [(None,)]
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(BY_HOUR + 1,)]
    far = changed(sent_at="2098-01-01T00:00:00+00:00")
    with made.begin() as connection:
        assert store.insert(connection, [parse(far)]) == [store.Fate(new=True)]
    upgrade(made)


def test_an_upgrade_gives_way_to_who_reads_for_long_and_heartbeats_are_taken_meanwhile(
    collector_database: str,
) -> None:
    made = as_before(collector_database)
    with ThreadPoolExecutor(1) as pool:
        with made.connect() as reading:
            reading.execute(text("SELECT count(*) FROM heartbeat"))
            upgrading = pool.submit(upgrade, made)
            for number in range(8):
                began = time.monotonic()
                bring(made, number, NOW, NOW)
                assert time.monotonic() - began < 3.5
                time.sleep(0.3)
            assert not upgrading.done()
        upgrading.result()
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(BY_HOUR + 1 + 8,)]


def test_a_release_before_that_still_runs_deletes_nothing_new(collector_database: str) -> None:
    made = as_before(collector_database)
    upgrade(made)
    weeks.make(made)
    as_it_did = (
        "DELETE FROM heartbeat WHERE ctid = ANY(ARRAY(SELECT ctid FROM heartbeat"
        " WHERE received_at < now() - interval '100 days' ORDER BY received_at LIMIT 1000"
        " FOR UPDATE SKIP LOCKED))"
    )
    with pytest.raises(psycopg.errors.RaiseException, match="ctid repeats"):
        query(collector_database, as_it_did)
    assert query(collector_database, "SELECT count(*) FROM heartbeat") == [(BY_HOUR + 1,)]
