"""What the page, its JSON and its CSV tell: the daily numbers, with small groups folded. Pure.

A group of fewer than ``FOLD_BELOW`` installs is not told: its number is None, and where it has a
name of its own that is left out. Nothing is nobody's secret: zero is told as zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from app.collector.daily import MOVEMENTS, OTHER, Counts, Filter

FOLD_BELOW = 5

Told = int | None
"""A number of installs; None for 1 to 4."""


def fold(installs: int) -> Told:
    """Return a number as it may be told."""
    return installs if installs == 0 or installs >= FOLD_BELOW else None


@dataclass(frozen=True)
class Group:
    """How many installs have a value."""

    value: str
    installs: int


@dataclass(frozen=True)
class Distribution:
    """The groups that are large enough to be told, the largest first, and what the others hold."""

    groups: list[Group]
    folded_groups: int
    folded_installs: Told


def distribute(counts: Mapping[str, int]) -> Distribution:
    """Fold what is small, and what was not kept apart in the first place."""
    large = {v: n for v, n in counts.items() if n >= FOLD_BELOW and v != OTHER}
    groups = [Group(v, n) for v, n in sorted(large.items(), key=lambda each: (-each[1], each[0]))]
    rest = {v: n for v, n in counts.items() if v not in large}
    return Distribution(groups, len(rest), fold(sum(rest.values())))


@dataclass(frozen=True)
class DayOfStats:
    """One day's numbers: each movement, and the active installs by version."""

    day: date
    movements: dict[str, Told]
    versions: dict[str, int]
    other_versions: Told


@dataclass(frozen=True)
class Stats:
    """All that is told, for a filter and a range of days."""

    as_of: datetime | None
    since: date | None
    until: date | None
    version: str | None
    edition: str | None
    fold_below: int
    days: list[DayOfStats]
    values: dict[str, Distribution]
    all_versions: list[str]
    all_editions: list[str]


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
        all_versions=[],
        all_editions=[],
    )


@dataclass(frozen=True)
class Numbers:
    """What was counted, before anything is folded."""

    movements: Mapping[date, Counts]
    versions: Mapping[date, Counts]
    values: Mapping[str, Counts]
    all_values: Mapping[str, Counts]
    """Without a filter: what there is to choose from."""
    all_versions: Counts


def tell(numbers: Numbers, *, as_of: datetime, since: date, until: date, chosen: Filter) -> Stats:
    """Fold the numbers into what may be told, the days in their order and none left out."""
    return Stats(
        as_of=as_of,
        since=since,
        until=until,
        version=chosen.version,
        edition=chosen.edition,
        fold_below=FOLD_BELOW,
        days=[_of_day(day, numbers) for day in _days(since, until)],
        values={name: distribute(counts) for name, counts in numbers.values.items()},
        all_versions=_names(numbers.all_versions),
        all_editions=_names(numbers.all_values["edition"]),
    )


def _days(since: date, until: date) -> Iterable[date]:
    return (since + timedelta(days=n) for n in range((until - since).days + 1))


def _of_day(day: date, numbers: Numbers) -> DayOfStats:
    moved, versions = numbers.movements.get(day, {}), numbers.versions.get(day, {})
    told = distribute(versions)
    return DayOfStats(
        day=day,
        movements={name: fold(moved.get(name, 0)) for name in MOVEMENTS},
        versions={group.value: group.installs for group in told.groups},
        other_versions=told.folded_installs,
    )


def _names(counts: Mapping[str, int]) -> list[str]:
    return sorted(group.value for group in distribute(counts).groups)
