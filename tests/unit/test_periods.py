"""How many came, went and stayed in whole days, weeks and months."""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import pytest

from app.collector import periods
from app.collector.daily import LOST, NEW, RETAINED, RETAINED_90, Counted, Span
from app.collector.periods import Cohort, Flows, Growth, Period

DAY = timedelta(days=1)
LAST = date(2026, 5, 7)
"""A Thursday."""
AS_OF = datetime(2026, 5, 8, 0, 1, tzinfo=UTC)


def span(days: int) -> Span:
    """So many days were counted."""
    return Span(LAST - (days - 1) * DAY, LAST, AS_OF)


def each_day(new: int, lost: int = 0, days: int = 1000) -> Flows:
    """The same on each day."""
    return {LAST - n * DAY: {NEW: new, LOST: lost} for n in range(days)}


def counted(days: int, *, has_all: bool = True) -> dict[date, Counted]:
    """Each of so many days."""
    return {LAST - n * DAY: Counted(None, has_all) for n in range(days)}


def growth(flows: Flows, *, known: int = 1000, length: int = 90) -> Growth:
    return periods.growth(flows, counted(known), span(known), length)


def test_of_many_a_day_each_day_is_shown() -> None:
    found = growth(each_day(12, 7))
    assert found.by == "day"
    assert found.periods[-1] == Period(LAST, LAST, 10, 5)
    assert len(found.periods) == 90


def test_weeks_begin_on_monday_and_the_unfinished_one_is_left_out() -> None:
    found = growth(each_day(2, 1))
    assert found.by == "week"
    assert found.periods[-1] == Period(date(2026, 4, 27), date(2026, 5, 3), 15, 5)
    assert [each.since.weekday() for each in found.periods] == [0] * 12
    assert all(each.until - each.since == 6 * DAY for each in found.periods)


def test_of_few_a_week_each_month_is_shown() -> None:
    found = growth({LAST - n * DAY: {NEW: 1} for n in range(0, 1000, 2)})
    assert found.by == "month"
    assert found.periods[-1] == Period(date(2026, 4, 1), date(2026, 4, 30), 15, None)
    assert [each.since for each in found.periods] == [date(2026, month, 1) for month in (2, 3, 4)]
    short = growth({LAST - n * DAY: {NEW: 1} for n in range(0, 1000, 2)}, length=30)
    assert short == found


def test_of_hardly_any_the_months_have_no_number() -> None:
    found = growth({LAST - n * DAY: {NEW: 1} for n in range(0, 1000, 20)})
    assert (found.by, {each.new for each in found.periods}) == ("month", {None})


@pytest.mark.parametrize(("length", "count"), [(30, 4), (90, 12), (365, 52)])
def test_so_many_weeks_are_shown_as_fit_in_the_days(length: int, count: int) -> None:
    assert len(growth(each_day(2), length=length).periods) == count


def test_of_a_year_no_single_days_are_shown() -> None:
    assert growth(each_day(100), length=365).by == "week"


def test_a_period_of_which_a_day_was_not_counted_is_left_out() -> None:
    week_and_half = growth(each_day(2), known=14)  # since Friday, 24 April
    assert [each.since for each in week_and_half.periods] == [date(2026, 4, 27)]
    assert growth(each_day(2), known=10).by == "day"  # no week is over


def test_a_period_with_a_gap_is_left_out() -> None:
    known = counted(1000)
    del known[date(2026, 4, 14)]
    found = periods.growth(each_day(2), known, span(1000), 90)
    assert date(2026, 4, 13) not in [each.since for each in found.periods]
    assert len(found.periods) == 12


def test_retention_of_a_month_with_a_gap_is_not_known() -> None:
    known = counted(1000)
    del known[date(2026, 2, 14)]
    found = {each.month.month: each for each in periods.cohorts(each_day(1), known, span(1000))}
    assert 2 not in found
    assert found[1].retained.keys() == {"90"}  # 14 February is 30 days after a day of January
    assert found[11].retained.keys() == {"30"}


@pytest.mark.parametrize(("folded", "by"), [(9, "day"), (10, "week")])
def test_days_are_shown_if_at_least_nine_of_ten_have_a_number(folded: int, by: str) -> None:
    flows = {**each_day(5), **{LAST - n * DAY: {NEW: 4} for n in range(folded)}}
    assert growth(flows).by == by


def test_what_is_lost_makes_a_period_legible_as_well() -> None:
    assert growth(each_day(0, 5)).by == "day"


def retained(metric: str, after: int, days: Iterable[date]) -> Flows:
    return {day + after * DAY: {metric: 1} for day in days}


def cohorts(flows: Flows, *, has_all: bool = True, known: int = 1000) -> list[Cohort]:
    return periods.cohorts(flows, counted(known, has_all=has_all), span(known))


def test_a_month_is_shown_once_it_has_been_over_for_30_days() -> None:
    months = [each.month for each in cohorts(each_day(1))]
    assert months[-2:] == [date(2026, 2, 1), date(2026, 3, 1)]
    assert len(months) == 12


def test_who_stayed_is_counted_30_and_90_days_after_each_day_of_the_month() -> None:
    january = [date(2026, 1, 1) + n * DAY for n in range(31)]
    flows: dict[date, dict[str, int]] = {day: {NEW: 2} for day in january}
    for metric, after, of in ((RETAINED, 30, january), (RETAINED_90, 90, january[:12])):
        for day, counts in retained(metric, after, of).items():
            flows.setdefault(day, {}).update(counts)
    (found,) = [each for each in cohorts(flows) if each.month == date(2026, 1, 1)]
    assert found == Cohort(date(2026, 1, 1), 60, {"30": 30, "90": 10})
    (next_month,) = [each for each in cohorts(flows) if each.month == date(2026, 2, 1)]
    assert next_month == Cohort(date(2026, 2, 1), None, {"30": None})  # 90 days are not over


def test_what_a_former_release_did_not_count_is_not_there() -> None:
    found = cohorts(each_day(1), has_all=False)
    assert {tuple(each.retained) for each in found} == {("30",)}


def test_a_month_whose_first_day_was_not_counted_is_left_out() -> None:
    assert [each.month for each in cohorts(each_day(1), known=66)] == []  # since 3 March
    assert [each.month for each in cohorts(each_day(1), known=68)] == [date(2026, 3, 1)]
