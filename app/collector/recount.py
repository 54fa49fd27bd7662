"""Which days must be counted, and how earlier days are counted again.

Yesterday is counted from the installs as they are. An earlier day is counted from the stored
heartbeats: they are replayed day by day, from 31 days before the first day to count, because an
install is lost after 30. Each day is a separate transaction, so a process that was
stopped continues where it stopped. Both ways give the same numbers, however late a day is counted.
"""

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from time import sleep
from typing import NamedTuple

from psycopg.errors import SerializationFailure
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from app.collector import daily
from app.collector.daily import DAY, begins

BEFORE = timedelta(days=31)
"""How long before the first day to count the replay begins."""

LOOK_SECONDS = 0.2
"""How often to check the progress of another process."""

_MINE = text("SELECT pg_try_advisory_xact_lock(hashtext('consentos-collector counting'))")
_ROOM = text(
    "SELECT set_config('work_mem', '64MB', true), set_config('statement_timeout', '10min', true)"
)
_CLOCK = text("SELECT clock_timestamp()")
_OF_THE_FUTURE = (
    text("DELETE FROM measured WHERE day > :last"),
    text("DELETE FROM daily WHERE day > :last"),
)
_LAST_COUNTED = text("SELECT max(day) FROM measured")
_FIRST_HEARD = text("SELECT CAST(min(first_seen) AT TIME ZONE 'UTC' AS date) FROM install")
_UNDER_WAY = text("SELECT since, replayed FROM recount")
_BEGIN = text(
    """
    INSERT INTO recount (since) VALUES (:since)
    ON CONFLICT (single) DO UPDATE SET replayed = NULL, since = least(excluded.since,
        greatest(recount.since, recount.replayed + 1))
    """
)
_KEPT_SINCE = text("SELECT CAST(min(received_at) AT TIME ZONE 'UTC' AS date) FROM heartbeat")
_FIRST_COUNTED = text("SELECT min(day) FROM measured")
_REPLAYED = text(
    "SELECT CAST(seen AT TIME ZONE 'UTC' AS date) FROM replay WHERE instance_id = :nil"
)
_CLEAR = text("TRUNCATE replay")
# Sort narrow rows: a body is only read if it is the last of its install on the day.
_REPLAY = text(
    """
    WITH last AS (
        SELECT DISTINCT ON (instance_id) instance_id, sent_at
        FROM heartbeat
        WHERE received_at >= :begins AND received_at < :ends
        ORDER BY instance_id, received_at DESC, sent_at DESC
    )
    INSERT INTO replay (instance_id, seen, body)
    SELECT instance_id, received_at, body
    FROM last JOIN heartbeat USING (instance_id, sent_at)
    WHERE received_at >= :begins AND received_at < :ends
    ON CONFLICT (instance_id) DO UPDATE SET seen = excluded.seen, body = excluded.body
    """
)
_NOT_NEEDED = text(
    """
    DELETE FROM replay WHERE seen < :begins - interval '31 days'
        OR NOT EXISTS (SELECT FROM install WHERE install.instance_id = replay.instance_id)
    """
)
_REPLAYED_TO = text(
    """
    INSERT INTO replay (instance_id, seen, body) VALUES (:nil, :begins, '{}')
    ON CONFLICT (instance_id) DO UPDATE SET seen = excluded.seen
    """
)
_BEGIN_ANEW = text("UPDATE recount SET since = greatest(since, replayed + 1), replayed = NULL")
_PROGRESS = text("UPDATE recount SET replayed = :day")
_END = text("DELETE FROM recount")

NIL = "00000000-0000-0000-0000-000000000000"
"""The row with this id holds the last replayed day; no install has this id."""


class Progress(NamedTuple):
    """The progress of a recount: the last replayed day, and the span."""

    since: date
    replayed: date | None
    until: date

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        first = self.since - BEFORE
        whole = (self.until - first).days + 1
        return ((self.replayed - first).days + 1) / whole if self.replayed else 0.0


def clock(connection: Connection) -> datetime:
    """Return the database's time, by which a day ends."""
    now: datetime = connection.execute(_CLOCK).scalar_one()
    return now


def progress(connection: Connection) -> Progress | None:
    """Return the progress of the recount; None if none is running."""
    row = connection.execute(_UNDER_WAY).one_or_none()
    return Progress(row.since, row.replayed, daily.finished(clock(connection))) if row else None


def earliest(connection: Connection) -> date | None:
    """Return the first day that can be counted again; None if no heartbeat is stored.

    A count also reads the heartbeats of the 31 days before. Once heartbeats were deleted, the first
    day is therefore 31 days after the oldest that is stored.
    """
    kept_since, first = connection.scalar(_KEPT_SINCE), connection.scalar(_FIRST_COUNTED)
    if kept_since is None:
        return None
    pruned = first is not None and first < kept_since
    since: date = kept_since + BEFORE if pruned else kept_since
    return since


def request(connection: Connection, since: date) -> date | None:
    """Request that all days from ``since`` on are counted again; return the first of them.

    It is earlier than ``since`` if a day before was never counted, and later if heartbeats were
    deleted, see ``earliest``. None means that no day can be counted again and nothing was changed.
    """
    possible, due = earliest(connection), _first_due(connection)
    if possible is None:
        return None
    since = max(min(since, due or since), possible)
    connection.execute(_BEGIN, {"since": since})
    return since


def finish(engine: Engine) -> Iterator[Progress]:
    """Count until no recount is running; yield the progress, also that of other processes."""
    while (came := _look(engine)) is not None:
        yield came
        if not step(engine):
            sleep(LOOK_SECONDS)


def _look(engine: Engine) -> Progress | None:
    with engine.connect() as connection:
        return progress(connection)


def step(engine: Engine, *, now: datetime | None = None) -> bool:
    """Count or replay one day that is due, and commit it; return whether there may be another.

    If another process is counting, do nothing. ``now`` is the database's time by default.
    """
    # In one snapshot, which is older than ``now``: it contains nothing of tomorrow.
    in_one_snapshot = engine.execution_options(isolation_level="REPEATABLE READ")
    try:
        with in_one_snapshot.begin() as connection:
            if not connection.scalar(_MINE):
                return False
            connection.execute(_ROOM)
            return _step(connection, now or clock(connection))
    except OperationalError as error:
        if isinstance(error.orig, SerializationFailure):
            return True  # another recount was requested in the meantime
        raise


def catch_up(engine: Engine, *, now: datetime | None = None) -> None:
    """Count every day that is due, one after the other."""
    while step(engine, now=now):
        pass


def _step(connection: Connection, now: datetime) -> bool:
    last = daily.finished(now)
    for statement in _OF_THE_FUTURE:
        connection.execute(statement, {"last": last})
    under_way = connection.execute(_UNDER_WAY).one_or_none()
    if under_way:
        return _replay_next(connection, under_way.since, under_way.replayed, last)
    due = _first_due(connection)
    if due is None or due > last or now >= begins(last + 2 * DAY):
        return False  # nothing is due, or midnight was less than ``SETTLED`` ago
    if due < last:
        connection.execute(_BEGIN, {"since": due})
        return True
    daily.count(connection, last, replayed=False)
    return False


def _first_due(connection: Connection) -> date | None:
    counted: date | None = connection.scalar(_LAST_COUNTED)
    first: date | None = None if counted else connection.scalar(_FIRST_HEARD)
    return counted + DAY if counted else first


def _replay_next(connection: Connection, since: date, replayed: date | None, last: date) -> bool:
    """Replay one day, and count it unless it is before ``since``."""
    if since > last or replayed == last:
        connection.execute(_CLEAR)
        connection.execute(_END)
        return False
    if connection.scalar(_REPLAYED, {"nil": NIL}) != replayed:  # a crash has emptied the table
        connection.execute(_CLEAR)
        connection.execute(_BEGIN_ANEW)
        return True
    day = replayed + DAY if replayed else since - BEFORE
    connection.execute(_REPLAY, {"begins": begins(day), "ends": begins(day + DAY)})
    connection.execute(_NOT_NEEDED, {"begins": begins(day)})
    connection.execute(_REPLAYED_TO, {"nil": NIL, "begins": begins(day)})
    connection.execute(_PROGRESS, {"day": day})
    if day >= since:
        daily.count(connection, day, replayed=True)
    return True
