"""The collector's SQL on heartbeats and installs: each heartbeat once, nothing about its sender.

A deletion writes a mark for the id, and locks the install's row before it deletes the heartbeats. A
heartbeat's transaction also locks that row, and then looks for marks. So one of the two waits for
the other on that row only. Heartbeats that were stored before the deletion are deleted; later ones
find the mark, and are rejected.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from app.collector import weeks
from app.payload import Heartbeat

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUNDS = (
    "set_config('statement_timeout', '5s', true),"
    # statement_timeout does not bound the statement that sets it; this does, since it is read when
    # a wait for a lock begins.
    " set_config('lock_timeout', '4s', true),"
    # A process that is suspended in a transaction must not hold its locks forever.
    " set_config('idle_in_transaction_session_timeout', '10s', true),"
    # What is acknowledged must survive a crash of the server, also if its default is 'off'.
    " set_config('synchronous_commit', coalesce("
    "nullif(current_setting('synchronous_commit'), 'off'), 'local'), true)"
)
_BOUND = text(f"SELECT {_BOUNDS}")

FORGOTTEN_FOR = timedelta(minutes=5)
"""How long nothing is stored under a deleted id: longer than a heartbeat can take in any process
between its arrival and its commit."""

CLOCKS_DIFFER = "interval '5 minutes'"
"""A stored time that is further ahead of a new one comes from a clock that was ahead."""

# Two heartbeats of an install may be committed in another order than they arrived. A late one only
# changes the former state: how the install was at the end of the day before its last one.
_LATE = (
    "(excluded.last_seen < install.last_seen"
    f" AND excluded.last_seen >= install.last_seen - {CLOCKS_DIFFER})"
)
_DAY = "CAST({} AT TIME ZONE 'UTC' AS date)".format
_ON, _LAST_ON = _DAY("excluded.last_seen"), _DAY("install.last_seen")
_FORMER_ON = f"coalesce({_DAY('install.former_seen')}, '-infinity')"
_ANOTHER_DAY = f"CASE WHEN {_LATE} THEN {_ON} > {_FORMER_ON} ELSE {_ON} <> {_LAST_ON} END"
_DAYS_HEARD = f"install.days_heard + CAST({_ANOTHER_DAY} AS integer)"


def _former(column: str, former: str) -> str:
    return (
        f"CASE WHEN {_LATE} THEN excluded.{column}"
        f" WHEN {_ON} > {_LAST_ON} THEN install.{column} ELSE install.{former} END"
    )


_MARK = "sha256((SELECT key FROM forgotten_key) || uuid_send(CAST({} AS uuid)))".format
_MARKED = f"""
    SELECT id, ceil(extract(
        epoch FROM at + CAST(:forgotten_for AS interval) - clock_timestamp())) AS seconds
    FROM unnest(CAST(:ids AS uuid[])) AS id JOIN forgotten ON mark = {_MARK("id")}
    WHERE at > clock_timestamp() - CAST(:forgotten_for AS interval)
"""  # noqa: S608 - only constants of this module

# In the order of the ids, so that two batches with the same installs cannot deadlock.
_INSERT = f"""
    WITH arrived AS (
        SELECT CAST(body ->> 'instance_id' AS uuid) AS instance_id,
            CAST(body ->> 'sent_at' AS timestamptz) AS sent_at, body
        FROM jsonb_array_elements(CAST(:bodies AS jsonb)) AS body
    ),
    marked AS ({_MARKED}),
    kept AS (
        INSERT INTO heartbeat (instance_id, sent_at, received_at, body)
        SELECT instance_id, sent_at, coalesce(CAST(:at AS timestamptz), now()), body FROM arrived
        WHERE instance_id NOT IN (SELECT id FROM marked)
        ORDER BY instance_id, sent_at
        ON CONFLICT (instance_id, sent_at) DO NOTHING
        RETURNING instance_id, sent_at, received_at, body
    ),
    known AS (
        INSERT INTO install (instance_id, first_seen, last_seen, body, established_on)
        SELECT DISTINCT ON (instance_id) instance_id, received_at, received_at, body,
            CASE WHEN :established_days <= 1 THEN {_DAY("received_at")} END
        FROM kept
        ORDER BY instance_id, sent_at DESC
        ON CONFLICT (instance_id) DO UPDATE SET
            first_seen = least(install.first_seen, excluded.first_seen),
            last_seen = CASE WHEN {_LATE} THEN install.last_seen ELSE excluded.last_seen END,
            body = CASE WHEN {_LATE} THEN install.body ELSE excluded.body END,
            former_seen = {_former("last_seen", "former_seen")},
            former_body = {_former("body", "former_body")},
            days_heard = {_DAYS_HEARD},
            established_on = coalesce(install.established_on, CASE
                WHEN {_DAYS_HEARD} < :established_days THEN NULL
                WHEN {_LATE} THEN {_LAST_ON} ELSE {_ON} END)
        WHERE NOT {_LATE} OR {_ON} < {_LAST_ON} AND {_FORMER_ON} <= {_ON}
            AND excluded.last_seen >= coalesce(install.former_seen, '-infinity')
    )
    SELECT body ->> 'instance_id', body ->> 'sent_at', seconds
    FROM arrived LEFT JOIN marked ON id = instance_id
    WHERE NOT EXISTS (
        SELECT FROM kept
        WHERE kept.instance_id = arrived.instance_id AND kept.sent_at = arrived.sent_at
    )
    """  # noqa: S608 - only constants of this module

# The marks are searched again by a separate statement: it sees what was committed while the one
# before waited for a row.
_DIALECT = URL.create("postgresql+psycopg").get_dialect()()
_KEEP = tuple(
    str(text(statement).compile(dialect=_DIALECT))
    for statement in (f"SELECT {_BOUNDS}", _INSERT, _MARKED)
)
FORGET = (
    text(
        f"""
        INSERT INTO forgotten (mark, at) VALUES ({_MARK(":id")}, clock_timestamp())
        ON CONFLICT (mark) DO UPDATE SET at = excluded.at
        """  # noqa: S608 - as above
    ),
    # Locks the row, also if another transaction is about to insert it.
    text(
        """
        INSERT INTO install (instance_id, first_seen, last_seen, body)
        VALUES (:id, now(), now(), '{}')
        ON CONFLICT (instance_id) DO UPDATE SET instance_id = excluded.instance_id
        """
    ),
    *(
        text(f"DELETE FROM {table} WHERE instance_id = :id")  # noqa: S608 - as above
        for table in ("install", "heartbeat")
    ),
)

_PRUNE_MARKS = text("DELETE FROM forgotten WHERE at <= now() - CAST(:forgotten_for AS interval)")

_SEEN = text(
    """
    SELECT first_seen, last_seen FROM install WHERE instance_id = :id
    UNION ALL
    -- An install that is too old may be deleted a moment before the last of its heartbeats.
    SELECT min(received_at), max(received_at) FROM heartbeat
    WHERE instance_id = :id AND NOT EXISTS (SELECT FROM install WHERE instance_id = :id)
    HAVING count(*) > 0
    """
)

# As text, because Python may not support the year of a sender in the session's time zone.
_HELD = text(
    """
    SELECT to_char(sent_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"+00:00"'),
        received_at, body
    FROM heartbeat
    WHERE instance_id = :id AND sent_at > coalesce(CAST(:after AS timestamptz), '-infinity')
    ORDER BY heartbeat.sent_at LIMIT :limit
    """
)

# Ordered by outcome, so that two collectors cannot deadlock.
_ADD_OUTCOMES = text(
    """
    INSERT INTO ingest (day, outcome, requests)
    SELECT CAST(now() AT TIME ZONE 'UTC' AS date), outcome, requests
    FROM unnest(CAST(:outcomes AS text[]), CAST(:requests AS bigint[])) AS ended (outcome, requests)
    ORDER BY outcome
    ON CONFLICT (day, outcome) DO UPDATE SET requests = ingest.requests + excluded.requests
    """
)

PRUNED_AT_ONCE = 1_000

_CUTOFF = text("SELECT clock_timestamp() - CAST(:retention AS interval)")
_SILENT = text(
    "SELECT instance_id FROM install WHERE last_seen < :cutoff"  # noqa: S608 - as above
    f" ORDER BY last_seen LIMIT {PRUNED_AT_ONCE}"
)
# The cutoff again: an install that has reported since it was selected is no longer old.
_PRUNE = text("DELETE FROM install WHERE instance_id = ANY(:ids) AND last_seen < :cutoff")


def connect(url: str | URL) -> Engine:
    """Return an engine of at most five connections that gives up on a silent server.

    It connects on first use. Its errors contain no parameters. Its transactions are READ COMMITTED,
    also if the database has another default.
    """
    made = create_engine(
        url,
        # A statement after a wait for a lock must see what was committed during the wait.
        isolation_level="READ COMMITTED",
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "prepare_threshold": None,
            "connect_timeout": 5,
            "tcp_user_timeout": 10_000,
        },
    )
    event.listen(made, "handle_error", _leave_the_read_only)
    return made


def _leave_the_read_only(context: ExceptionContext) -> None:
    """Close a session that cannot write, because a new one may be able to."""
    if isinstance(context.original_exception, ReadOnlySqlTransaction):
        context.is_disconnect = True


class Fate(NamedTuple):
    """The result for a heartbeat: ``new`` is false if it was stored before.

    If ``wait`` is not 0, its id was deleted, and nothing is stored under it for ``wait`` seconds.
    """

    new: bool
    wait: int = 0


class DeletedMeanwhileError(Exception):
    """The id of a heartbeat was deleted while the heartbeat was stored."""


ESTABLISHED_DAYS = 3
"""After heartbeats on this many days an install is established, by default."""


def insert(
    connection: Connection,
    heartbeats: Sequence[Heartbeat],
    *,
    established_days: int = ESTABLISHED_DAYS,
    at: datetime | None = None,
) -> list[Fate]:
    """Store each new heartbeat, and each install as its last heartbeat describes it.

    An install is established on the last of its first ``established_days`` days with a heartbeat.
    ``at`` is the time of receipt, by default now by the database's clock. The caller acknowledges
    nothing before its transaction is committed. Return the fate of each heartbeat.

    Raises:
        DeletedMeanwhileError: roll back, and do it again.
    """
    arrived = {(each.instance_id, each.sent_at): each for each in heartbeats[::-1]}
    # One JSON array: quoting each body in an SQL array would take most of the time here.
    bodies = ",".join(each.canonical() for each in arrived.values())
    values = {
        "bodies": f"[{bodies}]",
        "ids": [*{each.instance_id for each in heartbeats}],
        "at": at,
        "established_days": established_days,
        "forgotten_for": FORGOTTEN_FOR,
    }
    _, others, marked = send(connection, _KEEP, values)
    waits = {name: max(int(wait), 1) for name, _, wait in others if wait is not None}
    if {str(name) for name, _ in marked} - waits.keys():
        raise DeletedMeanwhileError
    there = {(name, sent_at) for name, sent_at, _ in others}
    fates = []
    for each in heartbeats:
        name = (each.instance_id, each.sent_at)
        fates.append(Fate(new=name not in there, wait=waits.get(each.instance_id, 0)))
        there.add(name)  # for its next occurrence
    return fates


def send(
    connection: Connection, statements: Sequence[str], values: Mapping[str, Any]
) -> list[list[Any]]:
    """Send statements without SQLAlchemy, in a fifth of the time; return their rows.

    The values are bound and not written into the statements, because the server logs a statement
    that fails.
    """
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor:
            return [cursor.execute(statement, values).fetchall() for statement in statements]
    except psycopg.Error as error:
        if driver.closed or isinstance(error, ReadOnlySqlTransaction):
            connection.invalidate(error)
        raise DBAPIError.instance(
            None,
            None,
            error,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=connection.invalidated,
            dialect=connection.dialect,
        ) from None


def forget(connection: Connection, instance_id: UUID) -> None:
    """Delete everything under an id; the result does not show whether there was anything.

    For ``FORGOTTEN_FOR``, no process stores anything under it.
    """
    connection.execute(_BOUND)
    for statement in FORGET:
        connection.execute(statement, {"id": instance_id})


class Seen(NamedTuple):
    """When an install first and last reported, by the collector's clock."""

    first: datetime
    last: datetime


class Row(NamedTuple):
    """A stored heartbeat; ``sent_at`` has the format of a body."""

    sent_at: str
    received_at: datetime
    body: dict[str, Any]


def seen(connection: Connection, instance_id: UUID) -> Seen | None:
    """Return when an install first and last reported, or None if nothing is stored of it."""
    connection.execute(_BOUND)
    found = connection.execute(_SEEN, {"id": instance_id}).one_or_none()
    return Seen(*found) if found else None


def held(connection: Connection, instance_id: UUID, *, after: str | None, limit: int) -> list[Row]:
    """Return the first ``limit`` heartbeats under an id in the order of ``sent_at``.

    With ``after``, a time in the format of ``sent_at``, only those sent later.
    """
    connection.execute(_BOUND)
    found = connection.execute(_HELD, {"id": instance_id, "after": after, "limit": limit})
    return [Row(*row) for row in found]


def cutoff(engine: Engine, retention: timedelta) -> datetime:
    """Return the time that was ``retention`` ago, by the database's clock."""
    with engine.begin() as connection:
        connection.execute(_BOUND)
        found: datetime = connection.execute(_CUTOFF, {"retention": retention}).scalar_one()
    return found


def prune(engine: Engine, before: datetime) -> bool:
    """Delete installs that last reported before a time, and heartbeats as ``weeks.delete`` does.

    Return whether there may be more: a call deletes at most ``PRUNED_AT_ONCE`` installs. What other
    transactions have locked is left for the next call.
    """
    more = [
        weeks.unless_in_use(engine, partial(work, cutoff=before))
        for work in (weeks.delete, _prune_installs)
    ]
    return any(more)


def _prune_installs(connection: Connection, cutoff: datetime) -> bool:
    ids = [*connection.scalars(_SILENT, {"cutoff": cutoff})]
    connection.execute(_PRUNE, {"ids": ids, "cutoff": cutoff})
    return len(ids) == PRUNED_AT_ONCE


def add_outcomes(connection: Connection, counts: Mapping[str, int]) -> None:
    """Add the numbers of requests, by outcome, to those of today."""
    connection.execute(_BOUND)
    values = {"outcomes": [*counts], "requests": [*counts.values()]}
    connection.execute(_ADD_OUTCOMES, values)


def prune_marks(connection: Connection) -> None:
    """Delete the marks of ids under which something may be stored again."""
    connection.execute(_BOUND)
    connection.execute(_PRUNE_MARKS, {"forgotten_for": FORGOTTEN_FOR})


def cause(error: Exception) -> str:
    """Return the type of an error, without the message: it may contain hosts, users or values."""
    return type(getattr(error, "orig", None) or error).__name__
