"""How many installs came, went and stayed, by day, week or month. Pure.

A period is shown if each of its days was counted, and every sum is rounded once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from app.collector.daily import (
    DAY,
    LOST,
    MONTH,
    NEW,
    RETAINED,
    RETAINED_90,
    Counted,
    Counts,
    Span,
    days,
)
from app.collector.rounding import Shown, about

HISTORY = timedelta(days=430)
"""How far back days are read: a year of whole months that were over 30 days ago."""

Unit = Literal["day", "week", "month"]
UNITS: Mapping[Unit, int] = {"day": 1, "week": 7, "month": 30}
"""By what growth can be shown, the finest first, and about how many days each has."""
FINE = 90
"""Of more days than this, none is shown by itself."""
LEGIBLE = 0.9
"""The share of periods that have a number that is shown, from which on they are fine enough."""

COHORTS = 12
LATER: Mapping[int, str] = {30: RETAINED, 90: RETAINED_90}
"""After how many days it is looked at who has stayed, and the count of it."""

Flows = Mapping[date, Counts]
"""How many installs were new, lost and retained on each day."""


@dataclass(frozen=True)
class Period:
    """How many installs were new and how many were lost from one day to another, both included."""

    since: date
    until: date
    new: Shown
    lost: Shown


@dataclass(frozen=True)
class Growth:
    """The whole periods of one kind, in their order: days, weeks from Monday on, or months.

    They are the finest of which few have a number that is too small to be shown. Only one kind is
    shown, so that no two sums differ by a day.
    """

    by: Unit
    periods: list[Period]


@dataclass(frozen=True)
class Cohort:
    """The installs that were established in a month, and how many were active so long after."""

    month: date
    """Its first day."""
    established: Shown
    retained: dict[str, Shown]
    """By the number of days after; what is not known, or not yet, is not there."""


def growth(flows: Flows, span: Span, length: int) -> Growth:
    """Return the last periods of about so many days in all, in the finest unit that is legible.

    That is the one in which nearly each period has a number that is shown; else it is the month.
    """
    found = Growth("month", [])
    for unit, of_unit in UNITS.items():
        if length > FINE and unit == "day":
            continue
        whole = [*_whole(unit, span)][-(length // of_unit) :]
        found = Growth(unit, [_period(first, last, flows) for first, last in whole])
        shown = [each for each in found.periods if (each.new, each.lost) != (None, None)]
        if whole and len(shown) >= LEGIBLE * len(whole):
            break
    return found


def _whole(unit: Unit, span: Span) -> Iterator[tuple[date, date]]:
    """Yield the first and the last day of each period whose days were all counted."""
    known = max(span.first, span.last - HISTORY)
    first = _first_day(unit, known)
    while (after := _first_day(unit, first + _LONGEST[unit])) <= span.last + DAY:
        if first >= known:
            yield first, after - DAY
        first = after


_LONGEST: Mapping[Unit, timedelta] = {"day": DAY, "week": 7 * DAY, "month": 31 * DAY}


def _first_day(unit: Unit, day: date) -> date:
    """Return the first day of the period in which a day is."""
    match unit:
        case "day":
            return day
        case "week":
            return day - day.weekday() * DAY
        case "month":
            return day.replace(day=1)


def _period(first: date, last: date, flows: Flows) -> Period:
    return Period(first, last, *(_in_all(flows, name, first, last) for name in (NEW, LOST)))


def _in_all(flows: Flows, name: str, first: date, last: date) -> Shown:
    """Return the sum of a flow over some days, rounded once."""
    return about(sum(flows.get(day, {}).get(name, 0) for day in days(first, last)))


def cohorts(flows: Flows, counted: Mapping[date, Counted], span: Span) -> list[Cohort]:
    """Return the last months that were over 30 days ago, the oldest first."""
    months = [(first, last) for first, last in _whole("month", span) if last + MONTH <= span.last]
    return [_cohort(first, last, flows, counted) for first, last in months[-COHORTS:]]


def _cohort(first: date, last: date, flows: Flows, counted: Mapping[date, Counted]) -> Cohort:
    retained = {}
    for after, name in LATER.items():
        since, until = first + after * DAY, last + after * DAY
        if all(day in counted and name in counted[day].flows for day in days(since, until)):
            retained[str(after)] = _in_all(flows, name, since, until)
    return Cohort(first, _in_all(flows, NEW, first, last), retained)
