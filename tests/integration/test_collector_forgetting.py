"""A deletion is final, whichever of several collectors on one database has answered it."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TypeVar
from uuid import UUID

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from app.collector import housekeeping, inbox, store
from app.collector.inbox import Inbox, UnavailableError
from app.collector.outcomes import Outcomes
from app.payload import parse
from migrations import migrate
from tests.support.collector import BODY, INSTANCE, Collector, changed, of, query, serving
from tests.support.freezing import frozen

T = TypeVar("T")

ROUNDS = 100
SENT_AT = parse(BODY).sent_at


WITHOUT_HOUSEKEEPING = """
from app.collector import housekeeping
housekeeping._run = print
from app.collector.__main__ import main
main()
"""
"""Housekeeping takes locks as well, soon after the start, at a moment that no test can choose."""


@pytest.fixture
def two(migrated: str, tmp_path: Path) -> Iterator[tuple[Collector, Collector]]:
    """Two collectors on one database, which do nothing but what they are asked to do."""
    argv = [sys.executable, "-c", WITHOUT_HOUSEKEEPING, "serve"]
    with serving(migrated, tmp_path / "a", argv) as a, serving(migrated, tmp_path / "b", argv) as b:
        yield a, b


def until(what: Callable[[], T], seconds: float = 10) -> T:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


@contextmanager
def table_held(connection: Connection) -> Iterator[None]:
    with connection.begin():
        connection.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
        yield


def waits_for_the_table(onlooker: Connection) -> int | None:
    """Return the session of a collector whose INSERT waits, or None."""
    waiting = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND query ILIKE '%INSERT INTO heartbeat%'"
    )
    with onlooker.begin():
        session: int | None = onlooker.scalar(text(waiting))
    return session


def holds_its_rows(onlooker: Connection, session: int | None) -> bool:
    """Whether a session has executed its statements, in a transaction that is still open."""
    state = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
    with onlooker.begin():
        return bool(onlooker.scalar(state, {"pid": session}) == "idle in transaction")


def id_of(number: int) -> str:
    return parse(of(number)).instance_id


def test_four_collectors_that_keep_and_delete_the_same_installs_neither_lose_nor_fail(
    migrated: str, tmp_path: Path
) -> None:
    kept: set[tuple[str, str]] = set()
    deleted: set[str] = set()

    def call(four: list[Collector], seed: int) -> list[int]:
        random, answers = Random(seed), list[int]()  # noqa: S311 - no secret
        for _ in range(80):
            number, own = random.randrange(40), random.choice(four)
            if number < 20 and random.random() < 0.6:  # of all requests it is 30 %
                answers.append(own.forget(id_of(number)).status_code)
                if answers[-1] == 204:
                    deleted.add(id_of(number))
                continue
            sent_at = f"2026-05-{random.randrange(1, 10):02}T02:30:00+00:00"
            answers.append(own.post(of(number).replace(SENT_AT, sent_at)).status_code)
            if answers[-1] == 202:
                kept.add((id_of(number), sent_at))
        return answers

    with ExitStack() as running:
        four = [
            running.enter_context(serving(migrated, tmp_path / name, COLLECTOR_CLIENT_RATE="0"))
            for name in "abcd"
        ]
        with ThreadPoolExecutor(16) as pool:
            answers = [each for some in pool.map(call, [four] * 16, range(16)) for each in some]
        assert [own.failures("") for own in four] == [[]] * 4
    assert {*answers} == {202, 204, 503}
    assert len(deleted) == 20
    rows = query(
        migrated,
        "SELECT CAST(instance_id AS text),"
        """ to_char(sent_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS+00:00') FROM heartbeat""",
    )
    assert sorted(rows) == sorted(each for each in kept if each[0] not in deleted)
    installs = query(migrated, "SELECT CAST(instance_id AS text) FROM install")
    assert {each for (each,) in installs} == {each for each, _ in rows}


@pytest.mark.timeout(100)
def test_deletions_at_one_collector_are_final_for_what_another_holds_up(
    two: tuple[Collector, Collector],
) -> None:
    a, b = two
    engine = create_engine(a.url, poolclass=NullPool)
    ways = cycle(("in the transaction", "in the queue", "stopped", "stopped in the queue", "late"))
    answers: set[tuple[str, int]] = set()
    with engine.connect() as holder, engine.connect() as onlooker, ThreadPoolExecutor(4) as pool:
        for number, way in zip(range(ROUNDS), ways, strict=False):
            with ExitStack() as until_later, ExitStack() as held_up:
                if way == "late":
                    until_later.enter_context(frozen(a.process.pid))
                    posted = pool.submit(a.post, of(number))
                else:
                    held_up.enter_context(table_held(holder))
                    if way.endswith("queue"):
                        pool.submit(a.post, of(1_000 + number))
                        until(lambda: waits_for_the_table(onlooker))
                    posted = pool.submit(a.post, of(number))
                    until(lambda: waits_for_the_table(onlooker))
                    time.sleep(0.02)  # to arrive where nothing shows that it has
                    if way.startswith("stopped"):
                        until_later.enter_context(frozen(a.process.pid))
                deleted = pool.submit(b.forget, id_of(number))
                time.sleep(0.02)
                held_up.close()
                if way.startswith("stopped"):
                    time.sleep(0.05)
                if way == "late":
                    assert deleted.result().status_code == 204
            assert deleted.result().status_code == 204
            answers.add((way, posted.result().status_code))
            for table in ("heartbeat", "install"):
                left = f"SELECT 1 FROM {table} WHERE instance_id = '{id_of(number)}'"
                assert query(a.url, left) == [], way
    assert {status for _, status in answers} <= {202, 503}
    assert ("late", 503) in answers
    assert a.failures("") == b.failures("") == []


BEFORE_THE_ROW = "BEFORE INSERT ON heartbeat"
WITH_THE_ROW = "AFTER INSERT ON install"
AT_THE_COMMIT = "AFTER INSERT ON install DEFERRABLE INITIALLY DEFERRED"


@pytest.mark.parametrize("when", [BEFORE_THE_ROW, WITH_THE_ROW, AT_THE_COMMIT])
@pytest.mark.parametrize("stored", [[BODY], []], ids=["of a known install", "of a new install"])
def test_a_deletion_is_final_wherever_it_meets_what_is_being_stored(
    migrated: str, when: str, stored: list[str]
) -> None:
    later = changed(sent_at="2026-05-03T02:30:00+00:00")
    engine = store.connect(migrated)
    with engine.begin() as connection:
        store.insert(connection, [parse(body) for body in stored])
    query(
        migrated,
        # A transaction that sees what was committed when it began would see no mark.
        "DO $$BEGIN EXECUTE 'ALTER DATABASE ' || quote_ident(current_database()) ||"
        " $q$ SET default_transaction_isolation TO 'repeatable read'$q$; END$$;"
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN PERFORM pg_sleep(1); RETURN new; END $$;"
        f"CREATE {'CONSTRAINT' if 'DEFERRABLE' in when else ''} TRIGGER dawdle"
        f" {when.replace('INSERT', 'INSERT OR UPDATE')} FOR EACH ROW EXECUTE FUNCTION dawdle()",
    )
    own_engine = store.connect(migrated)

    def keep() -> bool:
        try:
            with own_engine.begin() as connection:
                store.insert(connection, [parse(later)])
        except store.DeletedMeanwhileError:
            return False
        return True

    asleep = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        kept = pool.submit(keep)
        until(lambda: query(migrated, asleep))
        with connection.begin():
            store.forget(connection, UUID(INSTANCE))
    assert kept.result() is (when != BEFORE_THE_ROW)
    for each in (engine, own_engine):
        each.dispose()
    assert query(migrated, "SELECT 1 FROM heartbeat UNION ALL SELECT 1 FROM install") == []


def test_whoever_deletes_has_the_row_of_the_install_whoever_else_deletes_it(migrated: str) -> None:
    engine = store.connect(migrated)
    with engine.begin() as connection:
        store.insert(connection, [parse(BODY)], at=datetime(2020, 1, 1, tzinfo=UTC))
    with engine.begin() as deleting:
        for statement in store.FORGET[:2]:
            deleting.execute(statement, {"id": INSTANCE})
        store.prune(engine, datetime.now(UTC))
        assert query(migrated, "SELECT count(*) FROM install") == [(1,)]
    engine.dispose()


def test_a_collector_that_hangs_in_its_transaction_delays_a_deletion_for_seconds_only(
    two: tuple[Collector, Collector],
) -> None:
    a, b = two
    engine = create_engine(a.url, poolclass=NullPool)
    with engine.connect() as holder, engine.connect() as onlooker, ThreadPoolExecutor(2) as pool:
        with ExitStack() as held_up:
            held_up.enter_context(table_held(holder))
            posted = pool.submit(a.post, BODY)
            session = until(lambda: waits_for_the_table(onlooker))
            held_up.enter_context(frozen(a.process.pid))
            holder.rollback()
            until(lambda: holds_its_rows(onlooker, session))
            refused = b.forget(INSTANCE)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
            until(lambda: b.forget(INSTANCE).status_code == 204, seconds=15)
            b.let_the_forgotten_come_again()  # as if it had stood still for minutes
        assert posted.result().status_code == 503
    assert a.rows() == []


def test_a_deletion_leaves_a_session_that_is_read_only(own: Collector) -> None:
    assert own.post(BODY).status_code == 202
    database = query(own.url, "SELECT current_database()")[0][0]
    query(own.url, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
    others = "pid <> pg_backend_pid() AND datname = current_database()"
    query(own.url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    assert own.forget(INSTANCE).status_code == 503
    able = make_url(own.url).update_query_dict({"options": "-c default_transaction_read_only=off"})
    query(
        able.render_as_string(hide_password=False),
        f'ALTER DATABASE "{database}" RESET default_transaction_read_only',
    )
    assert own.forget(INSTANCE).status_code == 204
    assert own.rows() == []


def test_what_its_sender_takes_for_lost_is_not_kept_and_what_is_deleted_is(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "ANSWER_SECONDS", 0.3)
    engine = store.connect(migrated)
    with create_engine(migrated, poolclass=NullPool).begin() as connection:
        store.insert(connection, [parse(of(2))])

    async def call() -> None:
        with Inbox(engine) as box:
            first = asyncio.create_task(box.store(parse(of(0))))
            await asyncio.to_thread(until, lambda: waits_for_the_table(onlooker))
            lost = [
                *(asyncio.create_task(box.store(parse(of(number)))) for number in (1, 3)),
                asyncio.create_task(box.forget(UUID(id_of(2)))),
            ]
            for each in await asyncio.gather(first, *lost, return_exceptions=True):
                assert isinstance(each, UnavailableError)
            holder.rollback()
            monkeypatch.setattr(inbox, "ANSWER_SECONDS", 8)
            assert await box.store(parse(of(4)))

    looking = create_engine(migrated, poolclass=NullPool)
    with looking.connect() as holder, looking.connect() as onlooker:
        holder.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
        asyncio.run(call())
    engine.dispose()
    rows = query(migrated, "SELECT CAST(instance_id AS text) FROM heartbeat ORDER BY 1")
    # The first was on its way to the disk when its sender was answered.
    assert rows == [(id_of(0),), (id_of(4),)]


def test_a_process_that_was_stopped_in_its_transaction_commits_nothing(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "STANDSTILL_SECONDS", -1)
    engine = store.connect(migrated)

    async def call() -> None:
        with Inbox(engine) as box, pytest.raises(UnavailableError):
            await box.store(parse(BODY))

    asyncio.run(call())
    engine.dispose()
    assert query(migrated, "SELECT 1 FROM heartbeat") == []


@pytest.mark.parametrize("retention_days", [0, 400])
def test_marks_are_deleted_when_their_time_is_over_and_no_sooner(
    migrated: str, retention_days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    engine = store.connect(migrated)
    for number in range(2):
        with engine.begin() as connection:
            store.forget(connection, UUID(id_of(number)))
        if number == 0:
            query(migrated, "UPDATE forgotten SET at = at - interval '5 minutes'")
    with housekeeping.housekeeping(engine, retention_days, Outcomes()):
        until(lambda: len(query(migrated, "SELECT 1 FROM forgotten")) < 2)
        time.sleep(0.5)
    engine.dispose()
    recent = "SELECT at > now() - interval '1 minute' FROM forgotten"
    assert query(migrated, recent) == [(True,)]


def test_each_heartbeat_of_a_batch_has_its_own_fate(migrated: str) -> None:
    engine = store.connect(migrated)
    later = changed(sent_at="2026-05-03T02:30:00+00:00")
    with engine.begin() as connection:
        store.forget(connection, UUID(id_of(1)))
    with engine.begin() as connection:
        store.insert(connection, [parse(of(2))])
    bodies = [of(3), of(1), BODY, of(2), later, BODY, of(1)]
    with engine.begin() as connection:
        fates = store.insert(connection, [parse(body) for body in bodies])
    engine.dispose()
    assert [fate.new for fate in fates] == [True, False, True, False, True, False, False]
    assert [fate.wait > 290 for fate in fates] == [body == of(1) for body in bodies]
    assert len(query(migrated, "SELECT 1 FROM heartbeat")) == 4


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004", "0005"])
def test_an_upgrade_keeps_what_is_stored_and_forgets_from_then_on(
    collector_database: str, revision: str
) -> None:
    engine = create_engine(collector_database, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector", revision)
    query(
        collector_database,
        "INSERT INTO heartbeat (instance_id, sent_at, received_at, body)"  # as 0001 took it
        f" VALUES ('{INSTANCE}', '2026-05-02T02:30:00+00:00', now(), '{BODY}')",
    )
    if revision != "0001":
        query(
            collector_database,
            f"INSERT INTO install SELECT '{INSTANCE}', now(), now(), '{BODY}'",
        )
        query(collector_database, "INSERT INTO daily VALUES (current_date, 'new', '1', '', '', 1)")
    with engine.connect() as connection:
        migrate(connection, "collector")
    for table in ("heartbeat", "install"):
        assert query(collector_database, f"SELECT count(*) FROM {table}") == [(1,)]
    with engine.begin() as connection:
        [again] = store.insert(connection, [parse(BODY)])
        store.forget(connection, UUID(INSTANCE))
        [after] = store.insert(connection, [parse(BODY)])
    assert (again, after.new, after.wait > 290) == (store.Fate(new=False), False, True)
    assert query(collector_database, "SELECT octet_length(key) FROM forgotten_key") == [(32,)]
    assert query(collector_database, "TABLE ingest") == []
    with engine.connect() as connection:
        migrate(connection, "collector", "base")
