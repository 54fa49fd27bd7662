"""How many installs are new, lost and retained, by day, week or month. Pure.

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
"""How far back days are read: a year of whole months that ended 30 days ago."""

Unit = Literal["day", "week", "month"]
UNITS: Mapping[Unit, int] = {"day": 1, "week": 7, "month": 30}
"""The units in which growth can be shown, the shortest first, and about how many days each has."""
FINE = 90
"""A range of more days than this is not shown by day."""
FEWEST = 3
"""At least so many periods are shown, even if they are longer than the range."""
LEGIBLE = 0.9
"""The share of the periods that must show a number."""

COHORTS = 12
"""How many months are shown."""
LATER: Mapping[int, str] = {30: RETAINED, 90: RETAINED_90}
"""After how many days retention is measured, and its flow."""

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

    Only one kind is shown, so that no two sums of it differ by a day.
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
    """By the number of days. A number that is not known yet, or was not counted, is missing."""


def growth(flows: Flows, counted: Mapping[date, Counted], span: Span, length: int) -> Growth:
    """Return the periods of about the last ``length`` days, in the shortest legible unit.

    A unit is legible if at least ``LEGIBLE`` of its periods show a number. If no unit is, the
    longest one with a complete period is used.
    """
    found = Growth("month", [])
    for unit, of_unit in UNITS.items():
        if length > FINE and unit == "day":
            continue
        whole = [*_whole(unit, counted, span)][-max(FEWEST, length // of_unit) :]
        if not whole:
            break
        found = Growth(unit, [_period(first, last, flows) for first, last in whole])
        shown = [each for each in found.periods if (each.new, each.lost) != (None, None)]
        if len(shown) >= LEGIBLE * len(whole):
            break
    return found


def _whole(unit: Unit, counted: Mapping[date, Counted], span: Span) -> Iterator[tuple[date, date]]:
    """Yield the first and the last day of each period whose days were all counted."""
    first = _first_day(unit, max(span.first, span.last - HISTORY))
    while (after := _first_day(unit, first + _LONGEST[unit])) <= span.last + DAY:
        if all(day in counted for day in days(first, after - DAY)):
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
    """Return the sum of a flow over several days, rounded once."""
    return about(sum(flows.get(day, {}).get(name, 0) for day in days(first, last)))


def cohorts(flows: Flows, counted: Mapping[date, Counted], span: Span) -> list[Cohort]:
    """Return the last months that ended at least 30 days ago, the oldest first."""
    months = [
        (first, last) for first, last in _whole("month", counted, span) if last + MONTH <= span.last
    ]
    return [_cohort(first, last, flows, counted) for first, last in months[-COHORTS:]]


def _cohort(first: date, last: date, flows: Flows, counted: Mapping[date, Counted]) -> Cohort:
    retained = {}
    for after, name in LATER.items():
        since, until = first + after * DAY, last + after * DAY
        if all(day in counted and name in counted[day].flows for day in days(since, until)):
            retained[str(after)] = _in_all(flows, name, since, until)
    return Cohort(first, _in_all(flows, NEW, first, last), retained)
