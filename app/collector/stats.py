"""The numbers that the page, its JSON and its CSV show. Pure.

Every number of installs here is rounded as ``rounding`` describes, and everything that a reader
sees is computed from these rounded numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta

from app.collector import adoption, daily, periods
from app.collector.adoption import Adoption, Release
from app.collector.daily import (
    ABSENT,
    ACTIVE_2D,
    ACTIVE_7D,
    ACTIVE_30D,
    DAY,
    DEV_BUILDS,
    MONTH,
    STOCKS,
    Counted,
    Counts,
    Filter,
    Span,
    begins,
)
from app.collector.names import OTHER, age
from app.collector.periods import Cohort, Flows, Growth
from app.collector.rounding import (
    FOLD_BELOW,
    ROUNDED_TO,
    Distribution,
    Group,
    Shown,
    about,
    distribute,
    fold,
)
from app.payload import Bucket, all_fields

EXACT = frozenset({ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, DEV_BUILDS})
"""The totals that are exact if no filter is set."""

YEAR = timedelta(days=364)
"""How far back versions are read."""

LATE = timedelta(hours=1)
"""How long after its end a day must be counted."""


def counting_stopped(last: date, now: datetime) -> bool:
    """Return whether a day after ``last``, the last that was counted, is overdue."""
    return now >= begins(last + timedelta(days=2)) + LATE


_IDLE = {bool: "false", Bucket: "0"}

UNUSED = {
    name: _IDLE[each.annotation]
    for name, each in all_fields().items()
    if name.startswith("features.") and each.annotation in _IDLE
}
"""The features, each with the value that means that it is not used."""


@dataclass(frozen=True)
class DayOfStats:
    """One day's numbers: its stocks, development builds, and the active installs by version."""

    day: date
    counted_at: datetime | None
    """When the day was first counted; None if that is not known."""
    movements: dict[str, Shown]
    dev_builds: Shown
    versions: dict[str, int]
    other_versions: Shown

    @property
    def by_version(self) -> Distribution:
        """The versions, the commonest first."""
        groups = [Group(*each) for each in self.versions.items()]
        active = self.movements[ACTIVE_2D]
        of = None if active is None else about(active)
        return Distribution(groups, self.other_versions, reported_by=of)


@dataclass(frozen=True)
class Feature:
    """How many installs use a feature, of those that report it."""

    installs: Shown
    of: Shown


@dataclass(frozen=True)
class Before:
    """How many installs were active at the end of a day."""

    day: date
    active: Shown


@dataclass(frozen=True)
class LiveStats:
    """How many installs there are at a moment: active ones, and those not established yet."""

    as_of: datetime
    active: Shown
    not_established: Shown


@dataclass(frozen=True)
class Recount:
    """Which days are being counted again, and the last replayed day."""

    since: date
    replayed: date | None
    until: date


@dataclass(frozen=True)
class Stats:
    """Everything that is shown, for a filter and a range of days.

    There are no days if nothing was counted yet, or if too few installs pass the filter.
    """

    as_of: datetime | None
    since: date | None
    until: date | None
    version: str | None
    edition: str | None
    live: LiveStats | None = None
    recount: Recount | None = None
    standby_as_of: datetime | None = None
    """The time of all numbers, if they were read from a standby that is behind."""
    fold_below: int = FOLD_BELOW
    rounded_to: int = ROUNDED_TO
    days: list[DayOfStats] = field(default_factory=list)
    a_month_before: Before | None = None
    """None if that day was not counted."""
    growth: Growth | None = None
    cohorts: list[Cohort] = field(default_factory=list)
    """The oldest first; none under a version, since installs leave it."""
    adoption: list[Adoption] = field(default_factory=list)
    """The newest release first; none under a version."""
    values: dict[str, Distribution] = field(default_factory=dict)
    """How many installs have each value; of a feature, only those that use it are counted."""
    features: dict[str, Feature] = field(default_factory=dict)
    releases: list[Release] = field(default_factory=list)
    """The listed releases, the newest first."""
    all_versions: list[str] = field(default_factory=list)
    all_editions: list[str] = field(default_factory=list)

    @property
    def change(self) -> int | None:
        """How many more are active than a month before; None if either number is not shown."""
        before, now = self.a_month_before, self.days[-1].movements[ACTIVE_2D]
        if before is None or before.active is None or now is None:
            return None
        return now - before.active


@dataclass(frozen=True)
class Numbers:
    """What was counted, before anything is rounded.

    ``versions_of_all`` and ``editions_of_all`` are those of the last day, without the filter.
    """

    versions: Mapping[date, Counts]
    """Of the last day, and of the year before if that is shown."""
    versions_of_all: Counts
    editions_of_all: Counts
    releases: Sequence[Release] = ()
    stocks: Mapping[date, Counts] = field(default_factory=dict)
    flows: Flows = field(default_factory=dict)
    """Of ``periods.HISTORY`` before the last day."""
    values: Mapping[str, Counts] = field(default_factory=dict)
    counted: Mapping[date, Counted] = field(default_factory=dict)
    """Of the same days."""


def since(span: Span, days: int) -> date:
    """Return the first of the last ``days`` days, or the first that was counted."""
    return max(span.first, span.last - (days - 1) * DAY)


def nothing(
    chosen: Filter,
    *,
    live: LiveStats | None = None,
    recount: Recount | None = None,
    standby_as_of: datetime | None = None,
) -> Stats:
    """Return what is shown before any day is counted."""
    return Stats(
        as_of=None,
        since=None,
        until=None,
        version=chosen.version,
        edition=chosen.edition,
        live=None if chosen != Filter() else live,
        recount=recount,
        standby_as_of=standby_as_of,
    )


def show(empty: Stats, numbers: Numbers, span: Span, *, days: int) -> Stats:
    """Add what is shown of the last ``days`` to ``empty``, a result of ``nothing``."""
    chosen = Filter(empty.version, empty.edition)
    known = replace(
        empty,
        as_of=span.as_of,
        since=since(span, days),
        until=span.last,
        releases=sorted(numbers.releases, key=lambda each: age(each.version), reverse=True),
        all_versions=_choices(numbers.versions_of_all),
        all_editions=_choices(numbers.editions_of_all),
    )
    if not may_look(chosen, sum(numbers.versions.get(span.last, {}).values())):
        return known
    return replace(
        known,
        days=[
            _of_day(day, numbers, chosen)
            for day in daily.days(since(span, days), span.last)
            if day in numbers.counted
        ],
        a_month_before=_before(span.last - MONTH, numbers, chosen),
        growth=periods.growth(numbers.flows, numbers.counted, span, days),
        cohorts=[] if chosen.version else periods.cohorts(numbers.flows, numbers.counted, span),
        adoption=[] if chosen.version else _adoption(known.releases, numbers, span),
        values=_values(numbers.values),
        features={
            name: feature(numbers.values[name], unused)
            for name, unused in UNUSED.items()
            if name in numbers.values
        },
    )


def _values(values: Mapping[str, Counts]) -> dict[str, Distribution]:
    """Return the distribution of each field; a feature that is on or off is only in ``features``.

    Installs that do not use a feature are no group here: whether that group is named would show
    whether it has fewer than 5 installs.
    """
    users = {
        name: {value: n for value, n in counts.items() if value != UNUSED.get(name)}
        for name, counts in values.items()
        if UNUSED.get(name) != _IDLE[bool]
    }
    return {name: distribute(counts) for name, counts in users.items()}


def feature(counts: Counts, unused: str) -> Feature:
    """Return how many installs use a feature, of those that report it."""
    reported = {value: n for value, n in counts.items() if value != ABSENT}
    everyone = sum(reported.values())
    return Feature(about(everyone - reported.get(unused, 0)), about(everyone))


def _choices(counts: Counts) -> list[str]:
    """Return the values to filter by."""
    return sorted(group.value for group in distribute(counts).groups)


def may_look(chosen: Filter, active: int) -> bool:
    """Return whether enough installs pass a filter; otherwise it is not shown whether any do."""
    return chosen == Filter() or (chosen.version != OTHER and active >= FOLD_BELOW)


def _stock(name: str, counts: Counts, chosen: Filter) -> Shown:
    is_exact = chosen == Filter() and name in EXACT
    return (fold if is_exact else about)(counts.get(name, 0))


def _of_day(day: date, numbers: Numbers, chosen: Filter) -> DayOfStats:
    stocks = numbers.stocks.get(day, {})
    versions = distribute(numbers.versions.get(day, {}))
    return DayOfStats(
        day=day,
        counted_at=numbers.counted[day].at,
        movements={name: _stock(name, stocks, chosen) for name in STOCKS},
        dev_builds=_stock(DEV_BUILDS, stocks, chosen),
        versions={group.value: group.installs for group in versions.groups},
        other_versions=versions.folded_installs,
    )


def _before(day: date, numbers: Numbers, chosen: Filter) -> Before | None:
    if day not in numbers.counted:
        return None
    return Before(day, _stock(ACTIVE_2D, numbers.stocks.get(day, {}), chosen))


def _adoption(releases: Sequence[Release], numbers: Numbers, span: Span) -> list[Adoption]:
    known = daily.days(max(span.first, span.last - YEAR), span.last)
    return adoption.of(releases, {day: distribute(numbers.versions.get(day, {})) for day in known})
