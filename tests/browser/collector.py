"""A collector to look at: its database, as a fleet's heartbeats fill it day by day."""

from datetime import datetime, timedelta

from sqlalchemy import NullPool, create_engine

from app.collector import daily, store
from app.demo.fleet import Fleet
from migrations import migrate

SEED = 7
AGE = timedelta(hours=1)
"""How long before each count its heartbeats came."""


def seed(url: str, *, installs: int, days: int, until: datetime) -> None:
    """Make the tables, and fill them with a fleet that has been heard of for so many days."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector")
    for day, arrivals in Fleet(SEED, installs=installs, days=days, until=until.date()):
        ends = min(daily.begins(day + timedelta(days=1)), until)
        heartbeats = [each.heartbeat for each in arrivals if each.received_at <= ends]
        with engine.begin() as connection:
            store.insert(connection, heartbeats, at=ends - AGE)
            daily.measure(connection, now=ends)
