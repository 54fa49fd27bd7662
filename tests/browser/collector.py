"""The database of a collector, filled day by day with the heartbeats of a fleet."""

from datetime import date, datetime, timedelta

from sqlalchemy import Connection, NullPool, create_engine, text

from app.collector import daily, recount, store
from demo.fleet import Fleet, releases
from migrations import migrate

SEED = 7
AGE = timedelta(hours=1)
"""How long before the end of each day its heartbeats arrived."""
RELEASED = text("INSERT INTO release (version, released_on) VALUES (:version, :day)")


def seed(url: str, *, installs: int, days: int, until: datetime) -> None:
    """Create the tables, and fill them with the heartbeats of a fleet on so many days.

    ``until`` is on the last day, so that day is not over and not counted.
    """
    engine = create_engine(url, poolclass=NullPool)
    first = until.date() - timedelta(days=days - 1)
    with engine.connect() as connection:
        migrate(connection, "collector")
    with engine.begin() as connection:
        list_releases(connection, first, days)
    for day, arrivals in Fleet(SEED, installs=installs, days=days, until=until.date()):
        ends = daily.begins(day + timedelta(days=1))
        with engine.begin() as connection:
            heartbeats = [each.heartbeat for each in arrivals if each.received_at <= until]
            store.insert(connection, heartbeats, at=min(ends, until) - AGE)
        if ends <= until:
            recount.catch_up(engine, now=ends + daily.SETTLED)


def list_releases(connection: Connection, first: date, days: int) -> None:
    """List the releases of a fleet, so that the page names them."""
    for release in releases(days):
        day = first + timedelta(days=release.day)
        connection.execute(RELEASED, {"version": release.version, "day": day})
