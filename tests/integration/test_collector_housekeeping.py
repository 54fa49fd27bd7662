"""What a collector does by itself: it counts, and deletes what is older than it may be."""

import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

from app.collector import daily, housekeeping, store, weeks
from app.collector.outcomes import Outcomes
from app.payload import parse
from tests.support.collector import BODY, Collector, of, query, serving


def until(what: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def heard_of(url: str, numbers: range, days_ago: float) -> None:
    """Store a heartbeat of each install as if it had arrived so many days ago."""
    heartbeats = [parse(of(number)) for number in numbers]
    with create_engine(url, poolclass=NullPool).begin() as connection:
        at = datetime.now(UTC) - timedelta(days=days_ago)
        store.insert(connection, heartbeats, established_days=1, at=at)


def count(url: str, table: str) -> int:
    return int(query(url, f"SELECT count(*) FROM {table}")[0][0])


@pytest.fixture
def engine(migrated: str) -> Engine:
    return create_engine(migrated, poolclass=NullPool)


def test_the_days_that_were_missed_are_counted_at_the_start(migrated: str, tmp_path: Path) -> None:
    heard_of(migrated, range(3), days_ago=3)
    with serving(migrated, tmp_path / "log"):
        until(lambda: count(migrated, "measured") == 3)
    assert query(
        migrated,
        "SELECT (now() AT TIME ZONE 'UTC')::date - day, sum(installs)::integer FROM daily"
        " WHERE metric = 'new' GROUP BY day",
    ) == [(3, 3)]


def test_it_looks_again_and_again(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    engine = store.connect(migrated)
    with housekeeping.housekeeping(engine, 0, Outcomes()):
        time.sleep(0.2)
        assert count(migrated, "measured") == 0
        heard_of(migrated, range(5), days_ago=1)
        until(lambda: count(migrated, "daily") > 0)
    engine.dispose()


def test_what_is_older_than_it_may_be_is_deleted_and_no_more(migrated: str, tmp_path: Path) -> None:
    heard_of(migrated, range(2500), days_ago=51)
    heard_of(migrated, range(2500, 2600), days_ago=49)
    with serving(migrated, tmp_path / "log", COLLECTOR_RETENTION_DAYS="50") as own:
        until(lambda: count(migrated, "heartbeat") == count(migrated, "install") == 100)
    assert own.failures("") == []
    # The days of those who are gone have been counted before.
    assert query(migrated, "SELECT sum(installs)::integer FROM daily WHERE metric = 'new'") == [
        (2600,)
    ]


def test_what_a_recount_needs_is_deleted_when_that_is_over_or_has_failed(migrated: str) -> None:
    heard_of(migrated, range(5), days_ago=51)
    heard_of(migrated, range(5, 10), days_ago=1)
    engine = store.connect(migrated)
    query(migrated, "INSERT INTO recount (since) VALUES (current_date - 60)")
    mine = "SELECT pg_advisory_lock(hashtext('consentos-collector counting'))"
    with create_engine(migrated, poolclass=NullPool).connect() as other:
        other.execute(text(mine))
        with housekeeping.housekeeping(engine, 50, Outcomes()):
            time.sleep(1)
        assert count(migrated, "heartbeat") == 10
    query(migrated, "ALTER TABLE measured RENAME TO hidden")
    with housekeeping.housekeeping(engine, 50, Outcomes()):
        until(lambda: count(migrated, "heartbeat") == 5)
    engine.dispose()


def test_zero_days_keep_everything(migrated: str, tmp_path: Path) -> None:
    heard_of(migrated, range(3), days_ago=1000)
    with serving(migrated, tmp_path / "log", COLLECTOR_RETENTION_DAYS="0"):
        until(lambda: count(migrated, "measured"), seconds=60)
        time.sleep(0.5)
    assert count(migrated, "heartbeat") == count(migrated, "install") == 3


def test_each_step_deletes_so_many_and_says_whether_there_are_more(engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    heard_of(url, range(store.PRUNED_AT_ONCE + 1), days_ago=3)

    def step() -> bool:
        return store.prune(engine, store.cutoff(engine, timedelta(days=2)))

    assert step() is True
    assert (count(url, "heartbeat"), count(url, "install")) == (1, 1)
    assert step() is False
    assert (count(url, "heartbeat"), count(url, "install")) == (0, 0)


def test_an_install_that_reports_while_it_is_deleted_stays(engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    heard_of(url, range(2), days_ago=3)
    with engine.begin() as writing:
        body = of(0).replace("2026-05-02", "2026-05-03")
        store.insert(writing, [parse(body)])
        began = time.monotonic()
        assert store.prune(engine, store.cutoff(engine, timedelta(days=2))) is False
        assert time.monotonic() - began < 2  # it has not waited
    assert count(url, "install") == 2
    store.prune(engine, store.cutoff(engine, timedelta(days=2)))
    assert count(url, "install") == count(url, "heartbeat") == 1


def test_deleting_keeps_no_heartbeat_waiting(engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    heard_of(url, range(10), days_ago=3)
    with engine.begin() as deleting:
        weeks.delete(deleting, datetime.now(UTC) - timedelta(days=2))
        heard_of(url, range(20, 25), days_ago=0)
    assert count(url, "heartbeat") == 5


def test_one_counts_at_a_time_and_no_other_waits_for_it(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, calls = 0, 0, 0
    lock = threading.Lock()
    count_a_day = daily.count

    def slow(connection: Connection, day: date, *, replayed: bool) -> None:
        nonlocal running, most, calls
        with lock:
            running, calls = running + 1, calls + 1
            most = max(most, running)
        time.sleep(0.3)
        count_a_day(connection, day, replayed=replayed)
        with lock:
            running -= 1

    heard_of(migrated, range(5), days_ago=9)
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(daily, "count", slow)
    engine = store.connect(migrated)
    with (
        housekeeping.housekeeping(engine, 0, Outcomes()),
        housekeeping.housekeeping(engine, 0, Outcomes()),
        housekeeping.housekeeping(engine, 0, Outcomes()),
    ):
        until(lambda: calls >= 3)
        with engine.connect() as connection:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
            assert connection.scalar(text(waiting)) == 0
    engine.dispose()
    assert most == 1


def test_the_end_waits_until_what_was_counted_last_is_in_the_table(migrated: str) -> None:
    class Slow(Outcomes):
        def write(self, engine: Engine) -> None:
            time.sleep(0.1)
            super().write(engine)

    heard_of(migrated, range(1), days_ago=1)
    engine, outcomes = store.connect(migrated), Slow()
    with housekeeping.housekeeping(engine, 0, outcomes):
        until(lambda: count(migrated, "measured") == 1)
        outcomes.count("accepted")
    assert query(migrated, "SELECT outcome, requests FROM ingest") == [("accepted", 1)]
    engine.dispose()


OFTEN = """
from app.collector import housekeeping
from app.collector.__main__ import main

housekeeping.EVERY_SECONDS = 0.2
main()
"""


def test_a_failure_is_one_line_and_tried_again_and_hurts_no_heartbeat(
    migrated: str, tmp_path: Path
) -> None:
    heard_of(migrated, range(5), days_ago=1)
    query(migrated, "ALTER TABLE measured RENAME TO hidden")
    with serving(migrated, tmp_path / "log", [sys.executable, "-c", OFTEN, "serve"]) as own:
        until(lambda: own.failures("stage=count"))
        assert own.failures("") == ["collector.failed stage=count error=UndefinedTable"]
        assert own.post(BODY).status_code == 202
        query(migrated, "ALTER TABLE hidden RENAME TO measured")
        until(lambda: count(migrated, "measured") == 1)


def test_counting_that_takes_long_keeps_no_heartbeat_waiting(own: Collector) -> None:
    with create_engine(own.url, poolclass=NullPool).begin() as connection:
        connection.execute(text("LOCK TABLE daily IN ACCESS EXCLUSIVE MODE"))
        began = time.monotonic()
        for number in range(20):
            assert own.post(of(number)).status_code == 202
        assert time.monotonic() - began < 4
