"""How fast releases are adopted, by days since each came out."""

from collections.abc import Mapping
from datetime import date, timedelta

from app.collector import adoption
from app.collector.adoption import Adoption, Release, Share
from app.collector.rounding import Distribution, distribute

DAY = timedelta(days=1)
OUT = date(2026, 5, 1)


def seen(*days: Mapping[str, int]) -> dict[date, Distribution]:
    """The versions of each day, from the day of the release on."""
    return {OUT + n * DAY: distribute(dict(day)) for n, day in enumerate(days)}


def test_a_share_is_of_those_that_run_the_release_or_a_newer_one() -> None:
    days = seen({"1.0.0": 90, "1.1.0": 10}, {"1.0.0": 50, "1.1.0": 30, "1.2.0": 20})
    found = adoption.of([Release("1.1.0", OUT)], days)
    assert found == [Adoption("1.1.0", OUT, [Share(0, 10, 100), Share(1, 50, 100)])]


def test_what_is_not_listed_is_part_of_the_whole_alone() -> None:
    (found,) = adoption.of([Release("1.1.0", OUT)], seen({"other": 90, "1.1.0": 10}))
    assert found.days == [Share(0, 10, 100)]


def test_a_pre_release_is_older_than_its_release() -> None:
    days = seen({"1.1.0-rc.1": 40, "1.1.0": 60})
    found = adoption.of([Release("1.1.0", OUT), Release("1.1.0-rc.1", OUT)], days)
    assert [each.days[0].installs for each in found] == [60, 100]


def test_a_day_on_which_too_few_run_it_is_left_out() -> None:
    days = seen({"1.0.0": 96, "1.1.0": 4}, {"1.0.0": 95, "1.1.0": 5})
    (found,) = adoption.of([Release("1.1.0", OUT)], days)
    assert [each.after for each in found.days] == [1]


def test_a_release_that_was_never_seen_is_left_out() -> None:
    assert adoption.of([Release("1.1.0", OUT)], seen({"1.0.0": 100})) == []


def test_the_newest_five_releases_are_shown_for_90_days() -> None:
    releases = [Release(f"1.{minor}.0", OUT) for minor in range(9, 0, -1)]
    days = seen(*[{"1.9.0": 100}] * 120)
    found = adoption.of(releases, days)
    assert [each.version for each in found] == [f"1.{minor}.0" for minor in range(9, 4, -1)]
    assert [each.after for each in found[0].days] == [*range(91)]
