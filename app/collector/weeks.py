"""The partitions of ``heartbeat``: one for each week of ``sent_at``, and two others.

A week begins on a Monday, UTC. Its partition is created ahead, and dropped when its last heartbeat
is older than the retention. The DEFAULT partition has heartbeats of weeks without a partition, from
clocks that are wrong. One more has what was stored before the table was partitioned.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import NamedTuple, Self

from psycopg.errors import LockNotAvailable, UndefinedTable
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

WEEK = timedelta(days=7)
AHEAD = 4
"""How many weeks are created ahead: creating them may fail for a month."""
LATE = timedelta(days=2)
"""How long after its week a heartbeat may be received, unless a clock is wrong."""
DELETED_AT_ONCE = 1_000

DEFAULT = "heartbeat_default"
_WEEK = "heartbeat_"
_BEFORE = "heartbeat_before_"

# Shorter than deadlock_timeout, after which the server would cancel one side of a deadlock.
_BOUND = text(
    "SELECT set_config('lock_timeout', '200ms', true), set_config('statement_timeout', '5s', true)"
)
# Requests for an id wait in the meantime. What takes longer stays in DEFAULT, and is deleted there.
_ROOM = text("SELECT set_config('statement_timeout', '3s', true)")
_NAMES = text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
    " WHERE inhparent = CAST('heartbeat' AS regclass) ORDER BY relname"
)
_TODAY = text("SELECT CAST(clock_timestamp() AT TIME ZONE 'UTC' AS date)")
# In the order in which DROP locks them.
_LOCK_DEFAULT = (
    text("LOCK TABLE ONLY heartbeat IN SHARE UPDATE EXCLUSIVE MODE"),
    text("LOCK TABLE heartbeat_default IN ACCESS EXCLUSIVE MODE"),
)
# Attached, because CREATE TABLE … PARTITION OF would block writes to every week.
_MAKE = (
    "CREATE TABLE {name} (LIKE heartbeat INCLUDING ALL)",
    (
        "INSERT INTO {name} SELECT * FROM heartbeat_default"
        " WHERE sent_at >= '{begins}' AND sent_at < '{ends}'"
    ),
    "DELETE FROM heartbeat_default WHERE sent_at >= '{begins}' AND sent_at < '{ends}'",
    "ALTER TABLE heartbeat ATTACH PARTITION {name} FOR VALUES FROM ('{begins}') TO ('{ends}')",
)
_LOCK_ALL = text("LOCK TABLE ONLY heartbeat IN ACCESS EXCLUSIVE MODE")
_NEWER = "SELECT EXISTS (SELECT FROM {name} WHERE received_at >= :cutoff)"
_DROP = "DROP TABLE {name}"
_OLDEST = (
    "SELECT instance_id FROM {name} WHERE received_at < :cutoff ORDER BY received_at LIMIT :limit"
)
# The cutoff again: a newer heartbeat of the same id is not old.
_DELETE = "DELETE FROM {name} WHERE instance_id = ANY(:ids) AND received_at < :cutoff"


class Partition(NamedTuple):
    """A partition, from its first day up to the day ``ends``; None means without a limit."""

    name: str
    begins: date | None
    ends: date | None

    @classmethod
    def week(cls, begins: date) -> Self:
        """Return the partition of the week that begins on a day."""
        return cls(f"{_WEEK}{begins:%Y%m%d}", begins, begins + WEEK)

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the partition with a name."""
        if name == DEFAULT:
            return cls(name, None, None)
        if name.startswith(_BEFORE):
            return cls(name, None, _day(name.removeprefix(_BEFORE)))
        return cls.week(_day(name.removeprefix(_WEEK)))

    def ended(self, at: datetime) -> bool:
        """Return whether it is over."""
        return self.ends is not None and _moment(self.ends) <= at


def _day(digits: str) -> date:
    return datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC).date()


def _moment(day: date) -> datetime:
    return datetime.combine(day, time(tzinfo=UTC))


def partitions(connection: Connection) -> list[Partition]:
    """Return all partitions, in the order of their names."""
    return [Partition.named(name) for name in connection.scalars(_NAMES)]


def make(engine: Engine) -> None:
    """Create the partitions of this week, of the week before, and of ``AHEAD`` weeks after it.

    Heartbeats of these weeks are moved out of DEFAULT. What other transactions have locked is left
    for the next call.
    """
    with engine.begin() as connection:
        found, today = partitions(connection), connection.execute(_TODAY).scalar_one()
    made = {each.begins for each in found}
    first = max((each.ends for each in found if each.begins is None and each.ends), default=None)
    monday = today - timedelta(days=today.weekday())
    for number in range(-1, AHEAD + 1):
        begins = monday + number * WEEK
        if begins not in made and (first is None or begins >= first):
            unless_in_use(engine, partial(_make, week=Partition.week(begins)))


def drop(engine: Engine, cutoff: datetime) -> None:
    """Drop each past partition in which everything was received before ``cutoff``.

    What other transactions have locked is left for the next call.
    """
    with engine.begin() as connection:
        over = [each for each in partitions(connection) if each.ended(cutoff)]
    for each in over:
        unless_in_use(engine, partial(_drop, name=each.name, cutoff=cutoff))


def delete(connection: Connection, cutoff: datetime) -> bool:
    """Delete heartbeats received before ``cutoff`` that will not be dropped with their week.

    They are in a partition without a week, or come from wrong clocks: their week had not begun by
    then, or is long past but has newer heartbeats. A call deletes those of ``DELETED_AT_ONCE``
    installs of each partition. Return whether there may be more.
    """
    found = [
        _delete(connection, each.name, cutoff)
        for each in partitions(connection)
        if each.begins is None or _moment(each.begins) > cutoff or each.ended(cutoff - LATE)
    ]
    return any(found)


def unless_in_use(engine: Engine, work: Callable[[Connection], bool | None]) -> bool | None:
    """Return the result of ``work`` in a transaction, or None if it would wait for a lock."""
    try:
        with engine.begin() as connection:
            connection.execute(_BOUND)
            return work(connection)
    except DBAPIError as error:
        # UndefinedTable: another process has just dropped the partition.
        if not isinstance(error.orig, LockNotAvailable | UndefinedTable):
            raise
        return None


def _make(connection: Connection, week: Partition) -> None:
    connection.execute(_ROOM)
    for lock in _LOCK_DEFAULT:
        connection.execute(lock)
    if week in partitions(connection):  # another process was first
        return
    names = {
        "name": week.name,
        "begins": f"{week.begins} 00:00+00",
        "ends": f"{week.ends} 00:00+00",
    }
    for statement in _MAKE:
        connection.execute(text(statement.format(**names)))


def _drop(connection: Connection, name: str, cutoff: datetime) -> None:
    newer = text(_NEWER.format(name=name))
    # Check once before the lock too, because the lock blocks all others.
    for lock in (None, _LOCK_ALL):
        if lock is not None:
            connection.execute(lock)
        if connection.scalar(newer, {"cutoff": cutoff}):
            return
    connection.execute(text(_DROP.format(name=name)))


def _delete(connection: Connection, name: str, cutoff: datetime) -> bool:
    values = {"cutoff": cutoff, "limit": DELETED_AT_ONCE}
    ids = [*connection.scalars(text(_OLDEST.format(name=name)), values)]
    if ids:
        connection.execute(text(_DELETE.format(name=name)), {"ids": ids, "cutoff": cutoff})
    return len(ids) == DELETED_AT_ONCE
