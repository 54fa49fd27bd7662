"""The collector's SQL on heartbeats and installs: each heartbeat once, nothing about its sender.

What several processes write is in one order where an id is deleted. Whoever deletes holds a lock
alone, on which whoever stores waits; and leaves a mark, so that what was sent before and is stored
after is turned away.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy import URL, Connection, Engine, TextClause, create_engine, event, text
from sqlalchemy.engine import ExceptionContext

from app.payload import Heartbeat

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUNDS = (
    "set_config('statement_timeout', '5s', true),"
    # statement_timeout does not bound the statement that sets it; this does, since it is read when
    # a wait for a lock begins.
    " set_config('lock_timeout', '4s', true),"
    # A process that stands still in a transaction shall not hold its locks for ever.
    " set_config('idle_in_transaction_session_timeout', '10s', true),"
    # What is acknowledged outlives a crash of the server, whatever its own setting is.
    " set_config('synchronous_commit', coalesce("
    "nullif(current_setting('synchronous_commit'), 'off'), 'local'), true)"
)
_BOUND = text(f"SELECT {_BOUNDS}")

FORGOTTEN_FOR = timedelta(minutes=5)
"""How long nothing is stored under an id that was deleted: longer than a heartbeat can be held up
in any process between its arrival and its commit."""

_LOCK = "hashtext('consentos-collector forget')"
_ENTER = text(f"SELECT {_BOUNDS}, pg_advisory_xact_lock_shared({_LOCK})")
_ENTER_ALONE = text(f"SELECT {_BOUNDS}, pg_advisory_xact_lock({_LOCK})")

CLOCKS_DIFFER = "interval '5 minutes'"
"""A stored time so far ahead of what is stored now comes from a clock that was ahead once."""

# Two heartbeats of an install may be committed in another order than they came in. One that is late
# changes nothing but how the install was on the day before, where it was heard of since midnight.
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


# In the order of the ids, so that two batches with the same installs cannot deadlock.
_INSERT = text(
    f"""
    WITH arrived AS (
        SELECT CAST(body ->> 'instance_id' AS uuid) AS instance_id,
            CAST(body ->> 'sent_at' AS timestamptz) AS sent_at, body
        FROM jsonb_array_elements(CAST(:bodies AS jsonb)) AS body
    ),
    marked AS (
        SELECT instance_id, sent_at, body, at AS forgotten_at
        FROM arrived LEFT JOIN forgotten
            ON mark = sha256((SELECT key FROM forgotten_key) || uuid_send(instance_id))
            AND at > now() - CAST(:forgotten_for AS interval)
    ),
    kept AS (
        INSERT INTO heartbeat (instance_id, sent_at, received_at, body)
        SELECT instance_id, sent_at, coalesce(CAST(:at AS timestamptz), now()), body FROM marked
        WHERE forgotten_at IS NULL
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
    SELECT body ->> 'instance_id', body ->> 'sent_at', ceil(extract(
        epoch FROM forgotten_at + CAST(:forgotten_for AS interval) - clock_timestamp()))
    FROM marked
    WHERE NOT EXISTS (
        SELECT FROM kept
        WHERE kept.instance_id = marked.instance_id AND kept.sent_at = marked.sent_at
    )
    """  # noqa: S608 - this module's own words
)

_FORGET = (
    text(
        """
        INSERT INTO forgotten (mark, at) VALUES (
            sha256((SELECT key FROM forgotten_key) || uuid_send(CAST(:id AS uuid))),
            clock_timestamp()
        )
        ON CONFLICT (mark) DO UPDATE SET at = excluded.at
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

# In the order of the words, so that two collectors cannot deadlock.
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

    Nothing is connected yet, and no error of the engine's repeats a parameter. Its transactions are
    at READ COMMITTED, whatever the database's own setting.
    """
    made = create_engine(
        url,
        # What is looked for after a wait for a lock must be seen.
        isolation_level="READ COMMITTED",
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"prepare_threshold": None, "connect_timeout": 5, "tcp_user_timeout": 10_000},
    )
    event.listen(made, "handle_error", _leave_the_read_only)
    return made


def _leave_the_read_only(context: ExceptionContext) -> None:
    """Have a session that cannot write be closed: another one may be able to."""
    if isinstance(context.original_exception, ReadOnlySqlTransaction):
        context.is_disconnect = True


class Fate(NamedTuple):
    """What became of a heartbeat: ``new`` is stored now, and another one was there already.

    Where ``wait`` is not 0, its id was deleted, and for so many seconds nothing is stored under it.
    """

    new: bool
    wait: int = 0


ESTABLISHED_DAYS = 3
"""On so many days an install has to be heard of, unless another number is asked for."""


def insert(
    connection: Connection,
    heartbeats: Sequence[Heartbeat],
    *,
    established_days: int = ESTABLISHED_DAYS,
    at: datetime | None = None,
) -> list[Fate]:
    """Keep each heartbeat that is not there already, and each install as its last one told.

    An install that is heard of on ``established_days`` days is established on the last of them.
    They are received ``at``, by default now by the database's clock. Nothing is acknowledged before
    the caller's transaction has committed. Return what became of each.
    """
    enter(connection)
    arrived: dict[tuple[str, str], str] = {}
    for each in heartbeats:
        arrived.setdefault((each.instance_id, each.sent_at), each.canonical())
    # One array of JSON: to quote each body in one of SQL would take longer than all else here.
    values = {
        "bodies": f"[{','.join(arrived.values())}]",
        "at": at,
        "established_days": established_days,
        "forgotten_for": FORGOTTEN_FOR,
    }
    others = {
        (instance_id, sent_at): Fate(new=False, wait=0 if wait is None else max(int(wait), 1))
        for instance_id, sent_at, wait in connection.execute(_INSERT, values)
    }
    fates = []
    for each in heartbeats:
        name = (each.instance_id, each.sent_at)
        fates.append(others.get(name, Fate(new=True)))
        others.setdefault(name, Fate(new=False))  # when it comes again
    return fates


def enter(connection: Connection, *, alone: bool = False) -> None:
    """Wait for whoever deletes, or, to be ``alone``, for whoever stores as well.

    It lasts until the end of the transaction. One that will delete has to be alone from its
    beginning: two that have begun otherwise would wait for each other.
    """
    connection.execute(_ENTER_ALONE if alone else _ENTER)


def forget(connection: Connection, instance_id: UUID) -> None:
    """Delete everything under an id; nothing tells whether there was anything.

    For ``FORGOTTEN_FOR`` nothing is stored under it, whichever process it is brought to.
    """
    enter(connection, alone=True)
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


def add_outcomes(connection: Connection, counts: Mapping[str, int]) -> None:
    """Add how many requests ended in which way to what is counted of today."""
    connection.execute(_BOUND)
    values = {"outcomes": [*counts], "requests": [*counts.values()]}
    connection.execute(_ADD_OUTCOMES, values)


def prune_marks(connection: Connection) -> None:
    """Delete the marks of ids under which something may be stored again."""
    connection.execute(_BOUND)
    connection.execute(_PRUNE_MARKS, {"forgotten_for": FORGOTTEN_FOR})


def cause(error: Exception) -> str:
    """Name what went wrong, without the message: it may hold hosts, users or values."""
    return type(getattr(error, "orig", None) or error).__name__
