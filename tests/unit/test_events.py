"""The feed has each notable day once, and nothing that the page does not show."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.collector import events
from app.collector.adoption import Release
from app.collector.daily import ACTIVE_2D, DAY, Counted, Filter, Span, begins
from app.collector.events import AT_MOST, Event, fell, of
from app.collector.names import OTHER
from app.collector.rendering import Templates
from app.collector.stats import Numbers, Recount, Stats, nothing, show

LAST = date(2026, 11, 12)
HOUR = timedelta(hours=1)
ATOM = "{http://www.w3.org/2005/Atom}"
TEMPLATES = Templates(established_days=3)

Days = Sequence[Mapping[str, int]]


def counted(days: Days, *, last: date = LAST) -> Stats:
    """What is shown of days with so many active installs of each version, each known in time."""
    each = {last - DAY * ago: dict(versions) for ago, versions in enumerate(reversed(days))}
    active = {day: {ACTIVE_2D: sum(versions.values())} for day, versions in each.items()}
    numbers = Numbers(
        versions=each,
        versions_of_all={},
        editions_of_all={},
        releases=[Release(version, min(each)) for version in {*chain(*each.values())} - {OTHER}],
        stocks=active,
        counted={day: Counted(None) for day in each},
    )
    span = Span(min(each), last, begins(last + DAY))
    return show(nothing(Filter()), numbers, span, days=len(days))


def known(shown: Stats, at: Mapping[date, datetime | None]) -> Stats:
    """The same, whose days were counted first at other times than a minute after their end."""
    usual = {each.day: begins(each.day + DAY) + timedelta(minutes=1) for each in shown.days}
    times = {**usual, **at}
    return replace(shown, days=[replace(each, counted_at=times[each.day]) for each in shown.days])


def late(days: int, *ago: int, by: timedelta = HOUR) -> Stats:
    """So many days, of which some were counted late."""
    shown = counted([{"1.0.0": 50}] * days)
    return known(shown, {LAST - DAY * n: begins(LAST - DAY * (n - 1)) + by for n in ago})


def of_kind(shown: Stats, kind: str, *, counting_stopped: bool = False) -> list[Event]:
    return [each for each in of(shown, counting_stopped=counting_stopped) if each.kind == kind]


def days(found: Sequence[Event]) -> list[date]:
    return [each.day for each in found]


# A release


@pytest.mark.parametrize(
    ("new", "is_one"),
    [
        (5, False),  # 5 of 100
        (7, False),  # shown as 5
        (8, True),  # shown as 10
        (10, True),
        (50, True),
    ],
)
def test_a_release_that_is_shown_with_10_percent_is_an_event(new: int, *, is_one: bool) -> None:
    shown = counted([{"1.0.0": 100}, {"1.0.0": 100 - new, "2.0.0": new}])
    assert days(of_kind(shown, "release")) == [LAST] * is_one


def test_a_release_says_its_version_and_its_share() -> None:
    (found,) = of_kind(counted([{"1.0.0": 100}, {"1.0.0": 75, "2.0.0": 25}]), "release")
    assert (found.title, found.sentence) == (
        "2.0.0 reached 10% of the active installs",
        (
            "At the end of 12 November 2026, 25% of the active installs ran 2.0.0: 10% or more for"
            " the first time."
        ),
    )


def test_a_release_with_10_percent_on_the_first_known_day_is_no_event() -> None:
    assert of_kind(counted([{"1.0.0": 100}] * 3), "release") == []
    assert of_kind(counted([{"1.0.0": 90, "2.0.0": 10}] * 3), "release") == []


def test_the_first_known_day_is_the_first_with_a_number_to_show() -> None:
    assert of_kind(counted([{}, {"1.0.0": 4}, {"1.0.0": 100}, {"1.0.0": 100}]), "release") == []


def test_a_release_is_an_event_the_first_time_only() -> None:
    few, many = {"1.0.0": 100}, {"1.0.0": 100, "2.0.0": 30}
    found = of_kind(counted([few, many, many, few, many]), "release")
    assert days(found) == [LAST - DAY * 3]


def test_each_of_two_releases_on_one_day_is_an_event_with_its_own_id() -> None:
    shown = counted([{"1.0.0": 100}, {"1.0.0": 50, "2.0.0": 25, "2.0.1": 25}])
    found = of_kind(shown, "release")
    assert {each.version for each in found} == {"2.0.0", "2.0.1"}
    assert len({each.id for each in found}) == 2


@pytest.mark.parametrize("few", range(1, 5))
def test_a_release_on_fewer_than_5_installs_and_what_is_not_listed_are_no_event(few: int) -> None:
    assert of_kind(counted([{"1.0.0": 6}, {"1.0.0": 6, "2.0.0": few}]), "release") == []
    assert of_kind(counted([{"1.0.0": 100}, {"1.0.0": 50, OTHER: 50}]), "release") == []


# A fall


@pytest.mark.parametrize(
    ("then", "now", "is_one"),
    [
        (100, 70, False),
        (100, 69, True),
        (20, 14, False),
        (20, 13, True),
        (19, 5, False),
        (20, 4, True),
        (20, 0, True),
    ],
)
def test_a_fall_by_more_than_30_percent_from_20_or_more_is_an_event(
    then: int, now: int, *, is_one: bool
) -> None:
    assert fell(then, now) == is_one
    shown = counted([*[{"1.0.0": then}] * 8, {"1.0.0": now}])
    assert days(of_kind(shown, "fall")) == [LAST] * is_one


def test_a_fall_is_compared_with_7_days_before_and_not_with_the_day_before() -> None:
    assert of_kind(counted([{"1.0.0": 100}] * 6 + [{"1.0.0": 10}]), "fall") == []


def test_a_fall_says_both_numbers() -> None:
    (found,) = of_kind(counted([*[{"1.0.0": 1_000}] * 8, {"1.0.0": 642}]), "fall")
    assert (found.title, found.sentence) == (
        "Active installs fell by more than 30% in 7 days",
        (
            "At the end of 12 November 2026, 642 installs were active. 7 days before, there were"
            " 1,000."
        ),
    )


@pytest.mark.parametrize("few", range(1, 5))
def test_a_fall_to_fewer_than_5_shows_no_number_of_them(few: int) -> None:
    (found,) = of_kind(counted([*[{"1.0.0": 40}] * 8, {"1.0.0": few}]), "fall")
    assert found.sentence == (
        "At the end of 12 November 2026, fewer than 5 installs were active. 7 days before, there"
        " were 40."
    )


def test_a_fall_is_an_event_on_its_first_day_only() -> None:
    shown = counted([*[{"1.0.0": 100}] * 8, *[{"1.0.0": 60}] * 14])
    assert days(of_kind(shown, "fall")) == [LAST - DAY * 13]


def test_a_fall_that_is_near_the_limit_for_a_week_is_one_event() -> None:
    numbers = [69, 71, 69, 72, 68, 71, 69]
    shown = counted([*[{"1.0.0": 100}] * 8, *({"1.0.0": number} for number in numbers)])
    assert days(of_kind(shown, "fall")) == [LAST - DAY * 6]


def test_a_second_fall_is_a_second_event() -> None:
    shown = counted([{"1.0.0": 400}] * 8 + [{"1.0.0": 200}] * 10 + [{"1.0.0": 100}] * 3)
    assert days(of_kind(shown, "fall")) == [LAST - DAY * 2, LAST - DAY * 12]


def test_a_fall_that_may_have_begun_before_the_days_that_are_read_is_no_event() -> None:
    whole = [*[{"1.0.0": 100}] * 8, *[{"1.0.0": 60}] * 30]
    assert len(of_kind(counted(whole), "fall")) == 1
    for first in (1, 4):
        assert of_kind(counted(whole[first:]), "fall") == []


# Counting that stood still


@pytest.mark.parametrize(
    ("by", "is_one"),
    [(timedelta(minutes=1), False), (HOUR - timedelta(microseconds=1), False), (HOUR, True)],
)
def test_a_day_that_was_counted_an_hour_late_is_an_event(by: timedelta, *, is_one: bool) -> None:
    assert days(of_kind(late(3, 1, by=by), "standstill")) == [LAST - DAY] * is_one


def test_a_day_that_was_counted_late_says_when() -> None:
    (found,) = of_kind(late(3, 1, by=timedelta(hours=5, minutes=9)), "standstill")
    assert (found.title, found.sentence) == (
        "Counting was late",
        "11 November 2026 was counted late, on 12 November 2026 at 05:09 UTC.",
    )


def test_late_days_that_follow_one_another_are_one_event() -> None:
    (found,) = of_kind(late(9, 4, 3, 2), "standstill")
    assert found.day == LAST - DAY * 4
    assert found.sentence == (
        "The days from 8 November 2026 to 10 November 2026 were counted late, the last of them on"
        " 11 November 2026 at 01:00 UTC."
    )


def test_late_days_with_one_in_time_between_them_are_two_events() -> None:
    assert days(of_kind(late(9, 4, 2), "standstill")) == [LAST - DAY * 2, LAST - DAY * 4]


def test_a_day_whose_first_count_is_unknown_is_no_event() -> None:
    shown = counted([{"1.0.0": 50}] * 3)
    assert of_kind(shown, "standstill") == []
    assert of_kind(known(late(5, 2), {LAST - DAY * 2: None}), "standstill") == []


def test_late_days_that_may_have_begun_before_the_first_known_day_are_no_event() -> None:
    assert of_kind(late(4, 3, 2), "standstill") == []


def test_counting_that_has_stopped_reports_since_when() -> None:
    (found,) = of_kind(counted([{"1.0.0": 50}] * 3), "standstill", counting_stopped=True)
    assert found.day == LAST + DAY
    assert (found.title, found.sentence) == (
        "Counting has stopped",
        (
            "The last day that was counted is 12 November 2026. 13 November 2026 should have been"
            " counted at 00:00 UTC on 14 November 2026, and is not counted yet."
        ),
    )


def test_counting_that_has_stopped_stays_the_same_event_when_the_day_is_counted() -> None:
    (now,) = of_kind(counted([{"1.0.0": 50}] * 3), "standstill", counting_stopped=True)
    later = counted([{"1.0.0": 50}] * 4, last=LAST + DAY)
    later = known(later, {LAST + DAY: begins(LAST + DAY * 2) + HOUR * 9})
    (then,) = of_kind(later, "standstill")
    assert then.id == now.id
    assert then.title == "Counting was late"
    assert then.updated > now.updated


def test_counting_that_stops_again_at_once_is_one_event() -> None:
    (found,) = of_kind(late(5, 1, 0), "standstill", counting_stopped=True)
    assert (found.day, found.title) == (LAST - DAY, "Counting has stopped")


def test_a_standby_that_is_behind_does_not_report_that_counting_has_stopped() -> None:
    shown = replace(counted([{"1.0.0": 50}] * 3), standby_as_of=datetime(2026, 11, 13, tzinfo=UTC))
    assert of_kind(shown, "standstill", counting_stopped=True) == []


# All of them


def test_before_the_first_day_there_is_no_event() -> None:
    for counting_stopped in (False, True):
        assert of(nothing(Filter()), counting_stopped=counting_stopped) == []


@pytest.mark.parametrize(
    ("replayed", "are_certain"),
    [(None, False), (-20, False), (-1, False), (0, False), (1, True)],
)
def test_a_day_that_is_about_to_be_counted_again_is_no_event(
    replayed: int | None, *, are_certain: bool
) -> None:
    shown = counted([*[{"1.0.0": 100}] * 8, {"1.0.0": 30, "2.0.0": 30}, *[{"1.0.0": 60}] * 4])
    since = LAST - DAY * 5
    came_to = None if replayed is None else since + DAY * replayed
    again = replace(shown, recount=Recount(since, came_to, LAST))
    assert bool(of(again, counting_stopped=False)) == are_certain


def test_the_newest_comes_first_and_no_more_than_fit() -> None:
    shown = late(200, *range(0, 198, 2))
    found = of(shown, counting_stopped=False)
    assert len(found) == AT_MOST
    assert days(found) == [LAST - DAY * 2 * n for n in range(AT_MOST)]


def test_an_id_is_what_it_was_published_as() -> None:
    at = begins(LAST)
    assert Event(LAST, "release", "A title", "A sentence.", at, "2.0.0").id == ID
    assert Event(LAST, "release", "Another", "Another.", at + HOUR, "2.0.0").id == ID
    others = [
        Event(LAST, "release", "", "", at, "2.0.1"),
        Event(LAST + DAY, "release", "", "", at, "2.0.0"),
        Event(LAST, "fall", "", "", at),
        Event(LAST, "standstill", "", "", at),
    ]
    assert len({ID, events.FEED, *(each.id for each in others)}) == 6


ID = "urn:uuid:e5f84590-87a7-59ae-aafd-08f058f092ca"

FLEETS = st.lists(
    st.fixed_dictionaries(
        {"1.0.0": st.integers(0, 60), "2.0.0": st.integers(0, 12), OTHER: st.integers(0, 12)}
    ),
    min_size=1,
    max_size=30,
)


@given(FLEETS, st.sets(st.integers(0, 29)), st.booleans())
def test_no_word_of_the_feed_is_a_number_that_the_page_does_not_show(
    fleet: Days,
    ago: set[int],
    counting_stopped: bool,  # noqa: FBT001 - Hypothesis's
) -> None:
    shown = counted(fleet)
    ends = {LAST - DAY * n: begins(LAST - DAY * (n - 1)) + HOUR for n in ago if n < len(fleet)}
    found = of(known(shown, ends), counting_stopped=counting_stopped)
    exact = {str(each.movements[ACTIVE_2D]) for each in shown.days}
    for each in of_kind(shown, "fall"):
        words = each.sentence.replace("fewer than 5 installs", "few installs")
        said = re.findall(r"(?<!,) (\d+)(?: installs were|\.$)", words)
        assert {*said} <= exact
        assert not {*said} & {"1", "2", "3", "4"}
    by_day = {each.day: each for each in shown.days}
    for each in of_kind(shown, "release"):
        assert by_day[each.day].versions[each.version] >= 5
    assert len({each.id for each in found}) == len(found)


@given(FLEETS, st.booleans())
def test_the_feed_is_xml_with_each_event(fleet: Days, counting_stopped: bool) -> None:  # noqa: FBT001 - Hypothesis's
    shown = counted(fleet)
    feed = ET.fromstring(TEMPLATES.feed(shown, counting_stopped=counting_stopped))  # noqa: S314 - our own words
    found = of(shown, counting_stopped=counting_stopped)
    assert [each.text for each in feed.findall(f"{ATOM}entry/{ATOM}id")] == [
        each.id for each in found
    ]
    assert [each.text for each in feed.findall(f"{ATOM}entry/{ATOM}content")] == [
        each.sentence for each in found
    ]


def test_a_release_that_rises_because_others_leave_is_no_event() -> None:
    days = [{"1.0.0": 100, "0.5.0": 8}, {"1.0.0": 60, "0.5.0": 8}]
    shown = counted(days)
    assert [each.version for each in of(shown, counting_stopped=False) if each.version] == ["0.5.0"]
    old = [Release(version, LAST - timedelta(days=400)) for version in ("1.0.0", "0.5.0")]
    assert of(replace(shown, releases=old), counting_stopped=False) == [
        each for each in of(shown, counting_stopped=False) if not each.version
    ]


@pytest.mark.parametrize(("later", "falls"), [(6, 1), (7, 2)])
def test_a_fall_whose_week_begins_on_the_day_of_the_former_fall_is_another(
    later: int, falls: int
) -> None:
    many, fewer, few = {"1.0.0": 400}, {"1.0.0": 200}, {"1.0.0": 100}
    shown = counted([*[many] * 10, fewer, *[many] * (later - 1), few])
    assert len(of_kind(shown, "fall")) == falls
