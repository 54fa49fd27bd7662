"""The collector's SQL on heartbeats and installs: each heartbeat once, nothing about its sender."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import URL, Connection, Engine, TextClause, create_engine, text

from app.payload import Heartbeat

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUND = text(
    "SELECT set_config('statement_timeout', '5s', true),"
    # What is acknowledged outlives a crash of the server, whatever its own setting is.
    " set_config('synchronous_commit', coalesce("
    "nullif(current_setting('synchronous_commit'), 'off'), 'local'), true)"
)

# In the order of the ids, so that two batches with the same installs cannot deadlock.
_INSERT = text(
    """
    WITH arrived AS (
        SELECT CAST(body ->> 'instance_id' AS uuid) AS instance_id,
            CAST(body ->> 'sent_at' AS timestamptz) AS sent_at, body
        FROM jsonb_array_elements(CAST(:bodies AS jsonb)) AS body
        ORDER BY instance_id, sent_at
    ),
    kept AS (
        INSERT INTO heartbeat (instance_id, sent_at, received_at, body)
        SELECT instance_id, sent_at, coalesce(CAST(:at AS timestamptz), now()), body FROM arrived
        ON CONFLICT (instance_id, sent_at) DO NOTHING
        RETURNING instance_id, sent_at, received_at, body
    )
    INSERT INTO install (instance_id, first_seen, last_seen, body)
    SELECT DISTINCT ON (instance_id) instance_id, received_at, received_at, body
    FROM kept
    ORDER BY instance_id, sent_at DESC
    ON CONFLICT (instance_id) DO UPDATE
    SET last_seen = excluded.last_seen, body = excluded.body
    WHERE install.last_seen <= excluded.last_seen
    """
)

_FORGET = (
    text("DELETE FROM install WHERE instance_id = :id"),
    text("DELETE FROM heartbeat WHERE instance_id = :id"),
)

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

# As text, since a sender's year may be one that Python cannot hold in the session's time zone.
_HELD = text(
    """
    SELECT to_char(sent_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"+00:00"'),
        received_at, body
    FROM heartbeat
    WHERE instance_id = :id AND sent_at > coalesce(CAST(:after AS timestamptz), '-infinity')
    ORDER BY heartbeat.sent_at LIMIT :limit
    """
)

PRUNED_AT_ONCE = 1_000


def _prune_of(table: str, time: str) -> TextClause:
    # What somebody writes at this moment is passed over, so that nobody waits for the deleting, nor
    # it for anybody; and an install that was heard of since the look at it is no longer old.
    return text(
        f"""
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM {table} WHERE {time} < now() - CAST(:retention AS interval)
            ORDER BY {time} LIMIT {PRUNED_AT_ONCE} FOR UPDATE SKIP LOCKED
        ))
        """  # noqa: S608 - this module's own words
    )


_PRUNE = (_prune_of("heartbeat", "received_at"), _prune_of("install", "last_seen"))


def connect(url: str | URL) -> Engine:
    """Return an engine of at most five connections that gives up on a silent server.

    Nothing is connected yet, and no error of the engine's repeats a parameter.
    """
    return create_engine(
        url,
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"prepare_threshold": None, "connect_timeout": 5, "tcp_user_timeout": 10_000},
    )


def insert(
    connection: Connection, heartbeats: Sequence[Heartbeat], *, at: datetime | None = None
) -> None:
    """Keep each heartbeat that is not there already, and each install as its last one told.

    They are received ``at``, by default now by the database's clock. Nothing is acknowledged before
    the caller's transaction has committed.
    """
    connection.execute(_BOUND)
    # One array of JSON: to quote each body in one of SQL would take longer than all else here.
    bodies = f"[{','.join(each.canonical() for each in heartbeats)}]"
    connection.execute(_INSERT, {"bodies": bodies, "at": at})


def forget(connection: Connection, instance_id: UUID) -> None:
    """Delete everything under an id; nothing tells whether there was anything."""
    connection.execute(_BOUND)
    for statement in _FORGET:
        connection.execute(statement, {"id": instance_id})


class Seen(NamedTuple):
    """When an install was heard of, by the collector's clock."""

    first: datetime
    last: datetime


class Row(NamedTuple):
    """A heartbeat that is stored; ``sent_at`` is as a body has it."""

    sent_at: str
    received_at: datetime
    body: dict[str, Any]


def seen(connection: Connection, instance_id: UUID) -> Seen | None:
    """Return when an install was heard of first and last, or None if nothing is stored of it."""
    connection.execute(_BOUND)
    found = connection.execute(_SEEN, {"id": instance_id}).one_or_none()
    return Seen(*found) if found else None


def held(connection: Connection, instance_id: UUID, *, after: str | None, limit: int) -> list[Row]:
    """Return the first ``limit`` heartbeats under an id in the order of ``sent_at``.

    They are those sent later than ``after``, which is as ``sent_at`` in a body, or all.
    """
    connection.execute(_BOUND)
    found = connection.execute(_HELD, {"id": instance_id, "after": after, "limit": limit})
    return [Row(*row) for row in found]


def prune(connection: Connection, retention: timedelta) -> bool:
    """Delete what is older than ``retention``: heartbeats, and installs not heard of since.

    At most ``PRUNED_AT_ONCE`` of each are deleted. Return whether there may be more.
    """
    connection.execute(_BOUND)
    deleted = [connection.execute(each, {"retention": retention}).rowcount for each in _PRUNE]
    return PRUNED_AT_ONCE in deleted


def cause(error: Exception) -> str:
    """Name what went wrong, without the message: it may hold hosts, users or values."""
    return type(getattr(error, "orig", None) or error).__name__
