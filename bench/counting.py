"""Writing a heartbeat costs the same with ten thousand consents as with five million."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.figure import Figure
from sqlalchemy import Connection, Engine, event, text

from app import facts
from app.pipeline import Pipeline
from app.settings import Settings
from bench.plain import COUNT
from bench.rig import Install, Rig

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
"""Consents in the last 24 hours; as many again are older."""

SCANS = 1_000_000
"""Scans of a year, most of them older than a day: the table has no index on their time."""

WRITES = 15
"""The median of this many writes is reported."""

# Rows in the order of their time, as an application writes them, and about as wide as real ones.
_CONSENTS = text(
    """
    INSERT INTO consent_records (id, site_id, visitor_id, action, categories, tc_string, ip_hash,
                                 user_agent, page_url, country_code, consented_at)
    SELECT md5(i::text)::uuid, (SELECT id FROM sites LIMIT 1), md5(i::text), 'accept_all',
           '["necessary", "analytics"]', 'CQ' || md5(i::text), md5((-i)::text),
           'Mozilla/5.0 (X11; Linux x86_64)', 'https://www.example/', 'DE',
           now() - interval '24 hours' + i * (interval '24 hours' / CAST(:size AS integer))
    FROM generate_series(1 - CAST(:size AS integer), CAST(:size AS integer)) AS i
    """
)
_SCANS = text(
    """
    INSERT INTO scan_jobs (site_id, created_at)
    SELECT (SELECT id FROM sites LIMIT 1),
           now() - interval '365 days' + i * (interval '365 days' / CAST(:size AS integer))
    FROM generate_series(1, CAST(:size AS integer)) AS i
    """
)
# Half of the loading time is spent on keys and indexes that no count reads.
_QUICKER_TO_LOAD = text(
    """
    ALTER TABLE consent_records DROP CONSTRAINT consent_records_pkey,
        DROP CONSTRAINT consent_records_site_id_fkey, SET (autovacuum_enabled = off);
    ALTER TABLE scan_jobs DROP CONSTRAINT scan_jobs_site_id_fkey, SET (autovacuum_enabled = off);
    DROP INDEX ix_consent_records_site_id;
    """
)

Say = Callable[[str], None]


def measure(rig: Rig, say: Say) -> dict[str, Any]:
    """Return what a write, and a plain count, take at each size."""
    install = rig.install()
    with install.engine.begin() as connection:
        connection.execute(_QUICKER_TO_LOAD)
    sizes = []
    for size in SIZES:
        say(f"loading {2 * size:,} consents")
        _load(install, "consent_records", _CONSENTS, size)
        say(f"counting {size:,} consents of the last day, never vacuumed")
        fresh = _both_ways(install)
        _vacuum(install, "consent_records")
        say(f"counting {size:,} consents of the last day, vacuumed")
        sizes.append({"consents": size, "fresh": fresh, "vacuumed": _both_ways(install)})
    say(f"loading {SCANS:,} scans")
    _load(install, "scan_jobs", _SCANS, SCANS)
    _vacuum(install, "scan_jobs")
    scans = {"scan_jobs": SCANS, "vacuumed": _both_ways(install)}
    return {"sizes": sizes, "scans": scans, "round_trips": _round_trips(install)}


def _load(install: Install, table: str, statement: Any, size: int) -> None:
    with install.engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {table}"))
        connection.execute(statement, {"size": size})


def _vacuum(install: Install, table: str) -> None:
    with install.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text(f"VACUUM (ANALYZE) {table}"))


def _both_ways(install: Install) -> dict[str, Any]:
    with install.engine.begin() as connection:
        census = facts._CENSUS.text  # noqa: SLF001 - the statement itself is what is measured
        ours, plain = _explained(connection, census), _explained(connection, COUNT)
    return {"write": _writes(install), "census": ours, "plain": plain}


def _explained(connection: Connection, statement: str) -> dict[str, float]:
    """Return a statement's time in milliseconds, planning included, and the buffers it touched.

    The best of three, to be fair to ``count(*)``, which reads many more pages.
    """
    explain = text(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}")
    runs = []
    for _ in range(3):
        (plan,) = connection.execute(explain).scalar_one()
        buffers = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
        runs.append({"ms": plan["Planning Time"] + plan["Execution Time"], "buffers": buffers})
    return min(runs, key=lambda run: run["ms"])


def _pipeline(install: Install) -> Pipeline:
    return Pipeline(Settings.model_validate(install.env))


def _writes(install: Install) -> dict[str, float]:
    """Return the median milliseconds of a whole write, and of its time in the database."""
    pipeline = _pipeline(install)
    whole, waited = [], []
    for day in range(WRITES):
        install.make_it_the_past(day)
        with _watched() as statements:
            started = time.perf_counter()
            assert pipeline.write_heartbeat()  # noqa: S101 - without a write there is nothing to measure
            whole.append(1000 * (time.perf_counter() - started))
        waited.append(sum(statements))
    with install.engine.begin() as connection:
        connection.execute(text("DELETE FROM telemetry_outbox"))
    # The first write also imports modules.
    return {"ms": statistics.median(whole[1:]), "database_ms": statistics.median(waited[1:])}


@contextmanager
def _watched() -> Iterator[list[float]]:
    """Collect how many milliseconds each statement takes, of every engine."""
    took: list[float] = []

    def before(*_: object) -> None:
        took.append(-time.perf_counter())

    def after(*_: object) -> None:
        took[-1] = 1000 * (took[-1] + time.perf_counter())

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        yield took
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)


def _round_trips(install: Install) -> int:
    """Return the round trips of a write of a known install, BEGIN and COMMIT included."""
    pipeline = _pipeline(install)
    install.make_it_the_past(0)
    pipeline.write_heartbeat()
    install.make_it_the_past(1)
    with _watched() as statements:
        pipeline.write_heartbeat()
    return len(statements) + len(("BEGIN", "COMMIT"))


def draw(result: dict[str, Any]) -> Figure:
    """Show both ways over the number of consents, both axes logarithmic."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [size["consents"] for size in result["sizes"]]
    lines: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("count(*), the statement", "s--", lambda state: state["plain"]["ms"]),
        ("ours, the statement", "o--", lambda state: state["census"]["ms"]),
        ("ours, the whole write", "o-", lambda state: state["write"]["ms"]),
    )
    for label, style, value in lines:
        axes.plot(sizes, [value(size["vacuumed"]) for size in result["sizes"]], style, label=label)
    axes.set(xscale="log", yscale="log", ylabel="milliseconds", ylim=(1, None))
    axes.set_xlabel("consents in the last 24 hours (as many again are older)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
