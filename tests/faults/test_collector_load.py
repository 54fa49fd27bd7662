"""Whatever happens to it, a collector has kept what it has acknowledged, and says so in time."""

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import Connection, NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError

from app.collector import inbox, store
from app.collector.inbox import Inbox, RefusedError, UnavailableError
from app.payload import Heartbeat, parse
from app.settings.collector import CollectorSettings
from tests.support.breakable import Server
from tests.support.collector import (
    BODY,
    INSTANCE,
    JSON,
    Collector,
    changed,
    head,
    of,
    query,
    serving,
)
from tests.support.freezing import frozen
from tests.support.metrics import samples


@contextmanager
def held(url: str, table: str = "heartbeat") -> Iterator[None]:
    """Have nobody write into a table until the block ends."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
        yield


def until(what: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def waits_for_a_lock(url: str) -> bool:
    return bool(
        query(
            url,
            "SELECT 1 FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()",
        )
    )


def arrived(port: int) -> float:
    """Return how many wait in the inbox, and how many were refused because it was full."""
    found = samples(port)
    refused = found["consentos_collector_requests_total/unavailable"]
    return found["consentos_collector_inbox_waiting"] + refused


@contextmanager
def waiting(collector: Collector, bodies: list[str], port: int) -> Iterator[list[int]]:
    """Have bodies wait for their commit until the block ends, and then their answers' statuses."""
    statuses: list[int] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        with held(collector.url):
            found = pool.map(lambda body: collector.post(body).status_code, bodies)
            until(lambda: arrived(port) == len(bodies))
            yield statuses
        statuses += found


def test_what_waits_is_committed_together(own: Collector, metrics_port: int) -> None:
    bodies = [of(number) for number in range(50)]
    with waiting(own, bodies, metrics_port) as statuses:
        assert own.rows() == []
    assert statuses == [202] * 50
    [(rows, transactions)] = query(
        own.url, "SELECT count(*), count(DISTINCT xmin::text) FROM heartbeat"
    )
    assert rows == 50
    assert transactions <= 3


def test_a_page_on_a_connection_that_is_kept_does_not_wait_for_an_acknowledgement(
    own: Collector,
) -> None:
    request = b"GET / HTTP/1.1\r\nHost: collector\r\n\r\n"
    took = []
    with socket.create_connection(("127.0.0.1", own.port), timeout=5) as connection:
        for _ in range(60):
            began, received = time.monotonic(), b""
            connection.sendall(request)
            while not received.rstrip().endswith(b"</html>"):
                received += connection.recv(1_000_000)
            took.append(time.monotonic() - began)
    assert sorted(took)[5] < 0.035  # an acknowledgement is waited for 40 ms, each time


def test_nothing_is_acknowledged_before_it_is_committed(own: Collector, metrics_port: int) -> None:
    with waiting(own, [BODY], metrics_port) as statuses:
        assert own.rows() == []
        with socket.create_connection(("127.0.0.1", own.port)) as connection:
            connection.settimeout(0.3)
            connection.sendall(head(f"Content-Length: {len(of(1))}") + of(1).encode())
            with pytest.raises(TimeoutError):
                connection.recv(1)
    assert statuses == [202]


def test_what_the_database_refuses_fails_nobody_else(own: Collector, metrics_port: int) -> None:
    query(own.url, "ALTER TABLE heartbeat ADD CHECK (body ->> 'deployment' <> 'poison')")
    bodies = [of(number) for number in range(20)]
    bodies[7] = changed(deployment="poison")
    with waiting(own, bodies, metrics_port) as statuses:
        assert statuses == []
    assert statuses == [202] * 7 + [500] + [202] * 12
    assert len(own.rows()) == 19
    assert set(own.failures()) == {"collector.failed stage=commit error=CheckViolation"}


def test_a_database_that_fails_fails_all_who_wait(own: Collector, metrics_port: int) -> None:
    bodies = [of(number) for number in range(20)]
    with waiting(own, bodies, metrics_port) as statuses:
        query(own.url, "ALTER TABLE install RENAME TO hidden")
    assert statuses == [503] * 20
    assert own.rows() == []


async def all_fail(box: Inbox, number_of_them: int) -> None:
    """Bring so many heartbeats, in one transaction of an inbox that is not open yet."""
    stored = [box.store(parse(of(number))) for number in range(number_of_them)]
    tasks = [asyncio.create_task(each) for each in stored]
    await asyncio.sleep(0)
    with box:
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} <= {UnavailableError, RefusedError}
    assert UnavailableError in {type(each) for each in found}


def test_a_database_that_is_gone_is_tried_once_for_all_who_wait(migrated: str) -> None:
    query(migrated, "ALTER TABLE install RENAME TO hidden")
    engine = store.connect(migrated)
    begun: list[Connection] = []
    event.listen(engine, "begin", begun.append)
    asyncio.run(all_fail(Inbox(engine), 20))
    engine.dispose()
    assert len(begun) == 2  # to see that the tables are ready, and to write


def test_a_database_that_goes_while_each_is_tried_by_itself_fails_the_others_without_a_try(
    migrated: str,
) -> None:
    query(
        migrated, f"ALTER TABLE heartbeat ADD CHECK (instance_id <> '{parse(of(0)).instance_id}')"
    )
    engine = store.connect(migrated)
    begun = count()

    def begin(_: Connection) -> None:
        if next(begun) == 3:  # the tables are ready, all are refused, and so is the first
            query(migrated, "ALTER TABLE install RENAME TO hidden")

    event.listen(engine, "begin", begin)
    asyncio.run(all_fail(Inbox(engine), 20))
    engine.dispose()
    assert next(begun) == 4


def test_what_is_acknowledged_outlives_a_server_that_does_not_wait_for_its_disk(
    migrated: str, tmp_path: Path, postgres: Server
) -> None:
    name = query(migrated, "SELECT current_database()")[0][0]
    query(migrated, f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    witness = create_engine(migrated, poolclass=NullPool).connect()
    with serving(migrated, tmp_path / "log") as own, witness:
        # It alone writes what nobody waits for; without it, such a commit is in memory only.
        writer = postgres.child("walwriter")
        with frozen(writer.pid):
            assert own.post(BODY).status_code == 202
            writer.kill()  # upon which Postgres drops its memory and starts anew
        until(lambda: not answers(witness))
        until(lambda: reachable(own.url))
        assert len(own.rows()) == 1


def answers(connection: Connection) -> bool:
    with suppress(OperationalError):
        connection.execute(text("SELECT 1"))
        return True
    return False


def reachable(url: str) -> bool:
    with suppress(psycopg.OperationalError):
        return query(url, "SELECT true") == [(True,)]
    return False


@pytest.mark.parametrize("setting", ["off", "local", "on", "remote_apply"])
def test_a_commit_waits_for_the_disk_whatever_the_database_sets(
    migrated: str, setting: str
) -> None:
    name = query(migrated, "SELECT current_database()")[0][0]
    query(migrated, f'ALTER DATABASE "{name}" SET synchronous_commit = {setting}')
    engine = store.connect(migrated)
    with engine.begin() as connection:
        store.insert(connection, [parse(BODY)])
        found = connection.scalar(text("SELECT current_setting('synchronous_commit')"))
    engine.dispose()
    assert found == {"off": "local"}.get(setting, setting)


def test_no_statement_that_the_server_may_log_has_a_body_in_it(migrated: str) -> None:
    engine = store.connect(migrated)

    def insert() -> None:
        with engine.begin() as connection:
            store.insert(connection, [parse(BODY)])

    waiting = "SELECT query FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool:
        with create_engine(migrated, poolclass=NullPool).connect() as held:
            held.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
            inserted = pool.submit(insert)
            until(lambda: query(migrated, waiting))
            [(said,)] = query(migrated, waiting)
        inserted.result()
    engine.dispose()
    assert "INSERT INTO heartbeat" in said
    assert INSTANCE not in said


def test_two_batches_of_the_same_heartbeats_in_opposite_orders_do_not_deadlock(
    migrated: str,
) -> None:
    # Each row takes its time, so that both batches are in their middle at the same moment.
    query(
        migrated,
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN new; END $$;"
        "CREATE TRIGGER dawdle BEFORE INSERT ON heartbeat"
        " FOR EACH ROW EXECUTE FUNCTION dawdle()",
    )
    engine = store.connect(migrated)
    heartbeats = [parse(of(number)) for number in range(2)]
    together = threading.Barrier(2)

    def insert(batch: Sequence[Heartbeat]) -> list[store.Fate]:
        with engine.connect() as connection:
            together.wait(10)
            with connection.begin():
                return store.insert(connection, batch)

    with ThreadPoolExecutor(2) as pool:
        fates = [*pool.map(insert, (heartbeats, heartbeats[::-1]))]
    engine.dispose()
    assert sorted(fate.new for batch in fates for fate in batch) == [False, False, True, True]


def test_a_full_inbox_refuses_at_once_and_keeps_what_it_has(migrated: str) -> None:
    engine = store.connect(migrated)

    async def fill() -> None:
        with Inbox(engine) as box:
            waiting = [
                asyncio.create_task(box.store(parse(of(number))))
                for number in range(inbox.CAPACITY)
            ]
            await asyncio.sleep(0)
            began = time.monotonic()
            with pytest.raises(UnavailableError, match="busy"):
                await box.store(parse(BODY))
            assert time.monotonic() - began < 0.5
            lock.rollback()
            await asyncio.gather(*waiting)
            await box.store(parse(BODY))

    with create_engine(migrated, poolclass=NullPool).connect() as lock:
        lock.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
        asyncio.run(fill())
    engine.dispose()
    assert query(migrated, "SELECT count(*) FROM heartbeat") == [(inbox.CAPACITY + 1,)]


def test_what_waits_when_the_inbox_closes_is_committed(migrated: str) -> None:
    engine = store.connect(migrated)

    async def fill() -> None:
        with Inbox(engine) as box:
            for number in range(20):
                heartbeat = parse(of(number))
                tasks.append(asyncio.create_task(box.store(heartbeat)))
            await asyncio.sleep(0)  # they wait now, and nobody waits for them

    tasks: list[asyncio.Task[bool]] = []
    asyncio.run(fill())
    engine.dispose()
    assert query(migrated, "SELECT count(*) FROM heartbeat") == [(20,)]


def test_a_full_inbox_is_503_with_a_time_to_come_back(
    tmp_path: Path, migrated: str, metrics_port: int
) -> None:
    small, port = [sys.executable, "-c", SMALL, "serve"], str(metrics_port)
    with serving(migrated, tmp_path / "log", small, COLLECTOR_METRICS_PORT=port) as own:
        bodies = [of(number) for number in range(10)]
        with waiting(own, bodies, metrics_port) as statuses:
            refused = own.post(BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert refused.json() == {"error": "The collector is busy."}
        assert sorted(statuses) == [202] * 3 + [503] * 7
        assert len(own.rows()) == 3


SMALL = """
from app.collector import inbox
from app.collector.__main__ import main

inbox.CAPACITY = 3
main()
"""


def test_a_caller_who_leaves_while_it_waits_is_harmless(own: Collector) -> None:
    with held(own.url), socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY.encode())
        until(lambda: waits_for_a_lock(own.url))
        connection.close()
        time.sleep(0.2)
    assert own.post(of(1)).status_code == 202
    assert len(own.rows()) == 2
    assert own.log() == [f"collector.ready port={own.port}"]


def test_many_silent_connections_delay_no_other(own: Collector) -> None:
    silent = [socket.create_connection(("127.0.0.1", own.port)) for _ in range(300)]
    for connection in silent[::2]:
        connection.sendall(head("Content-Length: 100") + b"{")
    assert own.post(BODY).status_code == 202
    for connection in silent:
        connection.close()


class Senders:
    """Installs that send one heartbeat after another, each note what was acknowledged."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._numbers = count()
        self._ended = threading.Event()
        self.acknowledged: list[int] = []
        self.others: list[int] = []
        self._threads = [threading.Thread(target=self._send) for _ in range(8)]

    def _send(self) -> None:
        base = f"http://127.0.0.1:{self._collector.port}"
        with httpx.Client(base_url=base, trust_env=False, timeout=20) as client:
            while not self._ended.is_set():
                number = next(self._numbers)
                with suppress(httpx.TransportError):
                    response = client.post("/v1/heartbeat", content=of(number), headers=JSON)
                    to = self.acknowledged if response.status_code == 202 else self.others
                    to.append(number)

    @contextmanager
    def sending(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            until(lambda: len(self.acknowledged) > 50)
            yield
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()

    def lost(self) -> set[str]:
        """Return the ids that were acknowledged and are not there."""
        rows = query(self._collector.url, "SELECT instance_id::text FROM heartbeat")
        sent = {of(number).partition('"instance_id": "')[2][:36] for number in self.acknowledged}
        return sent - {instance_id for (instance_id,) in rows}


def test_postgres_killed_under_load_loses_nothing_that_was_acknowledged(
    own: Collector, postgres: Server
) -> None:
    senders = Senders(own)
    with senders.sending():
        with postgres.down():
            until(lambda: senders.others)
        before = len(senders.acknowledged)
        until(lambda: len(senders.acknowledged) > before + 50)
    assert senders.lost() == set()


def test_the_collector_killed_under_load_loses_nothing_that_was_acknowledged(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", ending=-signal.SIGKILL) as own:
        senders = Senders(own)
        with senders.sending():
            own.process.kill()
            own.process.wait(10)
    assert senders.lost() == set()


def test_sigterm_under_load_settles_what_waits_and_loses_nothing(own: Collector) -> None:
    senders = Senders(own)
    with senders.sending():
        began = time.monotonic()
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(10) == 0
        assert time.monotonic() - began < 5
    assert senders.others == []
    assert senders.lost() == set()
    assert own.failures("") == []


def test_a_frozen_postgres_is_503_in_time_and_does_not_delay_the_exit(
    own: Collector, postgres: Server
) -> None:
    assert own.post(of(1)).status_code == 202
    with postgres.frozen():
        began = time.monotonic()
        response = own.post(BODY)
        assert (response.status_code, response.headers["retry-after"]) == (503, "60")
        assert time.monotonic() - began < 10
        own.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert own.process.wait(10) == 0
        assert time.monotonic() - began < 5


def test_who_asks_too_often_is_429_until_its_time_has_come(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", COLLECTOR_CLIENT_RATE="4") as own:
        assert own.post(BODY).status_code == 202
        assert own.post("{}").status_code == 400
        assert own.held(INSTANCE).status_code == 200
        assert own.forget(INSTANCE).status_code == 204
        for refused in (own.post(BODY), own.held(INSTANCE), own.held("x"), own.forget(INSTANCE)):
            assert refused.status_code == 429
            assert 0 < int(refused.headers["retry-after"]) <= 15
        assert own.client.get("/v1/openapi.json").status_code == 200
        assert own.rows() == []


def test_sixty_a_minute_is_the_default() -> None:
    assert CollectorSettings().collector_client_rate == 60


def test_a_trusted_proxy_says_who_calls_and_only_its_own_word_counts(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", COLLECTOR_CLIENT_RATE="1") as own:

        def post(forwarded: str) -> int:
            return own.post(BODY, x_forwarded_for=forwarded).status_code

        assert post("203.0.113.1") == 202
        assert post("203.0.113.2") == 202
        # What stands before the proxy's own word was said by the caller.
        assert post("198.51.100.7, 203.0.113.1") == 429
        assert post("127.0.0.1, 203.0.113.2") == 429
        assert "203.0.113" not in own.output.read_text()


def test_no_other_proxy_is_trusted(migrated: str, tmp_path: Path) -> None:
    with serving(
        migrated,
        tmp_path / "log",
        COLLECTOR_CLIENT_RATE="2",
        FORWARDED_ALLOW_IPS="192.0.2.0/24",
    ) as own:
        statuses = [
            own.post(BODY, x_forwarded_for=f"203.0.113.{last}").status_code for last in range(4)
        ]
    assert statuses == [202, 202, 429, 429]
