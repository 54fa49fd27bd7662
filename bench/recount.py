"""What counting costs: a day of a million installs, and the first count of an old collector.

``python -m bench.recount`` fills embedded servers with the bodies of a simulated fleet, counts,
writes bench/results/recount.json and prints it as a table.
"""

import json
import os
import sys
import time
from datetime import UTC, date, datetime, timedelta
from typing import Any

from rich.console import Console
from sqlalchemy import Engine, NullPool, create_engine, text

from app.collector import daily, recount
from bench.rig import ROOT, rounded, timed, vacuum, with_driver
from demo import servers
from demo.fleet import Fleet
from migrations import migrate

DATA = ROOT / ".data" / "bench-recount"
RESULT = ROOT / "bench" / "results" / "recount.json"

INSTALLS = 1_000_000
OLD_INSTALLS, OLD_DAYS = 20_000, 200
"""The days of a collector that has stored its heartbeats and has counted no day yet."""
BODIES = 1_000
"""The number of different bodies, which are used again and again."""

console = Console(highlight=False, soft_wrap=True)

_BODIES = text(
    "CREATE TABLE bodies AS SELECT row_number() OVER () AS n, body"
    " FROM jsonb_array_elements(CAST(:bodies AS jsonb)) AS body"
)
_GROWN = text(
    """
    INSERT INTO install (instance_id, first_seen, last_seen, body, days_heard, established_on,
        former_seen, former_body)
    SELECT gen_random_uuid(), :day - interval '90 days', :day + interval '150 minutes', body, 30,
        CAST(:day AS date) - 80 + g % 81, :day - interval '1290 minutes', body
    FROM generate_series(1, :installs) AS g JOIN bodies ON n = 1 + g % :bodies
    """
)
_A_DAY = text(
    """
    INSERT INTO heartbeat (instance_id, sent_at, received_at, body)
    SELECT id, at, at, body
    FROM ids JOIN bodies ON n = 1 + k % :bodies
    CROSS JOIN LATERAL (SELECT :day + interval '150 minutes' + k * interval '40 ms' AS at) AS sent
    """
)
_INSTALLS = text(
    """
    INSERT INTO install (instance_id, first_seen, last_seen, body)
    SELECT DISTINCT ON (instance_id) instance_id, min(received_at) OVER (PARTITION BY instance_id),
        received_at, body
    FROM heartbeat ORDER BY instance_id, received_at DESC
    """
)
_TEMPORARY = text("SELECT temp_bytes FROM pg_stat_database WHERE datname = current_database()")


def _day_of_a_million(engine: Engine, day: date) -> dict[str, Any]:
    migrate_to(engine, "head")
    with engine.begin() as connection:
        connection.execute(_BODIES, {"bodies": _bodies(day)})
        grown = {"day": daily.begins(day), "installs": INSTALLS, "bodies": BODIES}
        connection.execute(_GROWN, grown)
    vacuum(engine)
    before = _temporary(engine)
    seconds = timed(lambda: _count(engine, day))
    return {"installs": INSTALLS, "s": seconds, "temporary_bytes": _temporary(engine) - before}


def _count(engine: Engine, day: date) -> None:
    with engine.begin() as connection:
        daily.count(connection, day, replayed=False)


def _old_collector(engine: Engine, last: date) -> dict[str, Any]:
    migrate_to(engine, "0003")
    with engine.begin() as connection:
        connection.execute(_BODIES, {"bodies": _bodies(last)})
        ids = "SELECT gen_random_uuid() AS id, k FROM generate_series(1, :installs) AS k"
        connection.execute(text(f"CREATE TABLE ids AS {ids}"), {"installs": OLD_INSTALLS})
        for days in range(OLD_DAYS):
            day = daily.begins(last - timedelta(days=days))
            connection.execute(_A_DAY, {"day": day, "bodies": BODIES})
        connection.execute(_INSTALLS)
    vacuum(engine)
    migrated = timed(lambda: migrate_to(engine, "0004"))
    migrate_to(engine, "head")
    counted = timed(lambda: recount.catch_up(engine))
    return {
        "installs": OLD_INSTALLS,
        "days": OLD_DAYS,
        "heartbeats": OLD_INSTALLS * OLD_DAYS,
        "migrate_s": migrated,
        "count_s": counted,
    }


def migrate_to(engine: Engine, revision: str) -> None:
    """Migrate the collector's tables to a revision."""
    with engine.connect() as connection:
        migrate(connection, "collector", revision)


def _bodies(until: date) -> str:
    fleet = Fleet(20260502, installs=2 * BODIES, days=2, until=until)
    bodies = [arrival.heartbeat.canonical() for _, arrivals in fleet for arrival in arrivals]
    return f"[{','.join(bodies[-BODIES:])}]"


def _temporary(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(_TEMPORARY).scalar_one())


def table(result: dict[str, Any]) -> str:
    """Return the results as a table."""
    million, old = result["million"], result["old"]
    megabytes = million["temporary_bytes"] / 1e6
    of_old = f"{old['days']} days of {old['installs']:,} installs, {old['heartbeats']:,} heartbeats"
    rows = [
        ("what", "took"),
        ("---", "---:"),
        (f"counting a day of {million['installs']:,} installs", f"{million['s']:.1f} s"),
        ("temporary files of that count", f"{megabytes:,.0f} MB"),
        (f"the first count: {of_old}", f"{old['count_s']:.0f} s"),
        ("migration 0004 of these heartbeats", f"{old['migrate_s']:.0f} s"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, and write and print the results."""
    DATA.parent.mkdir(exist_ok=True)
    last = datetime.now(UTC).date() - timedelta(days=1)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "load_15_min": os.getloadavg()[2],
    }
    with servers.running(DATA, say=lambda _: None) as embedded:
        server = create_engine(with_driver(embedded.postgres), isolation_level="AUTOCOMMIT")
        for name, measure in (("million", _day_of_a_million), ("old", _old_collector)):
            with server.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            url = embedded.postgres.replace("/postgres?", f"/{name}?")
            result[name] = measure(create_engine(with_driver(url), poolclass=NullPool), last)
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
