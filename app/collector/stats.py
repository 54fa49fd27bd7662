"""What the page, its JSON and its CSV tell: the daily numbers, with small groups folded. Pure.

A number from 1 to 4 is not told. Of what installs are like, versions included, neither is what
would give one away: the rest of an answer is 0 or at least ``FOLD_BELOW``, and so is what two
answers differ by where one looks at some of the other's installs. How many were active, new and
lost on a day is folded number by number. Nothing is nobody's secret: zero is told as zero.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any, Literal

from app.collector.daily import ABSENT, MOVEMENTS, Counts, Filter
from app.collector.names import OTHER
from app.payload import Bucket, all_fields

FOLD_BELOW = 5
FEW: Literal["fewer than 5"] = "fewer than 5"

Told = int | None
"""A number of installs; None for 1 to 4."""


def fold(installs: int) -> Told:
    """Return a number as it may be told."""
    return None if _small(installs) else installs


def _small(installs: int) -> bool:
    return 0 < installs < FOLD_BELOW


@dataclass(frozen=True)
class Group:
    """How many installs have a value."""

    value: str
    installs: int


@dataclass(frozen=True)
class Distribution:
    """The groups that are told, the largest first, and how many installs all others hold.

    That is None only where there are fewer than ``FOLD_BELOW`` installs in all. ``reported_by`` is
    how many installs have a value at all; where that is None it is not told, and those that have no
    value are counted with the others.
    """

    groups: list[Group]
    folded_installs: Told
    reported_by: Told

    @property
    def total(self) -> int:
        """How many installs there are in all, as far as that is told."""
        return sum(group.installs for group in self.groups) + (self.folded_installs or 0)

    def in_order(self, key: Callable[[str], Any]) -> "Distribution":
        """Return the same with the groups in another order than by their size."""
        return replace(self, groups=sorted(self.groups, key=lambda group: key(group.value)))


_Parts = tuple[tuple[int, ...], ...]
_WHOLE: _Parts = ((0, 1, 2, 3),)
_VERSION: _Parts = ((0, 1), (2, 3))
_EDITION: _Parts = ((0, 2), (1, 3))
_EACH: _Parts = ((0,), (1,), (2,), (3,))
"""The places in ``Cells`` that make up each group of installs which somebody can look at, or work
out by looking twice: without a filter, by version, by edition, and by both."""


def distribute(counts: Mapping[str, Cells]) -> Distribution:
    """Fold what is small, what would give it away, and what was not kept apart to begin with."""
    hidden = _hidden(counts)
    told = {value: cells[0] for value, cells in counts.items() if cells[0] and value not in hidden}
    told.pop(ABSENT, None)
    groups = [Group(v, n) for v, n in sorted(told.items(), key=lambda each: (-each[1], each[0]))]
    folded = fold(sum(counts[value][0] for value in hidden))
    if folded is None or ABSENT in hidden:
        return Distribution(groups, folded, reported_by=None)
    return Distribution(groups, folded, reported_by=sum(told.values()) + folded)


def _hidden(counts: Mapping[str, Cells]) -> set[str]:
    """Return what is not told under a filter, which is all that is not told under less of it.

    Otherwise what one answer folds could be worked out from what another tells.
    """
    everywhere = _hide(counts, _WHOLE, {OTHER} & counts.keys())
    by_version = _hide(counts, _VERSION, everywhere)
    by_edition = _hide(counts, _EDITION, everywhere)
    return _hide(counts, _EACH, by_version | by_edition)


def _hide(counts: Mapping[str, Cells], parts: _Parts, hidden: set[str]) -> set[str]:
    """Return ``hidden``, what is small in a part, and what it takes for the sum not to be."""
    hidden = hidden | {value for value, cells in counts.items() if _any_small([cells], parts)}
    # Those that have no value are the last to be hidden: without them the rest has no base.
    told = sorted(
        counts.keys() - hidden, key=lambda value: (value != ABSENT, -sum(counts[value]), value)
    )
    while told and _any_small([counts[value] for value in hidden], parts):
        hidden.add(told.pop())
    return hidden


def _any_small(groups: list[Cells], parts: _Parts) -> bool:
    return any(_small(sum(cells[n] for cells in groups for n in part)) for part in parts)


@dataclass(frozen=True)
class Use:
    """How many installs use a feature: a number, or where that is None, what may be said."""

    installs: Told
    words: Literal["exactly", "fewer than 5", "all but fewer than 5", "not told"]


def use(counts: Mapping[str, Cells], told: Distribution, unused: str) -> Use:
    """Say how many have another value than ``unused``, by what is told and by no other number."""
    groups = {group.value: group.installs for group in told.groups}
    if told.reported_by is not None and (unused in groups or told.folded_installs == 0):
        others = sum(n for value, n in groups.items() if value != unused)
        return Use(others + (told.folded_installs or 0), "exactly")
    idle = counts.get(unused, (0,))[0]
    absent = counts.get(ABSENT, (0,))[0]
    if _small(sum(cells[0] for cells in counts.values()) - idle - absent):
        return Use(None, FEW)
    return Use(None, "all but fewer than 5" if _small(idle) else "not told")


_IDLE = {bool: "false", Bucket: "0"}

UNUSED = {
    name: _IDLE[field.annotation]
    for name, field in all_fields().items()
    if name.startswith("features.") and field.annotation in _IDLE
}
"""The features, and the value of each that means that it is not used."""


@dataclass(frozen=True)
class DayOfStats:
    """One day's numbers: each movement, and the active installs by version."""

    day: date
    movements: dict[str, Told]
    versions: dict[str, int]
    other_versions: Told

    @property
    def by_version(self) -> Distribution:
        """The versions, the commonest first."""
        groups = [Group(*each) for each in self.versions.items()]
        folded = self.other_versions
        of = None if folded is None else sum(self.versions.values()) + folded
        return Distribution(groups, folded, reported_by=of)


@dataclass(frozen=True)
class Stats:
    """All that is told, for a filter and a range of days.

    Without days nothing is told: nothing was counted yet, or the filter leaves too few installs, or
    would tell of too few by what it leaves out.
    """

    as_of: datetime | None
    since: date | None
    until: date | None
    version: str | None
    edition: str | None
    fold_below: int
    days: list[DayOfStats]
    values: dict[str, Distribution]
    features: dict[str, Use]
    all_versions: list[str]
    all_editions: list[str]


@dataclass(frozen=True)
class Numbers:
    """What was counted, before anything is folded."""

    movements: Mapping[date, Counts]
    versions: Mapping[date, Mapping[str, Cells]]
    values: Mapping[str, Mapping[str, Cells]]


def nothing(chosen: Filter) -> Stats:
    """Return what is told before anything was counted."""
    return Stats(
        as_of=None,
        since=None,
        until=None,
        version=chosen.version,
        edition=chosen.edition,
        fold_below=FOLD_BELOW,
        days=[],
        values={},
        features={},
        all_versions=[],
        all_editions=[],
    )


def tell(numbers: Numbers, *, as_of: datetime, since: date, until: date, chosen: Filter) -> Stats:
    """Fold the numbers into what may be told, the days in their order and none left out."""
    versions, editions = numbers.versions.get(until, {}), numbers.values.get("edition", {})
    all_versions, all_editions = _choices(versions), _choices(editions)
    told = _may_look(chosen, all_versions, all_editions, [*versions.values()])
    values = {name: distribute(counts) for name, counts in numbers.values.items() if told}
    return Stats(
        as_of=as_of,
        since=since,
        until=until,
        version=chosen.version,
        edition=chosen.edition,
        fold_below=FOLD_BELOW,
        days=[_of_day(day, numbers) for day in _days(since, until) if told],
        values=values,
        features={
            name: use(numbers.values[name], values[name], unused)
            for name, unused in UNUSED.items()
            if name in values
        },
        all_versions=all_versions,
        all_editions=all_editions,
    )


def _choices(counts: Mapping[str, Cells]) -> list[str]:
    """Return the values that are told of all installs: a filter by another tells nothing."""
    told = distribute({value: (sum(cells), 0, 0, 0) for value, cells in counts.items()})
    return sorted(group.value for group in told.groups)


def _may_look(
    chosen: Filter, versions: list[str], editions: list[str], active: list[Cells]
) -> bool:
    if chosen == Filter():
        return True
    known = chosen.version in {None, *versions} and chosen.edition in {None, *editions}
    return known and any(cells[0] for cells in active) and not _any_small(active, _EACH)


def _days(since: date, until: date) -> Iterator[date]:
    return (since + timedelta(days=n) for n in range((until - since).days + 1))


def _of_day(day: date, numbers: Numbers) -> DayOfStats:
    moved = numbers.movements.get(day, {})
    told = distribute(numbers.versions.get(day, {}))
    return DayOfStats(
        day=day,
        movements={name: fold(moved.get(name, 0)) for name in MOVEMENTS},
        versions={group.value: group.installs for group in told.groups},
        other_versions=told.folded_installs,
    )


def document(stats: Stats) -> dict[str, Any]:
    """Return what ``stats.json`` holds: what is told, by its names here, with ISO dates."""
    as_of = stats.as_of.isoformat() if stats.as_of else None
    days = [{**asdict(each), "day": each.day.isoformat()} for each in stats.days]
    since, until = (day.isoformat() if day else None for day in (stats.since, stats.until))
    return {**asdict(stats), "as_of": as_of, "since": since, "until": until, "days": days}


def rows(stats: Stats) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the lines of ``stats.csv``: day, metric, value, installs and of, the names first.

    ``of`` is how many installs report the metric, empty where that is not told. The value ``OTHER``
    is all that are folded; the value of a movement is empty; and how many use a feature has the
    value ``used``.
    """
    yield "day", "metric", "value", "installs", "of"
    for each in stats.days:
        day = each.day.isoformat()
        for movement, installs in each.movements.items():
            yield day, movement, "", _cell(installs), ""
        of = _base(each.by_version)
        for version, installs in [*each.versions.items(), (OTHER, each.other_versions)]:
            yield day, "version", version, _cell(installs), of
    day = str(stats.until)
    for name, told in stats.values.items():
        for group in told.groups:
            yield day, name, group.value, _cell(group.installs), _base(told)
        yield day, name, OTHER, _cell(told.folded_installs), _base(told)
    for name, used in stats.features.items():
        words = used.words if used.installs is None else str(used.installs)
        yield day, name, "used", words, _base(stats.values[name])


def _cell(installs: Told) -> str:
    return FEW if installs is None else str(installs)


def _base(told: Distribution) -> str:
    return "" if told.reported_by is None else str(told.reported_by)
