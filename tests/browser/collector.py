"""A collector to look at: its database, as a fleet's heartbeats fill it day by day."""

from datetime import date, datetime, timedelta

from sqlalchemy import Connection, NullPool, create_engine, text

from app.collector import daily, recount, store
from demo.fleet import Fleet, releases
from migrations import migrate

SEED = 7
AGE = timedelta(hours=1)
"""How long before each day's end its heartbeats came."""
RELEASED = text("INSERT INTO release (version, released_on) VALUES (:version, :day)")


def seed(url: str, *, installs: int, days: int, until: datetime) -> None:
    """Make the tables, and fill them with a fleet that has been heard of for so many days.

    The last of them is not over ``until`` then, and so it is not counted.
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
    """Have the versions of a fleet be named, whose first day is given."""
    for release in releases(days):
        day = first + timedelta(days=release.day)
        connection.execute(RELEASED, {"version": release.version, "day": day})
