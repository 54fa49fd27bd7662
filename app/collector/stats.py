"""What the page, its JSON and its CSV show of the daily numbers. Pure.

How many installs there are in all is shown as it is, but for 1 to 4. All else, which is what is
broken down or filtered, is rounded to the nearest multiple of ``ROUNDED_TO``, so that two such
numbers are equal or differ by that much, whatever is between them; and of what is below
``FOLD_BELOW`` it is not even shown whether it is zero, or one install could be told by the exact
number of all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any, Literal

from app.collector.daily import (
    ABSENT,
    ACTIVE_2D,
    DEV_BUILDS,
    IN_USE,
    MOVEMENTS,
    RETAINED,
    Counts,
    Filter,
    begins,
)
from app.collector.names import OTHER
from app.payload import Bucket, all_fields

FOLD_BELOW = 5
ROUNDED_TO = 5
FEW: Literal["fewer than 5"] = "fewer than 5"

EXACT = frozenset({*MOVEMENTS, DEV_BUILDS} - {IN_USE, RETAINED})
"""What is not rounded where it is of all installs: the rest says what installs are like."""

LATE = timedelta(hours=1)
"""How long after its end a day may be counted before something is wrong."""

Told = int | None
"""A number of installs as it is shown; None for 1 to 4, and for 0 as well where it is rounded."""


def fold(installs: int) -> Told:
    """Return a number of all installs as it is shown."""
    return None if 0 < installs < FOLD_BELOW else installs


def about(installs: int) -> Told:
    """Return a number of some of the installs as it is shown: rounded, and None below 5."""
    return None if installs < FOLD_BELOW else _nearest(installs)


def _nearest(installs: int) -> int:
    return ROUNDED_TO * ((installs + ROUNDED_TO // 2) // ROUNDED_TO)


def stands_still(last: date, now: datetime) -> bool:
    """Return whether a day after ``last``, the last that was counted, is overdue."""
    return now >= begins(last + timedelta(days=2)) + LATE


@dataclass(frozen=True)
class Group:
    """How many installs have a value."""

    value: str
    installs: int


@dataclass(frozen=True)
class Distribution:
    """The groups that are named, the largest first, and how many installs all others hold.

    ``reported_by`` is how many installs have a value at all. Each number is rounded by itself.
    """

    groups: list[Group]
    folded_installs: Told
    reported_by: Told

    @property
    def total(self) -> int:
        """The whole of which each number is a share, so that none is more than all of it."""
        together = sum(group.installs for group in self.groups) + (self.folded_installs or 0)
        return max(together, self.reported_by or 0)

    def in_order(self, key: Callable[[str], Any]) -> "Distribution":
        """Return the same with the groups in another order than by their size."""
        return replace(self, groups=sorted(self.groups, key=lambda group: key(group.value)))


def distribute(counts: Counts) -> Distribution:
    """Name each group of at least ``FOLD_BELOW``, and put all others together."""
    reported = {value: installs for value, installs in counts.items() if value != ABSENT}
    named = {value: n for value, n in reported.items() if n >= FOLD_BELOW and value != OTHER}
    everyone = sum(reported.values())
    few = everyone - sum(named.values()) == FOLD_BELOW - 1
    if named and few and all(n - _nearest(n) == ROUNDED_TO // 2 for n in named.values()):
        # Each is as large as its number allows: it would be known how many the others are.
        del named[min(named, key=lambda value: (named[value], value))]
    groups = [Group(value, _nearest(installs)) for value, installs in named.items()]
    return Distribution(
        # Not by the exact numbers: their order would show which of two equal ones is larger.
        groups=sorted(groups, key=lambda group: (-group.installs, group.value)),
        folded_installs=about(everyone - sum(named.values())),
        reported_by=about(everyone),
    )


_IDLE = {bool: "false", Bucket: "0"}

UNUSED = {
    name: _IDLE[field.annotation]
    for name, field in all_fields().items()
    if name.startswith("features.") and field.annotation in _IDLE
}
"""The features, and the value of each that means that it is not used."""


def used(counts: Counts, unused: str) -> Told:
    """Return how many installs have another value than ``unused``."""
    return about(sum(n for value, n in counts.items() if value not in {unused, ABSENT}))


@dataclass(frozen=True)
class DayOfStats:
    """One day's numbers: each movement, development builds, and the active installs by version."""

    day: date
    movements: dict[str, Told]
    dev_builds: Told
    versions: dict[str, int]
    other_versions: Told
    counted_at: datetime | None = None
    """When the day was counted first; None where that is unknown."""

    @property
    def by_version(self) -> Distribution:
        """The versions, the commonest first."""
        groups = [Group(*each) for each in self.versions.items()]
        active = self.movements[ACTIVE_2D]
        of = None if active is None else about(active)
        return Distribution(groups, self.other_versions, reported_by=of)


@dataclass(frozen=True)
class LiveStats:
    """How many installs there are at a moment: active ones, and those not established yet."""

    as_of: datetime
    active: Told
    not_established: Told


@dataclass(frozen=True)
class Recount:
    """Which days are being counted again, and the day to which that has come."""

    since: date
    replayed: date | None
    until: date


@dataclass(frozen=True)
class Stats:
    """All that is shown, for a filter and a range of days.

    There are no days if nothing was counted yet, or if too few installs pass the filter.
    """

    as_of: datetime | None
    since: date | None
    until: date | None
    version: str | None
    edition: str | None
    fold_below: int
    rounded_to: int
    live: LiveStats | None
    recount: Recount | None
    standby_as_of: datetime | None
    """As of when all is, if it was read from a standby that is behind."""
    days: list[DayOfStats]
    values: dict[str, Distribution]
    features: dict[str, Told]
    all_versions: list[str]
    all_editions: list[str]


@dataclass(frozen=True)
class Numbers:
    """What was counted, before anything is rounded.

    ``versions_of_all`` and ``editions_of_all`` are those of the last day, whatever the filter.
    """

    movements: Mapping[date, Counts]
    versions: Mapping[date, Counts]
    values: Mapping[str, Counts]
    versions_of_all: Counts
    editions_of_all: Counts


def nothing(
    chosen: Filter,
    *,
    live: LiveStats | None = None,
    recount: Recount | None = None,
    standby_as_of: datetime | None = None,
) -> Stats:
    """Return what is shown before anything was counted."""
    return Stats(
        as_of=None,
        since=None,
        until=None,
        version=chosen.version,
        edition=chosen.edition,
        fold_below=FOLD_BELOW,
        rounded_to=ROUNDED_TO,
        live=None if chosen != Filter() else live,
        recount=recount,
        standby_as_of=standby_as_of,
        days=[],
        values={},
        features={},
        all_versions=[],
        all_editions=[],
    )


def tell(  # noqa: PLR0913 - each has a name
    numbers: Numbers,
    *,
    as_of: datetime,
    since: date,
    until: date,
    chosen: Filter,
    live: LiveStats | None = None,
    recount: Recount | None = None,
    standby_as_of: datetime | None = None,
) -> Stats:
    """Round the numbers to what is shown, the days in their order and none left out."""
    known = replace(
        nothing(chosen, live=live, recount=recount, standby_as_of=standby_as_of),
        as_of=as_of,
        since=since,
        until=until,
        all_versions=_choices(numbers.versions_of_all),
        all_editions=_choices(numbers.editions_of_all),
    )
    if not may_look(chosen, sum(numbers.versions.get(until, {}).values())):
        return known
    return replace(
        known,
        days=[_of_day(day, numbers, chosen) for day in _days(since, until)],
        values={name: distribute(counts) for name, counts in numbers.values.items()},
        features={
            name: used(numbers.values[name], unused)
            for name, unused in UNUSED.items()
            if name in numbers.values
        },
    )


def _choices(counts: Counts) -> list[str]:
    """Return the values to filter by."""
    return sorted(group.value for group in distribute(counts).groups)


def may_look(chosen: Filter, active: int) -> bool:
    """Return whether a filter leaves enough; of too few it is not shown that there are any."""
    return chosen == Filter() or (chosen.version != OTHER and active >= FOLD_BELOW)


def _days(since: date, until: date) -> Iterator[date]:
    return (since + timedelta(days=n) for n in range((until - since).days + 1))


def _of_day(day: date, numbers: Numbers, chosen: Filter) -> DayOfStats:
    moved = numbers.movements.get(day, {})
    versions = distribute(numbers.versions.get(day, {}))

    def shown(name: str) -> Told:
        is_exact = chosen == Filter() and name in EXACT
        return (fold if is_exact else about)(moved.get(name, 0))

    return DayOfStats(
        day=day,
        movements={name: shown(name) for name in MOVEMENTS},
        dev_builds=shown(DEV_BUILDS),
        versions={group.value: group.installs for group in versions.groups},
        other_versions=versions.folded_installs,
    )


def document(stats: Stats) -> dict[str, Any]:
    """Return what ``stats.json`` holds: what is shown, by its names here, with ISO dates."""
    found: dict[str, Any] = _with_iso_dates(asdict(stats))
    return found


def _with_iso_dates(value: Any) -> Any:
    match value:
        case dict():
            return {name: _with_iso_dates(each) for name, each in value.items()}
        case list():
            return [_with_iso_dates(each) for each in value]
        case date():
            return value.isoformat()
    return value


def rows(stats: Stats) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the lines of ``stats.csv``: day, metric, value, installs and of, the names first.

    ``of`` is how many installs report the metric. The value ``OTHER`` is all that are not named;
    the value of a movement is empty; and how many use a feature has the value ``used``. What is
    live has its moment for a day.
    """
    yield "day", "metric", "value", "installs", "of"
    for each in stats.days:
        day = each.day.isoformat()
        for movement, installs in {**each.movements, DEV_BUILDS: each.dev_builds}.items():
            yield day, movement, "", _cell(installs), ""
        of = _cell(each.by_version.reported_by)
        for version, shown in [*each.versions.items(), (OTHER, each.other_versions)]:
            yield day, "version", version, _cell(shown), of
    day = str(stats.until)
    for name, told in stats.values.items():
        of = _cell(told.reported_by)
        for group in told.groups:
            yield day, name, group.value, _cell(group.installs), of
        yield day, name, OTHER, _cell(told.folded_installs), of
    for name, installs in stats.features.items():
        yield day, name, "used", _cell(installs), _cell(stats.values[name].reported_by)
    if stats.live:
        moment = stats.live.as_of.isoformat()
        yield moment, "live", "active", _cell(stats.live.active), ""
        yield moment, "live", "not_established", _cell(stats.live.not_established), ""


def _cell(installs: Told) -> str:
    return FEW if installs is None else str(installs)
