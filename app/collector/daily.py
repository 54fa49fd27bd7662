"""The numbers of each day: counted from the installs once, and read by the page ever after.

A day is a UTC date by this collector's clock, from its first moment to just before the next day's;
an install's own clock decides nothing. Every count is kept by version and edition, so that both can
be filtered by; what is beyond the 50 commonest versions, or values of a metric, is kept as
``OTHER``, so that the tables cannot be made to grow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, text

from app.payload import all_fields

OTHER = "*"
"""Stands for every rarer version or value; no version and no value looks like that."""

ABSENT = ""
"""Stands for no value: what an install does not report, because its schema does not have it."""

KEPT = 50

ACTIVE_2D, ACTIVE_7D, ACTIVE_30D = "active_2d", "active_7d", "active_30d"
NEW, LOST = "new", "lost"
MOVEMENTS = (ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, NEW, LOST)
"""Installs heard of within 48 hours, 7 and 30 days before the day's end; first heard of on the
day; and silent for 30 days since some moment of the day. Their value is always empty."""

SETTLED = timedelta(minutes=1)
"""How long a heartbeat takes, at most, from when it is received to when it can be counted."""

_NOT_COUNTED = {"telemetry_schema", "instance_id", "sent_at", "version", "edition"}
_NOT_COUNTED |= {"stack.redis_present"}  # is always true
VALUES = tuple(name for name in all_fields() if name not in _NOT_COUNTED)
"""The fields of every schema whose values are counted, of the installs heard of within 48 hours: by
their dotted names. Python's version is counted by major and minor, that of Postgres by major."""


def _value(field: str) -> str:
    """Return the SQL that reads a field's value out of a body."""
    path = "{" + field.replace(".", ",") + "}"
    value = f"body #>> '{path}'"
    match field:
        case "python_version":
            return f"substring({value} FROM '^[0-9]+[.][0-9]+')"
        case "stack.postgres_version":
            return f"substring({value} FROM '^[0-9]+')"
    return value


_COLUMNS = ", ".join(f'{_value(field)} AS "{field}"' for field in VALUES)
_FIELDS = ", ".join(f'"{field}"' for field in VALUES)
_SETS = ", ".join(f'(version, edition, "{field}")' for field in VALUES)
_FIELD = " ".join(f"WHEN GROUPING(\"{field}\") = 0 THEN '{field}'" for field in VALUES)

# The fields are this module's own words.
_COUNT = text(
    f"""
    WITH heard AS (
        SELECT first_seen, last_seen, body FROM install
        WHERE last_seen >= :begins - interval '30 days' AND last_seen < :as_of
        UNION ALL
        -- Heard of since: what its last heartbeat before that told. They are few, and each has few
        -- heartbeats: OFFSET 0 keeps the planner from reading those of all installs instead.
        SELECT first_seen, received_at, before.body
        FROM install CROSS JOIN LATERAL (
            SELECT received_at, its.body
            FROM (
                SELECT * FROM heartbeat WHERE heartbeat.instance_id = install.instance_id OFFSET 0
            ) AS its
            WHERE received_at >= :begins - interval '30 days' AND received_at < :as_of
            ORDER BY received_at DESC, sent_at DESC LIMIT 1
        ) AS before
        WHERE last_seen >= :as_of
    ),
    seen AS MATERIALIZED (
        SELECT first_seen, last_seen, body ->> 'version' AS version, body ->> 'edition' AS edition,
            {_COLUMNS}
        FROM heard
    ),
    counted AS MATERIALIZED (
        SELECT metric, version, edition, '' AS value, count(*) AS installs
        FROM seen CROSS JOIN LATERAL (VALUES
            ('{ACTIVE_2D}', last_seen >= :as_of - interval '48 hours'),
            ('{ACTIVE_7D}', last_seen >= :as_of - interval '7 days'),
            ('{ACTIVE_30D}', last_seen >= :as_of - interval '30 days'),
            ('{NEW}', first_seen >= :begins),
            ('{LOST}', last_seen < :as_of - interval '30 days')
        ) AS moved (metric, counts)
        WHERE counts
        GROUP BY metric, version, edition
        UNION ALL
        SELECT CASE {_FIELD} END, version, edition, coalesce({_FIELDS}, '{ABSENT}'), count(*)
        FROM seen
        WHERE last_seen >= :as_of - interval '48 hours'
        GROUP BY GROUPING SETS ({_SETS})
    ),
    common AS (
        SELECT version FROM counted WHERE metric IN ('{ACTIVE_30D}', '{LOST}')
        GROUP BY version ORDER BY sum(installs) DESC, version LIMIT {KEPT}
    ),
    ranked AS (
        SELECT metric, value, row_number() OVER (
            PARTITION BY metric ORDER BY value = '{ABSENT}' DESC, sum(installs) DESC, value
        ) AS place
        FROM counted GROUP BY metric, value
    ),
    told AS (
        SELECT metric, coalesce(common.version, '{OTHER}') AS version, edition,
            CASE WHEN place > {KEPT} THEN '{OTHER}' ELSE value END AS value,
            sum(installs) AS installs
        FROM counted JOIN ranked USING (metric, value) LEFT JOIN common USING (version)
        GROUP BY 1, 2, 3, 4
    ),
    gone AS (
        DELETE FROM daily
        WHERE metric = ANY(:metrics) AND day = :day AND (metric, version, edition, value) NOT IN (
            SELECT metric, version, edition, value FROM told)
    )
    INSERT INTO daily (day, metric, version, edition, value, installs)
    SELECT :day, metric, version, edition, value, installs FROM told
    ON CONFLICT (metric, day, version, edition, value) DO UPDATE SET installs = excluded.installs
    -- Hardly anything has changed since a minute ago.
    WHERE daily.installs <> excluded.installs
    """  # noqa: S608 - see above
)

_ALONE = text("SELECT pg_advisory_xact_lock(hashtext('consentos-collector daily'))")
# Not now(): another collector's turn may have taken long.
_CLOCK = text("SELECT clock_timestamp()")
# What is sorted or hashed for a count fits into memory up to some 100,000 installs.
_ROOM = text("SELECT set_config('work_mem', '64MB', true)")
_MEASURED = text(
    "INSERT INTO measured (day, as_of) VALUES (:day, :as_of)"
    " ON CONFLICT (day) DO UPDATE SET as_of = excluded.as_of"
)
_LAST_MEASURED = text("SELECT day, as_of FROM measured ORDER BY day DESC LIMIT 1")
_FIRST_SEEN = text("SELECT min(first_seen) FROM install")


def begins(day: date) -> datetime:
    """Return the first moment of a day."""
    return datetime.combine(day, time(tzinfo=UTC))


def measure(connection: Connection, *, now: datetime | None = None) -> None:
    """Count today as far as it goes, and each day since the last one that was counted to its end.

    A day is counted as it was at its end, whatever has arrived since, as long as its heartbeats are
    kept. Two collectors take turns. ``now`` is by default the database's.
    """
    connection.execute(_ALONE)
    connection.execute(_ROOM)
    at = now or connection.scalar(_CLOCK)
    assert at is not None  # noqa: S101 - a clock has an answer
    for day in _due(connection, at.astimezone(UTC).date()):
        _measure(connection, day, min(at, begins(day + timedelta(days=1))))


def _due(connection: Connection, today: date) -> Iterator[date]:
    last = connection.execute(_LAST_MEASURED).one_or_none()
    counted = last.as_of - SETTLED if last else connection.scalar(_FIRST_SEEN)
    day = counted.astimezone(UTC).date() if counted else today
    while day <= today:
        yield day
        day += timedelta(days=1)


def _measure(connection: Connection, day: date, as_of: datetime) -> None:
    when = {"day": day, "as_of": as_of}
    metrics = [*MOVEMENTS, *VALUES]
    connection.execute(_COUNT, {**when, "begins": begins(day), "metrics": metrics})
    connection.execute(_MEASURED, when)


@dataclass(frozen=True)
class Filter:
    """Which installs to look at: those of a version, of an edition, of both, or all."""

    version: str | None = None
    edition: str | None = None

    @property
    def parameters(self) -> dict[str, str | None]:
        """What the statements of this module take."""
        return {"of_version": self.version, "of_edition": self.edition}


@dataclass(frozen=True)
class Span:
    """The days that were counted, with none left out between them, and as of when the last was."""

    first: date
    last: date
    as_of: datetime


Counts = dict[str, int]

Cells = tuple[int, int, int, int]
"""How many installs of a group are of the filter; of its version but not of its edition; of its
edition but not of its version; and of neither. What the filter does not name, every install is of.

The last three are there to be kept from being worked out, see ``stats``."""

_OF_VERSION = "(CAST(:of_version AS text) IS NULL OR version = :of_version)"
_OF_EDITION = "(CAST(:of_edition AS text) IS NULL OR edition = :of_edition)"
_CELLS = ", ".join(
    f"coalesce(sum(installs) FILTER (WHERE {version} AND {edition}), 0)::integer"
    for version in (_OF_VERSION, f"NOT {_OF_VERSION}")
    for edition in (_OF_EDITION, f"NOT {_OF_EDITION}")
)

# What is put together below is this module's own words.
_SPAN = text(
    "SELECT (SELECT min(day) FROM measured) AS first, day, as_of FROM measured"
    " ORDER BY day DESC LIMIT 1"
)
_MOVEMENTS = text(
    "SELECT day, metric, sum(installs)::integer FROM daily"  # noqa: S608 - see above
    " WHERE metric = ANY(:metrics) AND day BETWEEN :since AND :until"
    f" AND {_OF_VERSION} AND {_OF_EDITION} GROUP BY day, metric"
)
_VERSIONS = text(
    f"SELECT day, version, {_CELLS} FROM daily"  # noqa: S608 - see above
    f" WHERE metric = '{ACTIVE_2D}' AND day BETWEEN :since AND :until GROUP BY day, version"
)
_VALUES = text(
    f"SELECT metric, value, {_CELLS} FROM daily"  # noqa: S608 - see above
    " WHERE metric = ANY(:metrics) AND day = :day GROUP BY metric, value"
)
_EDITIONS = text(
    f"SELECT edition, {_CELLS} FROM daily"  # noqa: S608 - see above
    f" WHERE metric = '{ACTIVE_2D}' AND day = :day GROUP BY edition"
)


def span(connection: Connection) -> Span | None:
    """Return which days were counted; None before the first."""
    row = connection.execute(_SPAN).one_or_none()
    return Span(row.first, row.day, row.as_of) if row else None


def movements(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, Counts]:
    """Return each day's count of each of ``MOVEMENTS``; what is not there is zero."""
    found: dict[date, Counts] = {}
    parameters = {"metrics": [*MOVEMENTS], "since": since, "until": until, **chosen.parameters}
    for day, metric, installs in connection.execute(_MOVEMENTS, parameters):
        found.setdefault(day, {})[metric] = installs
    return found


def versions(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, dict[str, Cells]]:
    """Return each day's count of active installs by version, every version's."""
    found: dict[date, dict[str, Cells]] = {}
    parameters = {"since": since, "until": until, **chosen.parameters}
    for day, version, *cells in connection.execute(_VERSIONS, parameters):
        found.setdefault(day, {})[version] = _cells(cells)
    return found


def values(connection: Connection, day: date, chosen: Filter) -> dict[str, dict[str, Cells]]:
    """Return, for ``edition`` and each of ``VALUES``, how many active installs have which.

    Those that do not report a field have the value ``ABSENT``.
    """
    found: dict[str, dict[str, Cells]] = {"edition": {}, **{field: {} for field in VALUES}}
    parameters = {"day": day, **chosen.parameters}
    for edition, *cells in connection.execute(_EDITIONS, parameters):
        found["edition"][edition] = _cells(cells)
    rows = connection.execute(_VALUES, {"metrics": [*VALUES], **parameters})
    for field, value, *cells in rows:
        found[field][value] = _cells(cells)
    return found


def _cells(counts: Sequence[int]) -> Cells:
    chosen, version_only, edition_only, neither = counts
    return chosen, version_only, edition_only, neither
