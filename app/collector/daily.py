"""The numbers of each day: counted from the installs once, and read by the page ever after.

A day is a UTC date by this collector's clock; an install's own clock decides nothing. Every count is
kept by version and edition, so that both can be filtered by; what is beyond the 50 commonest
versions, or values of a metric, is kept as ``OTHER``, so that the tables cannot be made to grow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, text

from app.payload import fields

OTHER = "*"
"""Stands for every rarer version or value; no version and no value looks like that."""

KEPT = 50

ACTIVE_2D, ACTIVE_7D, ACTIVE_30D = "active_2d", "active_7d", "active_30d"
NEW, LOST = "new", "lost"
MOVEMENTS = (ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, NEW, LOST)
"""Installs heard of within 48 hours, 7 and 30 days before the day's end; first heard of on the
day; and silent for 30 days since the day. Their value is always empty."""

_NOT_COUNTED = {"telemetry_schema", "instance_id", "sent_at", "version", "edition"}
_NOT_COUNTED |= {"stack.redis_present"}  # is always true
VALUES = tuple(name for name, _ in fields() if name not in _NOT_COUNTED)
"""The fields whose values are counted, of the installs heard of within 48 hours: by their dotted
names. Python's version is counted by major and minor, that of Postgres by major."""


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


# The fields are this module's own words.
_COUNT = text(
    f"""
    WITH seen AS MATERIALIZED (
        SELECT body, first_seen, last_seen, body ->> 'version' AS version,
            body ->> 'edition' AS edition, last_seen > :as_of - interval '48 hours' AS active
        FROM install
        WHERE first_seen <= :as_of AND last_seen > :as_of - interval '31 days'
    ),
    common AS (
        SELECT version FROM seen GROUP BY version ORDER BY count(*) DESC, version LIMIT {KEPT}
    ),
    counted AS (
        SELECT metric, coalesce(common.version, '{OTHER}') AS version, edition, value,
            count(*)::integer AS installs
        FROM seen
        LEFT JOIN common USING (version)
        CROSS JOIN LATERAL (VALUES
            ('{ACTIVE_2D}', '', active),
            ('{ACTIVE_7D}', '', last_seen > :as_of - interval '7 days'),
            ('{ACTIVE_30D}', '', last_seen > :as_of - interval '30 days'),
            ('{NEW}', '', first_seen >= :begins),
            ('{LOST}', '', last_seen <= :as_of - interval '30 days'),
            {", ".join(f"('{field}', {_value(field)}, active)" for field in VALUES)}
        ) AS told (metric, value, counts)
        WHERE counts
        GROUP BY metric, common.version, edition, value
    ),
    ranked AS (
        SELECT metric, value, row_number() OVER (
            PARTITION BY metric ORDER BY sum(installs) DESC, value) AS place
        FROM counted GROUP BY metric, value
    )
    INSERT INTO daily (day, metric, version, edition, value, installs)
    SELECT :day, metric, version, edition,
        CASE WHEN place > {KEPT} THEN '{OTHER}' ELSE value END AS value, sum(installs)
    FROM counted JOIN ranked USING (metric, value)
    GROUP BY 1, 2, 3, 4, 5
    """  # noqa: S608
)

_ALONE = text("SELECT pg_advisory_xact_lock(hashtext('consentos-collector daily'))")
_CLOCK = text("SELECT now()")
_CLEAR = text("DELETE FROM daily WHERE day = :day")
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

    Two collectors take turns. ``now`` is by default the database's. Between two counts no install
    may have been heard of later than the day that is being counted, but for the minute in which a
    day ends: its installs are then counted as they are told of in that minute.
    """
    connection.execute(_ALONE)
    at = now or connection.scalar(_CLOCK)
    assert at is not None  # noqa: S101 - a clock has an answer
    for day in _due(connection, at.astimezone(UTC).date()):
        _measure(connection, day, min(at, begins(day + timedelta(days=1))))


def _due(connection: Connection, today: date) -> Iterator[date]:
    last = connection.execute(_LAST_MEASURED).one_or_none()
    first = connection.scalar(_FIRST_SEEN)
    day: date = last.day if last else first.astimezone(UTC).date() if first else today
    while day <= today:
        yield day
        day += timedelta(days=1)


def _measure(connection: Connection, day: date, as_of: datetime) -> None:
    when = {"day": day, "as_of": as_of, "begins": begins(day)}
    connection.execute(_CLEAR, {"day": day})
    connection.execute(_COUNT, when)
    connection.execute(_MEASURED, {"day": day, "as_of": as_of})


@dataclass(frozen=True)
class Filter:
    """Which installs to look at: those of a version, of an edition, of both, or all."""

    version: str | None = None
    edition: str | None = None

    @property
    def parameters(self) -> dict[str, str | None]:
        """What the statements of this module take."""
        return {"of_version": self.version, "of_edition": self.edition}


_CHOSEN = (
    " (CAST(:of_version AS text) IS NULL OR version = :of_version)"
    " AND (CAST(:of_edition AS text) IS NULL OR edition = :of_edition)"
)
_MOVEMENTS = text(
    "SELECT day, metric, sum(installs)::integer FROM daily"
    f" WHERE metric = ANY(:metrics) AND day BETWEEN :since AND :until AND {_CHOSEN}"  # noqa: S608
    " GROUP BY day, metric"
)
_VERSIONS = text(
    "SELECT day, version, sum(installs)::integer FROM daily"
    f" WHERE metric = '{ACTIVE_2D}' AND day BETWEEN :since AND :until AND {_CHOSEN}"  # noqa: S608
    " GROUP BY day, version"
)
_VALUES = text(
    "SELECT metric, value, sum(installs)::integer FROM daily"
    f" WHERE metric = ANY(:metrics) AND day = :day AND {_CHOSEN}"  # noqa: S608
    " GROUP BY metric, value"
)
_EDITIONS = text(
    "SELECT edition, sum(installs)::integer FROM daily"
    f" WHERE metric = '{ACTIVE_2D}' AND day = :day AND {_CHOSEN} GROUP BY edition"  # noqa: S608
)

Counts = dict[str, int]


def latest(connection: Connection) -> tuple[date, datetime] | None:
    """Return the latest day that was counted, and as of when; None before the first."""
    row = connection.execute(_LAST_MEASURED).one_or_none()
    return (row.day, row.as_of) if row else None


def movements(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, Counts]:
    """Return each day's count of each of ``MOVEMENTS``; what is not there is zero."""
    return _by_day(
        connection.execute(
            _MOVEMENTS,
            {"metrics": [*MOVEMENTS], "since": since, "until": until, **chosen.parameters},
        )
    )


def versions(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, Counts]:
    """Return each day's count of active installs by version."""
    return _by_day(
        connection.execute(_VERSIONS, {"since": since, "until": until, **chosen.parameters})
    )


def _by_day(rows: Sequence[tuple[date, str, int]]) -> dict[date, Counts]:
    found: dict[date, Counts] = {}
    for day, name, installs in rows:
        found.setdefault(day, {})[name] = installs
    return found


def values(connection: Connection, day: date, chosen: Filter) -> dict[str, Counts]:
    """Return, for each of ``VALUES`` and for ``edition``, how many active installs have which."""
    found: dict[str, Counts] = {field: {} for field in VALUES}
    parameters = {"day": day, **chosen.parameters}
    for field, value, installs in connection.execute(_VALUES, {"metrics": [*VALUES], **parameters}):
        found[field][value] = installs
    editions = connection.execute(_EDITIONS, parameters)
    return {"edition": {edition: installs for edition, installs in editions}, **found}
