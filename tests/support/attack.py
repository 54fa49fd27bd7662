"""A fleet of true installs, and an attack on its numbers with invented installs."""

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine, text

from app.collector import store
from app.payload import Counts, Heartbeat1, parse
from demo.fleet import Batch, Fleet, by_minute, releases
from tests.support.collector import changed

TODAY = datetime(2026, 11, 12, 10, tzinfo=UTC)
"""When the maintainer of the example in docs/collector.md looks."""

DAYS, INSTALLS = 40, 300
ATTACKED = 10
"""Days until yesterday, on each of which more installs were invented."""

KINDS = {
    # Obvious: a version and a label that show on the page.
    ("99999.0.0", "consentos-is-spyware"): 300,
    # Plausible, and all alike.
    ("0.3.1", "kubernetes"): 300,
    # Plausible, and each different.
    ("0.4.0", "podman"): 400,
}
"""How many of each are invented on a day: each client's 50 ids a day, of 200 addresses, in all."""

BUCKETS = ("0", "1-10", "10-100", "100-1k", "1k-10k", "10k+")


def set_clock(engine: Engine, to: datetime) -> None:
    """Move the database's clock to another time, for all sessions opened after that."""
    own = engine.url.database
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS clock"))
        for name in ("now", "clock_timestamp"):
            connection.execute(
                text(
                    f"CREATE OR REPLACE FUNCTION clock.{name}() RETURNS timestamptz STABLE"
                    " LANGUAGE sql AS"
                    f" $$SELECT pg_catalog.{name}() + current_setting('clock.shift')::interval$$"
                )
            )
        shift = connection.scalar(
            text("SELECT CAST(CAST(:to AS timestamptz) - pg_catalog.now() AS text)"), {"to": to}
        )
        path = "clock, public, pg_catalog"
        for setting, value in (("search_path", path), ("clock.shift", f"'{shift}'")):
            connection.execute(text(f'ALTER DATABASE "{own}" SET {setting} = {value}'))


def store_fleet(engine: Engine, *, installs: int, days: int, until: date) -> None:
    """Store a fleet's heartbeats as a collector would have, and list its releases."""
    first = until - timedelta(days=days - 1)
    with engine.begin() as connection:
        for release in releases(days):
            connection.execute(
                text("INSERT INTO release VALUES (:version, :on)"),
                {"version": release.version, "on": first + timedelta(days=release.day)},
            )
        for _, arrivals in Fleet(7, installs=installs, days=days, until=until):
            for batch in by_minute(arrivals):
                store.insert(connection, batch.heartbeats, at=batch.at)


def store_attack(engine: Engine) -> None:
    """Store the heartbeats of invented installs; each is kept up until yesterday."""
    for batch in _attack(TODAY.date()):
        with engine.begin() as connection:
            store.insert(connection, batch.heartbeats, at=batch.at)


def _attack(today: date) -> Iterator[Batch]:
    rng = random.Random(11)  # noqa: S311 - test data, the same in each run
    invented: dict[tuple[str, str], list[list[Heartbeat1]]] = {kind: [] for kind in KINDS}
    for day in (today - timedelta(days=ago) for ago in range(ATTACKED, 0, -1)):
        for hour, (kind, count) in enumerate(KINDS.items(), start=4):
            at = datetime(day.year, day.month, day.day, hour, 10, tzinfo=UTC)
            new = [_invent(rng, kind) for _ in range(count)]
            for part in range(4):
                minute = at + timedelta(minutes=10 * part, seconds=rng.randint(0, 59))
                yield _sent(minute, new[part::4])
            again = [
                each
                for age, of in enumerate(reversed(invented[kind]), 2)
                if _sends(age)
                for each in of
            ]
            yield _sent(at + timedelta(hours=1), again)
            invented[kind].append(new)


def _sends(age: int) -> bool:
    """Whether an install sends: on each day until it is established, then on every second day."""
    return age <= store.ESTABLISHED_DAYS or age % 2 == 1


def _invent(rng: random.Random, kind: tuple[str, str]) -> Heartbeat1:
    version, label = kind
    differs = label == "podman"
    counts = {name: rng.choice(BUCKETS) if differs else "1-10" for name in Counts.model_fields}
    python = f"3.12.{rng.randint(0, 9) if differs else 4}"
    number = f"{rng.getrandbits(128):032x}"
    instance_id = "-".join((number[:8], number[8:12], f"4{number[13:16]}", "8000", number[20:]))
    heartbeat = parse(
        changed(
            instance_id=instance_id,
            version=version,
            deployment=label,
            counts=counts,
            python_version=python,
        )
    )
    assert isinstance(heartbeat, Heartbeat1)
    return heartbeat


def _sent(at: datetime, heartbeats: Sequence[Heartbeat1]) -> Batch:
    sent_at = at.isoformat(timespec="seconds")
    return Batch(at, [each.model_copy(update={"sent_at": sent_at}) for each in heartbeats])
