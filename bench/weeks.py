"""The cost of old heartbeats: dropping a week, compared with deleting rows.

``python -m bench.weeks`` fills embedded servers with heartbeats of a simulated fleet, upgrades an
unpartitioned table while heartbeats are stored, drops the weeks that are older than the retention,
writes bench/results/weeks.json and prints it as a table.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event, Thread
from typing import Any
from uuid import UUID, uuid4

from rich.console import Console
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

from app.collector import daily, store, weeks
from app.payload import Heartbeat, parse
from bench.ingest import HEARTBEAT
from bench.recount import migrate_to
from bench.rig import ROOT, rounded, timed, vacuum, with_driver
from demo import servers

DATA = ROOT / ".data" / "bench-weeks"
RESULT = ROOT / "bench" / "results" / "weeks.json"

KEPT_WEEKS = 58
"""The number of weeks in a retention of 400 days."""
FULL_WEEKS, A_WEEK = 10, 1_000_000
OLD = 2_000_000
"""Heartbeats in the table before the upgrade to weeks."""
BATCH, BATCHES = 500, 100
FORGOTTEN = 100

console = Console(highlight=False, soft_wrap=True)

_FILL = text(
    """
    INSERT INTO heartbeat (instance_id, sent_at, received_at, body)
    SELECT md5(n::text || :salt)::uuid, at, at, CAST(:body AS jsonb)
    FROM generate_series(1, :rows) AS n
    CROSS JOIN LATERAL (SELECT :since + n * (:until - :since) / (:rows + 1) AS at) AS sent
    """
)
_WAL = text("SELECT CAST(pg_current_wal_lsn() - '0/0' AS bigint)")
_IDS = text("SELECT DISTINCT instance_id FROM heartbeat TABLESAMPLE SYSTEM (0.1) LIMIT :ids")


def _fill(connection: Connection, rows: int, since: datetime, until: datetime) -> None:
    values = {"rows": rows, "since": since, "until": until, "salt": f"{since}"}
    connection.execute(_FILL, {**values, "body": HEARTBEAT % uuid4()})


def _now() -> datetime:
    return datetime.now(UTC)


def _monday() -> datetime:
    today = _now().date()
    return daily.begins(today - timedelta(days=today.weekday()))


def _by_week(engine: Engine) -> dict[str, Any]:
    """Measure a full table of weeks: storing, deleting an id, and dropping the oldest weeks."""
    migrate_to(engine, "head")
    weeks.make(engine)
    first = _monday() - KEPT_WEEKS * weeks.WEEK
    with engine.begin() as connection:
        for number in range(KEPT_WEEKS - 1):
            begins = first + number * weeks.WEEK
            name = weeks.Partition.week(begins.date()).name
            connection.execute(
                text(
                    f"CREATE TABLE {name} PARTITION OF heartbeat"
                    f" FOR VALUES FROM ('{begins}') TO ('{begins + weeks.WEEK}')"
                )
            )
    for number in range(FULL_WEEKS):
        begins = first + number * weeks.WEEK
        with engine.begin() as connection:
            _fill(connection, A_WEEK, begins, begins + weeks.WEEK)
    vacuum(engine)
    result = {"heartbeats": FULL_WEEKS * A_WEEK, "weeks": KEPT_WEEKS, **_use(engine)}
    drops, wal = [], _wal(engine)
    for number in range(FULL_WEEKS):
        cutoff = first + (number + 1) * weeks.WEEK
        drops.append(timed(partial(weeks.drop, engine, cutoff)))
    dropped = _wal(engine) - wal
    with engine.begin() as connection:
        if connection.scalar(text("SELECT count(*) FROM heartbeat")) != BATCH * BATCHES:
            raise SystemExit("The number of heartbeats is wrong: not exactly one week was dropped.")
    return {**result, "drop_s": sum(drops) / FULL_WEEKS, "drop_wal_bytes": dropped / FULL_WEEKS}


def _use(engine: Engine) -> dict[str, float]:
    batches = [[_heartbeat() for _ in range(BATCH)] for _ in range(BATCHES)]
    with engine.connect() as connection:
        stored = sum(timed(partial(_store, connection, each)) for each in batches)
        with connection.begin():
            ids: Sequence[UUID] = connection.scalars(_IDS, {"ids": FORGOTTEN}).all()
        forgotten = sum(timed(partial(_forget, connection, each)) for each in ids)
    return {"stored_per_second": BATCH * BATCHES / stored, "forget_ms": 1000 * forgotten / len(ids)}


def _heartbeat() -> Heartbeat:
    body = (HEARTBEAT % uuid4()).replace(
        "2026-05-02T02:30:00", _now().strftime("%Y-%m-%dT%H:%M:%S")
    )
    return parse(body)


def _store(connection: Connection, heartbeats: Sequence[Heartbeat]) -> None:
    with connection.begin():
        store.insert(connection, heartbeats)


def _forget(connection: Connection, instance_id: UUID) -> None:
    with connection.begin():
        store.forget(connection, instance_id)


def _upgraded(engine: Engine) -> dict[str, Any]:
    """Measure the upgrade of one table while heartbeats are stored, and of deleting its rows."""
    migrate_to(engine, "0004")
    until = _now()
    since = until - timedelta(days=100)
    with engine.begin() as connection:
        _fill(connection, OLD, since, until)
    vacuum(engine)
    waits, ended = list[float](), Event()

    def store_on() -> None:
        with engine.connect() as connection:
            while not ended.is_set():
                waits.append(timed(lambda: _store(connection, [_heartbeat()])))

    storing = Thread(target=store_on)
    storing.start()
    try:
        took = timed(lambda: migrate_to(engine, "head"))
    finally:
        ended.set()
        storing.join()
    wal, cutoff = _wal(engine), since + timedelta(days=50)
    deleted = timed(lambda: _delete(engine, cutoff))
    return {
        "heartbeats": OLD,
        "upgrade_s": took,
        "longest_wait_s": max(waits),
        "stored_meanwhile": len(waits),
        "deleted": OLD // 2,
        "delete_s": deleted,
        "delete_wal_bytes": _wal(engine) - wal,
    }


def _delete(engine: Engine, cutoff: datetime) -> None:
    more = True
    while more:
        with engine.begin() as connection:
            more = weeks.delete(connection, cutoff)


def _wal(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(_WAL).scalar_one())


def table(result: dict[str, Any]) -> str:
    """Return the results as a table."""
    weekly, old = result["by_week"], result["upgraded"]
    rows = [
        ("what", "took"),
        ("---", "---:"),
        (
            f"storing {BATCH} at a time, with {weekly['heartbeats']:,} in {weekly['weeks']} weeks",
            f"{weekly['stored_per_second']:,.0f} a second",
        ),
        ("deleting an id, in the same tables", f"{weekly['forget_ms']:.1f} ms"),
        (
            f"dropping a week of {A_WEEK:,}",
            f"{weekly['drop_s']:.2f} s, {weekly['drop_wal_bytes'] / 1e6:,.1f} MB of WAL",
        ),
        (
            f"deleting {old['deleted']:,} rows by key, from the unpartitioned table",
            f"{old['delete_s']:.0f} s, {old['delete_wal_bytes'] / 1e6:,.0f} MB of WAL",
        ),
        (f"upgrading a table of {old['heartbeats']:,}", f"{old['upgrade_s']:.1f} s"),
        ("the longest wait of a heartbeat meanwhile", f"{old['longest_wait_s']:.2f} s"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, and write and print the results."""
    DATA.parent.mkdir(exist_ok=True)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "load_15_min": os.getloadavg()[2],
    }
    with servers.running(DATA, say=lambda _: None) as embedded:
        server = create_engine(with_driver(embedded.postgres), isolation_level="AUTOCOMMIT")
        for name, measure in (("upgraded", _upgraded), ("by_week", _by_week)):
            with server.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            url = embedded.postgres.replace("/postgres?", f"/{name}?")
            result[name] = measure(create_engine(with_driver(url), poolclass=NullPool))
            console.print(f"[green]✓[/] {name}: {result[name]}")
        server.dispose()
    RESULT.write_text(f"{json.dumps(rounded(result, 2), indent=1)}\n")
    console.print(table(result))


if __name__ == "__main__":
    try:
        main()
    except servers.ServersError as error:
        console.print(f"[red]✗[/] {error}")
        sys.exit(1)
