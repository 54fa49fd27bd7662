"""A collector of ten thousand installs: what it accepts, counts, stores and shows.

``python -m bench.collector`` has a simulated fleet (``demo.fleet``) send for ninety days to a
collector of each size, measures, writes bench/results/collector.json and prints it as a table.
"""

import json
import os
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

from rich.console import Console
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

from app.collector import daily, store
from bench.rig import ROOT, RigError, rounded, with_driver
from demo import servers
from demo.fleet import Arrival, Fleet, releases
from migrations import migrate

DATA = ROOT / ".data" / "bench-collector"
RESULT = ROOT / "bench" / "results" / "collector.json"

SIZES = (100, 10_000)
DAYS = 90
WHOLE_DAYS = 3
"""On the last days every heartbeat goes through ``store.insert``. Before them nothing is written
but what that leaves of a day once its heartbeats are deleted, the installs: no disk is filled.
"""
AT_ONCE = 500
"""Heartbeats in a transaction: as many as a collector commits at once when a thousand wait."""
COUNTS = 5
READS = 40
PATIENCE = 60.0
"""Seconds for a collector to start and to count."""

_ARRIVED = "CREATE TEMP TABLE arrived (id uuid, seen timestamptz, body jsonb) ON COMMIT DROP"
_HEARD_OF = text(
    """
    INSERT INTO install (instance_id, first_seen, last_seen, body)
    SELECT DISTINCT ON (id) id, seen, seen, body FROM arrived ORDER BY id, seen DESC
    ON CONFLICT (instance_id) DO UPDATE SET last_seen = excluded.last_seen, body = excluded.body,
        former_seen = install.last_seen, former_body = install.body,
        days_heard = install.days_heard + 1,
        established_on = coalesce(install.established_on, CASE
            WHEN install.days_heard + 1 >= 3
            THEN CAST(excluded.last_seen AT TIME ZONE 'UTC' AS date) END)
    """
)
_RELEASED = text("INSERT INTO release (version, released_on) VALUES (:version, :day)")
# A partitioned table has no bytes of its own, and an ordinary one has no partition tree.
_BYTES = text(
    """
    SELECT pg_total_relation_size(named.id) + coalesce((
        SELECT CAST(sum(pg_total_relation_size(relid)) AS bigint)
        FROM pg_partition_tree(named.id)
    ), 0)
    FROM (SELECT CAST(:name AS regclass) AS id) AS named
    """
)

console = Console(highlight=False, soft_wrap=True)


def begin(engine: Engine, until: date, days: int) -> None:
    """Create the tables, and list what a fleet has released in the ``days`` up to ``until``."""
    with engine.connect() as connection:
        migrate(connection, "collector")
    with engine.begin() as connection:
        for release in releases(days):
            day = until - timedelta(days=days - 1 - release.day)
            connection.execute(_RELEASED, {"version": release.version, "day": day})


def measure(embedded: servers.Servers, installs: int, until: date) -> dict[str, Any]:
    """Return what a collector of so many installs accepts, counts, stores and shows."""
    url = _database(embedded.postgres, f"collector_{installs}")
    engine = create_engine(with_driver(url), poolclass=NullPool)
    begin(engine, until, DAYS)
    result: dict[str, Any] = {"installs": installs, "heartbeats": 0}
    for number, (day, arrivals) in enumerate(
        Fleet(20260502, installs=installs, days=DAYS, until=until)
    ):
        result["heartbeats"] += len(arrivals)
        if number < DAYS - WHOLE_DAYS:
            with engine.begin() as connection:
                _hear_of(connection, arrivals)
        else:
            result["ingest"] = _ingest(engine, arrivals)
        _vacuum(engine)
        _count(engine, day)
        _say(installs, f"{day}: {len(arrivals):,} heartbeats")
    _vacuum(engine)
    result["measure_s"] = _median(COUNTS, lambda: _count(engine, until))
    with engine.begin() as connection:
        result |= _held(connection, until)
    result["read"] = _reading(engine, until)
    result["page"] = _shown(embedded, url, engine)
    return result


def _hear_of(connection: Connection, arrivals: Sequence[Arrival]) -> None:
    """Store what remains when a day's heartbeats are deleted: the installs."""
    connection.execute(text(_ARRIVED))
    cursor = connection.connection.cursor()
    with cursor.copy("COPY arrived FROM STDIN") as copy:
        for at, heartbeat in arrivals:
            copy.write_row((heartbeat.instance_id, at, heartbeat.canonical()))
    connection.execute(_HEARD_OF)


def _ingest(engine: Engine, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Accept a day's heartbeats in batches, and commit one after the other."""
    began = time.perf_counter()
    with engine.connect() as connection:
        for batch in _batches(arrivals):
            with connection.begin():
                store.insert(
                    connection, [each.heartbeat for each in batch], at=batch[-1].received_at
                )
    took = time.perf_counter() - began
    return {"heartbeats": len(arrivals), "s": took, "a_second": len(arrivals) / took}


def _batches(arrivals: Sequence[Arrival]) -> Iterator[Sequence[Arrival]]:
    for first in range(0, len(arrivals), AT_ONCE):
        yield arrivals[first : first + AT_ONCE]


def _count(engine: Engine, day: date) -> None:
    """Count a day after its end."""
    with engine.begin() as connection:
        daily.count(connection, day, replayed=False)


def _held(connection: Connection, until: date) -> dict[str, Any]:
    """Return the size of the tables in rows, and in bytes with their indexes."""
    active = daily.stocks(connection, until, until, daily.Filter())[until]
    tables = {
        name: {
            "rows": connection.scalar(text(f"SELECT count(*) FROM {name}")),  # noqa: S608 - our own words
            "bytes": connection.scalar(_BYTES, {"name": name}),
        }
        for name in ("heartbeat", "install", "daily")
    }
    return {"movements": active, "tables": tables}


def _reading(engine: Engine, until: date) -> dict[str, float]:
    """Return the milliseconds of each of the page's queries, over all of the days."""
    since = until - timedelta(days=DAYS - 1)
    everyone, few = daily.Filter(), daily.Filter(version="0.4.1", edition="ee")
    with engine.connect() as connection:
        asked: dict[str, Callable[[], object]] = {
            "movements": lambda: (
                daily.stocks(connection, since, until, everyone),
                daily.flows(connection, since, until, everyone),
            ),
            "versions": lambda: daily.versions(connection, since, until, everyone),
            "values": lambda: daily.values(connection, until, everyone),
            "versions, filtered": lambda: daily.versions(connection, since, until, few),
        }
        return {name: 1000 * _median(READS, ask) for name, ask in asked.items()}


def _shown(embedded: servers.Servers, url: str, engine: Engine) -> dict[str, float]:
    """Return the milliseconds of a page, seen from outside, of the collector's own process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"PATH": os.environ["PATH"], "COLLECTOR_DATABASE_URL": url, "PORT": str(port)}
    log = DATA / "serve.log"
    argv = [sys.executable, "-m", "app.collector", "serve", "--host", "127.0.0.1"]
    embedded.start(argv, env=env, log=log)
    # It counts when it starts, and that must not be timed.
    _wait(lambda: "collector.ready" in log.read_text() and _has_counted(engine))

    def get(path: str) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
            answer.read()

    paths = ("/?days=90", "/v1/stats.json?days=90", "/?days=90&version=0.4.1&edition=ee")
    return {path: 1000 * _median(READS, partial(get, path)) for path in paths}


def _has_counted(engine: Engine) -> bool:
    with engine.begin() as connection:
        span = daily.span(connection)
    return span is not None and span.last == datetime.now(UTC).date() - timedelta(days=1)


def table(result: dict[str, Any]) -> str:
    """Return the results as a table, one column for each size."""
    sizes = result["sizes"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("heartbeats in total", lambda size: f"{size['heartbeats']:,}"),
        ("active in 48 hours", lambda size: f"{size['movements'][daily.ACTIVE_2D]:,}"),
        ("stored a second", lambda size: f"{size['ingest']['a_second']:,.0f}"),
        ("counting a day", lambda size: f"{1000 * size['measure_s']:,.0f} ms"),
        *((f"the table `{name}`", _size_of(name)) for name in sizes[0]["tables"]),
        *((f"read: {name}", _ms_of("read", name)) for name in sizes[0]["read"]),
        *((f"`GET {path}`", _ms_of("page", path)) for path in sizes[0]["page"]),
    ]
    lines = [
        ["installs", *(f"{size['installs']:,}" for size in sizes)],
        ["---", *("---:" for _ in sizes)],
        *([name, *(cell(size) for size in sizes)] for name, cell in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size_of(name: str) -> Callable[[dict[str, Any]], str]:
    def cell(size: dict[str, Any]) -> str:
        held = size["tables"][name]
        return f"{held['rows']:,} rows, {held['bytes'] / 1e6:,.1f} MB"

    return cell


def _ms_of(part: str, name: str) -> Callable[[dict[str, Any]], str]:
    return lambda size: f"{size[part][name]:.1f} ms"


def _database(maintenance: str, name: str) -> str:
    engine = create_engine(
        with_driver(maintenance), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return maintenance.replace("/postgres?", f"/{name}?")


def _vacuum(engine: Engine) -> None:
    """Do what autovacuum does on a real day."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text("VACUUM ANALYZE install, daily"))


def _median(times: int, work: Callable[[], object]) -> float:
    """Return the median seconds of some work that is repeated."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        if time.monotonic() > deadline:
            raise RigError(f"The collector did not start and count; see {DATA}/serve.log.")
        time.sleep(0.1)


def _say(installs: int, doing: str) -> None:
    if console.is_terminal:
        console.print(f"  {installs:,} installs: {doing}", end="\r")


def main() -> None:
    """Measure each size on servers of its own, and write and print the results."""
    began = time.monotonic()
    DATA.parent.mkdir(exist_ok=True)
    # The last day that can be counted.
    until = datetime.now(UTC).date() - timedelta(days=1)
    sizes = []
    for installs in SIZES:
        with servers.running(DATA, say=lambda _: None) as embedded:
            sizes.append(measure(embedded, installs, until))
        console.print(f"[green]✓[/] {installs:,} installs ({time.monotonic() - began:.0f} s)")
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "load_15_min": os.getloadavg()[2],
        "days": DAYS,
        "whole_days": WHOLE_DAYS,
        "sizes": sizes,
    }
    RESULT.write_text(f"{json.dumps(rounded(result, 3), indent=1)}\n")
    console.print(table(result))
    console.print(f"Done in {time.monotonic() - began:.0f} s; the results are in {RESULT}.")


if __name__ == "__main__":
    try:
        main()
    except (RigError, servers.ServersError) as error:
        console.print(f"[red]✗[/] {error}")
        sys.exit(1)
