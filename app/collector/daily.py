"""The numbers of each day: counted once, after its end, and read by the page.

A day is a UTC date by this collector's clock; an install's own clock decides nothing. Each
established install is counted as it was at the end of the day. Every count is stored by version and
edition, because the page can be filtered by both. Only listed names are stored, so that strangers
cannot write into these tables or make them grow.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, TextClause, text

from app.collector.names import DEVELOPMENT, KNOWN, OPEN, OTHER
from app.payload import all_fields

ABSENT = ""
"""Stands for a missing value: the install's schema does not have the field."""

ACTIVE_2D, ACTIVE_7D, ACTIVE_30D = "active_2d", "active_7d", "active_30d"
IN_USE, NEW, LOST = "in_use", "new", "lost"
RETAINED, RETAINED_90 = "retained", "retained_90"

STOCKS = (ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, IN_USE)
"""Installs at the end of a day: those that reported within 48 hours, 7 and 30 days before it; and
of the first, those that recorded a consent."""

FLOWS = (NEW, LOST, RETAINED, RETAINED_90)
"""Installs of a day: those established on it; those whose 30th day without a heartbeat it was; and
of those established 30 and 90 days before, the ones that reported within 48 hours of its end."""

DEV_BUILDS = "dev_builds"
"""Development builds that reported within 48 hours: they are in no other number."""

DAY = timedelta(days=1)
MONTH = timedelta(days=30)

SETTLED = timedelta(minutes=1)
"""How long a heartbeat takes, at most, from when it is received to when it can be counted."""

_NOT_COUNTED = {"telemetry_schema", "instance_id", "sent_at", "version", "edition"}
_NOT_COUNTED |= {"stack.redis_present"}  # is always true
VALUES = tuple(name for name in all_fields() if name not in _NOT_COUNTED)
"""The dotted names of the fields whose values are counted, of all schemas. Python's version is
counted by major and minor, that of Postgres by major."""

_SHORTENED = {"python_version": "^[0-9]+[.][0-9]+", "stack.postgres_version": "^[0-9]+"}


def written(field: str) -> str:
    """Return the SQL that reads a field's value out of a body, listed or not."""
    return _shortened(field, f"body #>> '{{{field.replace('.', ',')}}}'")


def _shortened(field: str, value: str) -> str:
    pattern = _SHORTENED.get(field)
    return f"substring({value} FROM '{pattern}')" if pattern else value


def _column(field: str) -> str:
    """Return the column of ``_READ`` that has a field's value."""
    section, _, name = field.rpartition(".")
    return f'"{section}"."{name}"' if section else f'body_of."{name}"'


def _read() -> str:
    """Return the SQL that reads a body once, into a column for each of its fields."""
    parts: dict[str, list[str]] = {"": []}
    for field in all_fields():
        section, _, name = field.rpartition(".")
        if section not in parts:
            parts[section] = []
            parts[""].append(f'"{section}" jsonb')
        parts[section].append(f'"{name}" text')
    sections = {"body_of": ("body", parts.pop(""))}
    sections |= {f'"{name}"': (f'body_of."{name}"', columns) for name, columns in parts.items()}
    return " ".join(
        f"CROSS JOIN LATERAL jsonb_to_record(coalesce({source}, '{{}}')) AS {alias}"
        f" ({', '.join(columns)})"
        for alias, (source, columns) in sections.items()
    )


def _value(field: str) -> str:
    """Return the SQL of a field's value: a listed name, or ``OTHER``."""
    value = _shortened(field, _column(field))
    if field not in OPEN:
        return f"coalesce({value}, '{ABSENT}')"
    known = ", ".join(f"'{name}'" for name in KNOWN.get(field, ()))
    return (
        f"CASE WHEN {value} IS NULL THEN '{ABSENT}'"
        f" WHEN {value} = ANY(ARRAY[{known}]::text[]) THEN {value} ELSE '{OTHER}' END"
    )


_EACH_VALUE = ",\n".join(f"('{field}', {_value(field)}, active)" for field in VALUES)


def _count(installs: str) -> TextClause:
    """Return the statement that counts a day, of ``installs`` as they were at its end.

    It is one aggregate over the rows of one table, so that a sharded Postgres counts on each shard.
    """
    return text(
        f"""
        SELECT metric, named AS version, body_of.edition, value,
            CAST(count(*) AS integer) AS installs
        FROM ({installs}) AS known
        {_read()}
        CROSS JOIN LATERAL (
            SELECT right(body_of.version, {len(DEVELOPMENT)}) = '{DEVELOPMENT}' AS development,
                seen >= :as_of - interval '48 hours' AS recent,
                CASE WHEN body_of.version = ANY(:releases) THEN body_of.version
                    ELSE '{OTHER}' END AS named
        ) AS judged
        CROSS JOIN LATERAL (SELECT recent AND NOT development AS active) AS judged_too
        CROSS JOIN LATERAL (VALUES
            ('{ACTIVE_2D}', '', active),
            ('{ACTIVE_7D}', '', NOT development AND seen >= :as_of - interval '7 days'),
            ('{ACTIVE_30D}', '', NOT development AND seen >= :as_of - interval '30 days'),
            ('{IN_USE}', '', active AND {_column("counts.consents_last_24h")} <> '0'),
            ('{NEW}', '', NOT development AND established_on = :day),
            ('{LOST}', '', NOT development AND seen < :as_of - interval '30 days'),
            ('{RETAINED}', '', active AND established_on = :day - 30),
            ('{RETAINED_90}', '', active AND established_on = :day - 90),
            ('{DEV_BUILDS}', '', recent AND development),
            {_EACH_VALUE}
        ) AS counted (metric, value, is_counted)
        WHERE is_counted AND seen >= :begins - interval '30 days'
        GROUP BY metric, named, body_of.edition, value
        """  # noqa: S608 - only constants of this module
    )


_AS_OF_NOW = _count(
    """
    SELECT established_on,
        CASE WHEN last_seen < :as_of THEN last_seen ELSE former_seen END AS seen,
        CASE WHEN last_seen < :as_of THEN body ELSE former_body END AS body
    FROM install WHERE excluded IS NULL AND established_on <= :day
    """
)
_AS_REPLAYED = _count(
    """
    SELECT established_on, seen, replay.body
    FROM replay JOIN install USING (instance_id)
    WHERE excluded IS NULL AND established_on <= :day
    """
)

_GONE = text("DELETE FROM daily WHERE day = :day")
_KEEP = text(
    "INSERT INTO daily (day, metric, version, edition, value, installs)"
    " VALUES (:day, :metric, :version, :edition, :value, :installs)"
)
_COUNTED = text(
    "INSERT INTO measured (day, as_of, retention_as_of) VALUES (:day, now(), now())"
    " ON CONFLICT (day) DO UPDATE"
    " SET as_of = excluded.as_of, retention_as_of = excluded.retention_as_of"
)
# By date, so that counting a day later or again gives the same numbers.
_RELEASES = text("SELECT version FROM release WHERE released_on <= :day")


def begins(day: date) -> datetime:
    """Return the first moment of a day."""
    return datetime.combine(day, time(tzinfo=UTC))


def days(first: date, last: date) -> Iterator[date]:
    """Yield the days from the first to the last, both included."""
    return (first + n * DAY for n in range((last - first).days + 1))


def finished(now: datetime) -> date:
    """Return the last day that has ended and whose heartbeats are all committed."""
    return (now - SETTLED).astimezone(UTC).date() - timedelta(days=1)


def count(connection: Connection, day: date, *, replayed: bool) -> None:
    """Count a day that has ended, and replace its numbers.

    If it is not ``replayed``, it must be yesterday: an install has its present state and its state
    before its last day, and no older one.
    """
    as_of = begins(day + timedelta(days=1))
    moments = {"day": day, "begins": begins(day), "as_of": as_of}
    releases = [*connection.scalars(_RELEASES, {"day": day})]
    rows = connection.execute(
        _AS_REPLAYED if replayed else _AS_OF_NOW, {**moments, "releases": releases}
    )
    cells = [{"day": day, **row} for row in rows.mappings()]
    connection.execute(_GONE, {"day": day})
    if cells:
        connection.execute(_KEEP, cells)
    connection.execute(_COUNTED, {"day": day})


class Live(NamedTuple):
    """The numbers of this moment; they are not broken down."""

    as_of: datetime
    active: int
    """Established installs that reported within 48 hours, without development builds."""
    not_established: int
    """Those that reported within 48 hours, but on too few days so far."""


_LIVE = text(
    f"""
    SELECT coalesce(CAST(:at AS timestamptz), now()),
        count(established_on), count(*) - count(established_on)
    FROM install
    WHERE last_seen >= coalesce(CAST(:at AS timestamptz), now()) - interval '48 hours'
        AND excluded IS NULL AND right(body ->> 'version', 4) <> '{DEVELOPMENT}'
    """  # noqa: S608 - only constants of this module
)


def live(connection: Connection, at: datetime | None = None) -> Live:
    """Count how many installs there are ``at`` a moment, by default now by the database's clock.

    The database must be as of that moment.
    """
    return Live(*connection.execute(_LIVE, {"at": at}).one())


@dataclass(frozen=True)
class Filter:
    """Which installs to look at: those of a version, of an edition, of both, or all."""

    version: str | None = None
    edition: str | None = None

    @property
    def parameters(self) -> dict[str, str | None]:
        """The parameters for the statements of this module."""
        return {"of_version": self.version, "of_edition": self.edition}


@dataclass(frozen=True)
class Span:
    """The days that were counted, and when the last of them was."""

    first: date
    last: date
    as_of: datetime


class Counted(NamedTuple):
    """When a day was first counted, if that is known, and which flows it has."""

    at: datetime | None
    has_all: bool = True
    """Whether it has ``RETAINED_90`` too, which older releases do not count."""

    @property
    def flows(self) -> Sequence[str]:
        """Those of ``FLOWS`` that were counted."""
        return FLOWS if self.has_all else FLOWS[:-1]


Counts = dict[str, int]
"""How many installs have a value, or are in a movement; a missing key means zero."""

_CHOSEN = (
    "(CAST(:of_version AS text) IS NULL OR version = :of_version)"
    " AND (CAST(:of_edition AS text) IS NULL OR edition = :of_edition)"
)

# The SQL below is made of constants of this module only.
_SPAN = text(
    "SELECT (SELECT min(day) FROM measured) AS first, day, as_of FROM measured"
    " ORDER BY day DESC LIMIT 1"
)
_COUNTED_DAYS = text(
    "SELECT day, counted_at, retention_as_of IS NOT DISTINCT FROM as_of AS has_all FROM measured"
    " WHERE day BETWEEN :since AND :until"
)
_RELEASED = text("SELECT version, released_on FROM release WHERE released_on <= :day")
_MOVEMENTS = text(
    "SELECT day, metric, sum(installs)::integer FROM daily"  # noqa: S608 - see above
    " WHERE metric = ANY(:metrics) AND day BETWEEN :since AND :until"
    f" AND {_CHOSEN} GROUP BY day, metric"
)
_VERSIONS = text(
    "SELECT day, version, sum(installs)::integer FROM daily"  # noqa: S608 - see above
    f" WHERE metric = '{ACTIVE_2D}' AND day BETWEEN :since AND :until"
    f" AND {_CHOSEN} GROUP BY day, version"
)
_VALUES = text(
    "SELECT metric, value, sum(installs)::integer FROM daily"  # noqa: S608 - see above
    f" WHERE metric = ANY(:metrics) AND day = :day AND {_CHOSEN} GROUP BY metric, value"
)
_EDITIONS = text(
    "SELECT edition, sum(installs)::integer FROM daily"  # noqa: S608 - see above
    f" WHERE metric = '{ACTIVE_2D}' AND day = :day AND {_CHOSEN} GROUP BY edition"
)


def span(connection: Connection) -> Span | None:
    """Return which days were counted; None before the first."""
    row = connection.execute(_SPAN).one_or_none()
    return Span(row.first, row.day, row.as_of) if row else None


def counted(connection: Connection, since: date, until: date) -> dict[date, Counted]:
    """Return when each day was counted first, and which flows it has."""
    rows = connection.execute(_COUNTED_DAYS, {"since": since, "until": until})
    return {row.day: Counted(row.counted_at, row.has_all) for row in rows}


def released(connection: Connection, day: date) -> list[tuple[str, date]]:
    """Return the listed versions that had come out by the end of a day, and when."""
    return [(row.version, row.released_on) for row in connection.execute(_RELEASED, {"day": day})]


def stocks(connection: Connection, since: date, until: date, chosen: Filter) -> dict[date, Counts]:
    """Return each day's count of each of ``STOCKS`` and of ``DEV_BUILDS``."""
    return _movements(connection, (*STOCKS, DEV_BUILDS), since, until, chosen)


def flows(connection: Connection, since: date, until: date, chosen: Filter) -> dict[date, Counts]:
    """Return each day's count of each of ``FLOWS``."""
    return _movements(connection, FLOWS, since, until, chosen)


def _movements(
    connection: Connection, metrics: Sequence[str], since: date, until: date, chosen: Filter
) -> dict[date, Counts]:
    parameters = {"metrics": [*metrics], "since": since, "until": until, **chosen.parameters}
    return _by_day(connection.execute(_MOVEMENTS, parameters))


def versions(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, Counts]:
    """Return each day's count of active installs by version."""
    parameters = {"since": since, "until": until, **chosen.parameters}
    return _by_day(connection.execute(_VERSIONS, parameters))


def _by_day(rows: Iterable[tuple[date, str, int]]) -> dict[date, Counts]:
    found: dict[date, Counts] = {}
    for day, name, installs in rows:
        found.setdefault(day, {})[name] = installs
    return found


def values(connection: Connection, day: date, chosen: Filter) -> Mapping[str, Counts]:
    """Return, for ``edition`` and each of ``VALUES``, how many active installs have which.

    Those that do not report a field have the value ``ABSENT``.
    """
    found: dict[str, Counts] = {"edition": {}, **{field: {} for field in VALUES}}
    parameters = {"day": day, **chosen.parameters}
    for edition, installs in connection.execute(_EDITIONS, parameters):
        found["edition"][edition] = installs
    rows = connection.execute(_VALUES, {"metrics": [*VALUES], **parameters})
    for field, value, installs in rows:
        found[field][value] = installs
    return found
