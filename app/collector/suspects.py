"""Installs that look invented, and taking installs out of all numbers.

Invented installs often arrive at once and are alike: their bodies are the same except for id and
time, or at least their version and deployment label are. A maintainer sees such groups and decides.
An excluded install is not deleted: its heartbeats are still stored, and anyone who knows its id may
read and delete them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from app.collector import recount

LEAST = 20
"""A group is shown if at least so many installs were first seen within an hour."""

AT_ONCE = 200
"""How many installs one transaction changes. Their heartbeats wait until it ends."""

_BODY = "left(md5(CAST(body - 'instance_id' - 'sent_at' AS text)), 12)"

# An install is in a group if enough of them were first seen in an hour that includes it.
_PAST_HOUR = "ORDER BY first_seen RANGE BETWEEN interval '1 hour' PRECEDING AND CURRENT ROW"
_NEXT_HOUR = "ORDER BY first_seen RANGE BETWEEN CURRENT ROW AND interval '1 hour' FOLLOWING"


def _in_groups(installs: str, alike: str) -> str:
    """Return the SQL of ``installs`` with ``grouped``: enough are ``alike`` within an hour."""
    return (
        f"SELECT *, bool_or(enough) OVER (PARTITION BY {alike} {_NEXT_HOUR}) AS grouped FROM ("  # noqa: S608 - only constants of this module
        f"SELECT *, count(*) OVER (PARTITION BY {alike} {_PAST_HOUR}) >= :least AS enough"
        f" FROM {installs}) AS counted"
    )


_GROUPS = text(
    f"""
    WITH known AS (
        SELECT first_seen, established_on IS NOT NULL AS established,
            excluded IS NOT NULL AS excluded, body ->> 'version' AS version,
            body ->> 'deployment' AS label, {_BODY} AS body
        FROM install
    ),
    by_body AS ({_in_groups("known", "body")}),
    others AS (
        SELECT first_seen, established, excluded, version, label FROM by_body WHERE NOT grouped
    ),
    by_label AS ({_in_groups("others", "version, label")}),
    grouped AS (
        SELECT body, version, label, first_seen, established, excluded FROM by_body WHERE grouped
        UNION ALL
        SELECT NULL, version, label, first_seen, established, excluded FROM by_label WHERE grouped
    )
    SELECT body, version, label, min(first_seen), max(first_seen), count(*),
        count(*) FILTER (WHERE established), count(*) FILTER (WHERE excluded)
    FROM grouped
    GROUP BY body, version, label
    HAVING NOT bool_and(excluded)
    ORDER BY count(*) DESC, min(first_seen)
    """  # noqa: S608 - only constants of this module
)

_MATCHES = f"""
    (CAST(:ids AS uuid[]) IS NULL OR instance_id = ANY(CAST(:ids AS uuid[])))
    AND (CAST(:first_seen_from AS timestamptz) IS NULL OR first_seen >= :first_seen_from)
    AND (CAST(:first_seen_to AS timestamptz) IS NULL OR first_seen < :first_seen_to)
    AND (CAST(:version AS text) IS NULL OR body ->> 'version' = :version)
    AND (CAST(:label AS text) IS NULL OR body ->> 'deployment' = :label)
    AND (CAST(:body AS text) IS NULL OR {_BODY} = :body)
    AND (CAST(:why AS text) IS NULL OR excluded = :why)
"""
_LOOK = text(
    f"""
    SELECT count(*) AS installs, count(established_on) AS established, min(established_on) AS since
    FROM install WHERE (excluded IS NOT NULL) = :excluded AND {_MATCHES}
    """  # noqa: S608 - only constants of this module
)
_NEXT = text(
    f"""
    SELECT instance_id FROM install
    WHERE instance_id > CAST(:after AS uuid) AND (excluded IS NOT NULL) = :excluded AND {_MATCHES}
    ORDER BY instance_id LIMIT {AT_ONCE}
    """  # noqa: S608 - only constants of this module
)
_EXCLUDE = text(
    "UPDATE install SET excluded = :reason"
    " WHERE instance_id = CAST(:id AS uuid) AND excluded IS NULL RETURNING established_on"
)
_INCLUDE = text(
    "UPDATE install SET excluded = NULL"
    " WHERE instance_id = CAST(:id AS uuid) AND excluded IS NOT NULL"
    " RETURNING established_on"
)
_REASONS = text(
    "SELECT excluded AS why, count(*) AS installs, count(established_on) AS established,"
    " min(first_seen) AS first_seen_from, max(first_seen) AS first_seen_to"
    " FROM install WHERE excluded IS NOT NULL GROUP BY excluded ORDER BY installs DESC, why"
)


@dataclass(frozen=True)
class Selector:
    """Which installs to take: those that match everything that is set."""

    ids: Sequence[UUID] = ()
    first_seen_from: datetime | None = None
    """First seen at this time or later."""
    first_seen_to: datetime | None = None
    """First seen before this time."""
    version: str | None = None
    label: str | None = None
    body: str | None = None
    """The digest of a body without id and time, as ``groups`` returns it."""
    why: str | None = None
    """Excluded for this reason."""

    def __bool__(self) -> bool:
        """Whether anything is set; an empty selector would match every install."""
        return any(self._values.values())

    @property
    def _values(self) -> dict[str, Any]:
        return {**vars(self), "ids": [str(each) for each in self.ids] or None}

    def values(self, *, excluded: bool) -> dict[str, Any]:
        """Return the parameters for the statements of this module."""
        return {**self._values, "excluded": excluded}


class Group(NamedTuple):
    """Installs that are alike, of which many were first seen within an hour."""

    body: str | None
    """The digest of their body without id and time; None if only version and label are the same."""
    version: str
    label: str | None
    first_seen_from: datetime
    first_seen_to: datetime
    installs: int
    established: int
    excluded: int
    """How many of them are already excluded."""


class Match(NamedTuple):
    """How many installs match a selector, and the first day on which one of them is counted."""

    installs: int
    established: int
    since: date | None


class Reason(NamedTuple):
    """How many installs are excluded for one reason, and when they were first seen."""

    why: str
    installs: int
    established: int
    first_seen_from: datetime
    first_seen_to: datetime


def groups(connection: Connection, least: int = LEAST) -> list[Group]:
    """Return the groups of installs that look invented, the largest first.

    At least ``least`` of a group were first seen within an hour. Groups that are already excluded
    are left out.
    """
    return [Group(*row) for row in connection.execute(_GROUPS, {"least": least})]


def look(connection: Connection, selector: Selector, *, excluded: bool = False) -> Match:
    """Count the installs that match; by default those that are not excluded."""
    return Match(*connection.execute(_LOOK, selector.values(excluded=excluded)).one())


def reasons(connection: Connection) -> list[Reason]:
    """Return why installs are excluded, the reason of most installs first."""
    return [Reason(*row) for row in connection.execute(_REASONS)]


def exclude(engine: Engine, selector: Selector, why: str) -> Match:
    """Take the installs that match out of all numbers, and request the recount of their days.

    Each transaction excludes ``AT_ONCE`` of them and requests their recount. So if the process is
    stopped, it can be run again.
    """
    return _change(engine, selector, exclude=why)


def include(engine: Engine, selector: Selector) -> Match:
    """Count the excluded installs that match again, and request the recount of their days."""
    return _change(engine, selector, exclude=None)


def _change(engine: Engine, selector: Selector, *, exclude: str | None) -> Match:
    values = selector.values(excluded=exclude is None)
    after, days = recount.NIL, list[date | None]()
    while True:
        with engine.begin() as connection:
            ids = [*map(str, connection.scalars(_NEXT, {**values, "after": after}))]
            if not ids:
                break
            days += _change_these(connection, ids, exclude)
            after = ids[-1]
    established = [day for day in days if day is not None]
    return Match(len(days), len(established), min(established, default=None))


def _change_these(
    connection: Connection, ids: Sequence[str], exclude: str | None
) -> list[date | None]:
    """Exclude or include installs; return the day on which each was established."""
    statement = _INCLUDE if exclude is None else _EXCLUDE
    # One by one, ordered by id like the rows of a batch of heartbeats: this prevents deadlocks.
    days = [
        day
        for each in ids
        for day in connection.scalars(statement, {"id": each, "reason": exclude})
    ]
    if established := [day for day in days if day is not None]:
        recount.request(connection, min(established))
    return days
