"""Notable events, for the page and the feed. Pure.

Every event is made from the rounded numbers of ``stats``, so it reveals nothing that the page does
not reveal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal
from uuid import UUID, uuid5

from app.collector.daily import ACTIVE_2D, DAY, begins
from app.collector.phrases import long_date, moment, number, percent
from app.collector.rounding import FOLD_BELOW, Shown
from app.collector.stats import LATE, DayOfStats, Stats, counting_stopped

WEEK = timedelta(days=7)
REACHED_PERCENT = 10
"""A release that reaches this share of the active installs for the first time is an event."""
FELL_PERCENT = 30
FEWEST_ACTIVE = 20
"""Among fewer installs, a few that pause would already be a fall of 30 %."""
AT_MOST = 50
"""The feed has at most so many events, the newest ones."""

_NAMES = UUID("6d3f0e3c-2b5b-4c0e-9f38-6c1c5d7a9e41")
"""The namespace of the feed's ids. Feed readers know entries by them: never change it."""
FEED = uuid5(_NAMES, "feed").urn

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
"""When the feed was updated, before the first day is counted."""

Kind = Literal["release", "fall", "standstill"]


@dataclass(frozen=True)
class Event:
    """Something notable, with the day on which it happened or began."""

    day: date
    kind: Kind
    title: str
    sentence: str
    updated: datetime
    """When the sentence last changed."""
    version: str = ""

    @property
    def id(self) -> str:
        """Its id for feed readers, which never changes."""
        return uuid5(_NAMES, f"{self.kind}/{self.day}/{self.version}").urn


def fell(then: int, now: int) -> bool:
    """Return whether ``now`` active installs are a fall, a week after there were ``then``."""
    return then >= FEWEST_ACTIVE and 100 * (then - now) > FELL_PERCENT * then


def of(stats: Stats, *, counting_stopped: bool) -> list[Event]:
    """Return the events on the days of ``stats``, the newest first.

    If ``counting_stopped``, that is one of them. ``stats`` must be of all installs. An event that
    may have begun before its first day is left out.
    """
    certain = _certain(stats)
    found = [
        *_releases(certain, dict(stats.releases)),
        *_falls(certain),
        *_standstills(stats, counting_stopped=counting_stopped),
    ]
    found.sort(key=lambda event: (event.updated, event.day, event.title), reverse=True)
    return found[:AT_MOST]


def updated(stats: Stats, events: Sequence[Event]) -> datetime:
    """Return when the feed of these events last changed."""
    if events:
        return events[0].updated
    return stats.as_of.astimezone(UTC) if stats.as_of else _NEVER


def _certain(stats: Stats) -> list[DayOfStats]:
    """Return the days whose numbers no recount is about to change."""
    if stats.recount is None:
        return stats.days
    since, replayed = stats.recount.since, stats.recount.replayed
    changes = max(since, replayed + DAY) if replayed else since
    return [each for each in stats.days if each.day < changes]


def _known(day: DayOfStats) -> datetime:
    """Return when the numbers of a day became known."""
    return day.counted_at.astimezone(UTC) if day.counted_at else begins(day.day + DAY)


def _releases(days: Sequence[DayOfStats], out: Mapping[str, date]) -> Iterator[Event]:
    """Yield an event for each release that came out on these days and reached the share."""
    reached: set[str] | None = None
    for each in days:
        total = each.by_version.total
        if not total:
            continue
        shares = {
            version: installs
            for version, installs in each.versions.items()
            if 100 * installs >= REACHED_PERCENT * total
        }
        if reached is None:
            reached = {*shares}  # they may have reached it earlier
        for version in sorted(shares.keys() - reached):
            if version in out and out[version] >= days[0].day:
                yield _release(version, shares[version], each)
        reached |= shares.keys()


def _release(version: str, installs: int, day: DayOfStats) -> Event:
    share = percent(installs, day.by_version.total)
    return Event(
        day.day,
        "release",
        f"{version} reached {REACHED_PERCENT}% of the active installs",
        f"At the end of {long_date(day.day)}, {share} of the active installs ran {version}:"
        f" {REACHED_PERCENT}% or more for the first time.",
        _known(day),
        version,
    )


def _falls(days: Sequence[DayOfStats]) -> Iterator[Event]:
    week_before = {each.day + WEEK: each for each in days}

    def has_fallen(day: DayOfStats) -> bool:
        before = week_before.get(day.day)
        return before is not None and fell(_least(_active(before)), _most(_active(day)))

    last: date | None = None
    for run in _runs(days, has_fallen):
        first, before = run[0], week_before[run[0].day]
        if before is days[0]:
            continue  # it may have begun before these days
        if last is None or before.day >= last:  # otherwise it is the same fall
            last = first.day
            yield _fall(before, first)


def _fall(before: DayOfStats, day: DayOfStats) -> Event:
    then, now = _active(before), _active(day)
    return Event(
        day.day,
        "fall",
        f"Active installs fell by more than {FELL_PERCENT}% in 7 days",
        f"At the end of {long_date(day.day)}, {number(now)} installs were active. 7 days before,"
        f" there were {number(then)}.",
        _known(day),
    )


def _active(day: DayOfStats) -> Shown:
    return day.movements[ACTIVE_2D]


def _least(installs: Shown) -> int:
    return 1 if installs is None else installs


def _most(installs: Shown) -> int:
    return FOLD_BELOW - 1 if installs is None else installs


def _standstills(stats: Stats, *, counting_stopped: bool) -> Iterator[Event]:
    # A standby that is behind does not show whether the last day was counted.
    is_known = stats.until is not None and stats.standby_as_of is None
    overdue = stats.until + DAY if stats.until and is_known and counting_stopped else None
    for run in _runs(stats.days, _is_late):
        if run[0] is stats.days[0]:
            continue  # it may have begun earlier, or counting began then
        if overdue and run[-1].day + DAY == overdue:
            yield _standstill(run[0].day, overdue)
            overdue = None
        else:
            yield _late(run)
    if overdue:
        yield _standstill(overdue, overdue)


def _is_late(day: DayOfStats) -> bool:
    return day.counted_at is not None and counting_stopped(day.day - DAY, day.counted_at)


def _late(days: Sequence[DayOfStats]) -> Event:
    first, last, at = days[0], days[-1], _known(days[-1])
    if first is last:
        sentence = f"{long_date(first.day)} was counted late, on {moment(at)}."
    else:
        sentence = (
            f"The days from {long_date(first.day)} to {long_date(last.day)} were counted late, the"
            f" last of them on {moment(at)}."
        )
    return Event(first.day, "standstill", "Counting was late", sentence, at)


def _standstill(since: date, overdue: date) -> Event:
    due = begins(overdue + DAY)
    return Event(
        since,
        "standstill",
        "Counting has stopped",
        f"The last day that was counted is {long_date(overdue - DAY)}. {long_date(overdue)} should"
        f" have been counted at {due:%H:%M} UTC on {long_date(due)}, and is not counted yet.",
        due + LATE,
    )


def _runs(
    days: Sequence[DayOfStats], is_one: Callable[[DayOfStats], bool]
) -> Iterator[list[DayOfStats]]:
    """Yield each run of consecutive days for which ``is_one`` is true."""
    run: list[DayOfStats] = []
    for each in days:
        if is_one(each):
            run.append(each)
        elif run:
            yield run
            run = []
    if run:
        yield run
