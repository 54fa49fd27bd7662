"""The list of releases, whose versions the numbers name, and the values that are not listed."""

from datetime import UTC, date, timedelta
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, TextClause, text

from app.collector.daily import VALUES, written
from app.collector.names import DEVELOPMENT, KNOWN, OPEN
from app.collector.recount import clock
from app.payload import Version

FIELDS = ("version", *(field for field in VALUES if field in OPEN))
"""The fields whose values are only named if they are listed."""

MOST = 20
"""How many values of a field ``unlisted`` returns."""

_VERSION = TypeAdapter[str](Version)

_LISTED = text("SELECT version, released_on FROM release ORDER BY released_on DESC, version DESC")
_DATE = text("SELECT released_on FROM release WHERE version = :version")
_ADD = text(
    "INSERT INTO release (version, released_on) VALUES (:version, :on)"
    " ON CONFLICT (version) DO UPDATE SET released_on = excluded.released_on"
)
_REMOVE = text("DELETE FROM release WHERE version = :version RETURNING released_on")

_ACTIVE = (
    "SELECT body FROM install WHERE last_seen >= now() - interval '48 hours'"
    " AND established_on IS NOT NULL AND excluded IS NULL AND right(body ->> 'version', 4)"
)
_DEV_BUILDS = text(f"SELECT count(*) FROM ({_ACTIVE} = '{DEVELOPMENT}') AS active")  # noqa: S608 - only constants of this module


def _unlisted(field: str) -> TextClause:
    return text(
        f"""
        SELECT value, count(*) AS installs, count(*) OVER () AS all_values,
            CAST(sum(count(*)) OVER () AS bigint) AS all_installs
        FROM (
            SELECT {written(field)} AS value FROM ({_ACTIVE} <> '{DEVELOPMENT}') AS active
        ) AS active
        WHERE value <> ALL(CAST(:listed AS text[]))
        GROUP BY value
        ORDER BY installs DESC, value
        LIMIT :most
        """  # noqa: S608 - only constants of this module
    )


_UNLISTED = {field: _unlisted(field) for field in FIELDS}


class NotAReleaseError(ValueError):
    """A version or a date is not one of a release; the message says why."""


class Release(NamedTuple):
    """A version on the list, and the day on which it was released."""

    version: str
    released_on: date


class Unlisted(NamedTuple):
    """The values of a field that are counted as ``other``, the most common first."""

    values: list[tuple[str, int]]
    """At most ``MOST`` values, each with its number of installs."""
    more_values: int
    more_installs: int


def listed(connection: Connection) -> list[Release]:
    """Return the releases on the list, the newest first."""
    return [Release(*row) for row in connection.execute(_LISTED)]


def add(connection: Connection, version: str, on: date) -> date | None:
    """Put a version on the list, or change its date.

    Return the first day whose numbers this changes; None if it was listed with this date already.
    The caller requests the recount.

    Raises:
        NotAReleaseError: no release has such a version, or the date is in the future.
    """
    _check(connection, version, on)
    former: date | None = connection.scalar(_DATE, {"version": version})
    if former == on:
        return None
    connection.execute(_ADD, {"version": version, "on": on})
    return min(on, former or on)


def _check(connection: Connection, version: str, on: date) -> None:
    try:
        _VERSION.validate_python(version)
    except ValidationError:
        raise NotAReleaseError(
            "VERSION must be N.N.N, optionally with -alpha.N, -beta.N or -rc.N."
        ) from None
    if version.endswith(DEVELOPMENT):
        raise NotAReleaseError(f"A version that ends in {DEVELOPMENT} is not a release.")
    if on > clock(connection).astimezone(UTC).date() + timedelta(days=1):
        raise NotAReleaseError("The date of a release must not be later than tomorrow.")


def remove(connection: Connection, version: str) -> date | None:
    """Take a version off the list; return the first day whose numbers this changes.

    None means that it was not listed. The caller requests the recount.
    """
    on: date | None = connection.scalar(_REMOVE, {"version": version})
    return on


def unlisted(connection: Connection) -> dict[str, Unlisted]:
    """Return, for each of ``FIELDS``, which values are counted as ``other`` now.

    Only established installs that reported within 48 hours are counted, without development builds.
    Strangers can write the values: show them to maintainers only.
    """
    known = {**KNOWN, "version": [release.version for release in listed(connection)]}
    found = {}
    for field, statement in _UNLISTED.items():
        rows = connection.execute(
            statement, {"listed": [*known.get(field, ())], "most": MOST}
        ).all()
        values = [(row.value, row.installs) for row in rows]
        shown = sum(installs for _, installs in values)
        found[field] = (
            Unlisted(values, rows[0].all_values - len(values), rows[0].all_installs - shown)
            if rows
            else Unlisted([], 0, 0)
        )
    return found


def dev_builds(connection: Connection) -> int:
    """Return how many established development builds reported within 48 hours."""
    return int(connection.execute(_DEV_BUILDS).scalar_one())
