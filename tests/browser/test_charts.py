"""What the charts of the page show, to the eye, to the pointer and to the keyboard."""

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize

from app.collector.phrases import DASH, long_date, number, percent
from tests.browser.looking import PHONE, WIDE, document, looking, section
from tests.support.collector import Collector

NARROW: ViewportSize = {"width": 320, "height": 740}
LINES = {"48 hours": "active_2d", "7 days": "active_7d", "30 days": "active_30d"}
"""What the lines of the first chart are called, and which numbers they have."""
MOST = 92
"""So many stops a chart has at most."""


def stops(name: str, numbers: Any) -> list[str]:
    """Return what a chart has to show at its stops, but for the names of periods."""
    every = {"active": of_days, "growth": of_periods, "adoption": of_releases}[name](numbers)
    per_stop = -(-len(every) // MOST)
    return every[::-1][::per_stop][::-1]


def of_days(numbers: Any) -> list[str]:
    return [
        f"{long_date(date.fromisoformat(each['day']))}: "
        + "; ".join(f"{name} {number(each['movements'][key])}" for name, key in LINES.items())
        for each in numbers["days"]
    ]


def of_periods(numbers: Any) -> list[str]:
    return [
        f"new {number(each['new'])}; lost {number(each['lost'])}"
        for each in numbers["growth"]["periods"]
    ]


def of_releases(numbers: Any) -> list[str]:
    found = []
    for after in range(max(each["days"][-1]["after"] for each in numbers["adoption"]) + 1):
        parts = []
        for each in numbers["adoption"]:
            shares = {day["after"]: percent(day["installs"], day["of"]) for day in each["days"]}
            if after <= max(shares):
                parts.append(f"{each['version']} or newer {shares.get(after, DASH)}")
        day = f"{after} day{'s' * (after != 1)} after" if after else "On the day of the release"
        found.append(f"{day}: {'; '.join(parts)}")
    return found


def shown(page: Page) -> Sequence[str]:
    """Return the boxes with numbers that are visible."""
    found: list[str] = page.evaluate(
        "look.all('.stops span').filter(look.isShown)"
        ".filter(it => look.style(it).clipPath === 'none')"
        ".map(it => it.textContent)"
    )
    return found


def without_period(name: str, words: Sequence[str]) -> list[str]:
    """Return what stops show without the names of the periods, which no document has."""
    return [each.split(": ")[1] for each in words] if name == "growth" else [*words]


def enter(page: Page, name: str) -> None:
    """Have the keyboard be in a chart."""
    page.locator(f"#{name} .stops input:checked").focus()


@pytest.mark.parametrize("name", ["active", "growth", "adoption"])
@pytest.mark.parametrize(
    ("scenario", "query"),
    [("600 installs", ""), ("600 installs", "?days=365"), ("60,000 installs", "?edition=ee")],
)
def test_arrow_keys_show_the_numbers_of_each_point(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str, name: str
) -> None:
    expected = stops(name, document(collectors[scenario], query))
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        enter(page, name)
        found = [*shown(page)]
        for _ in expected[1:]:
            page.keyboard.press("ArrowLeft")
            found += shown(page)
        page.keyboard.press("ArrowRight")
        again = shown(page)
    assert len(expected) > 10
    assert without_period(name, found) == expected[::-1]
    assert again == [found[-2]]


def test_the_tab_key_enters_a_chart_once(chromium: Browser, collector: Collector) -> None:
    in_chart = "document.activeElement.closest('.stops') !== null"
    last = stops("active", document(collector))[-1]
    with looking(chromium, collector) as page:
        page.locator("#active a[href='#about']").focus()
        assert shown(page) == []
        page.keyboard.press("Tab")
        assert page.evaluate(in_chart)
        assert page.evaluate("look.outline()") >= 3
        assert shown(page) == [last]
        page.keyboard.press("Tab")
        assert not page.evaluate(in_chart)
        assert shown(page) == []


@pytest.mark.parametrize("name", ["active", "growth", "adoption"])
def test_the_pointer_shows_the_numbers_of_the_point_under_it(
    chromium: Browser, collector: Collector, name: str
) -> None:
    expected = stops(name, document(collector))
    with looking(chromium, collector) as page:
        labels = page.locator(f"#{name} .stops label")
        assert labels.count() == len(expected)
        enter(page, name)
        for n in (0, len(expected) // 2, len(expected) - 1):
            labels.nth(n).hover()
            assert without_period(name, shown(page)) == [expected[n]]
        page.locator("h1").hover()
        assert without_period(name, shown(page)) == [expected[-1]]  # where the keyboard is


@pytest.mark.parametrize("name", ["active", "growth", "adoption"])
def test_a_tap_shows_the_numbers_of_a_point(
    chromium: Browser, collector: Collector, name: str
) -> None:
    expected = stops(name, document(collector))
    with looking(chromium, collector, size=PHONE, without="mouse") as page:
        labels = page.locator(f"#{name} .stops label")
        for n in (len(expected) // 3, len(expected) // 2):
            labels.nth(n).tap()
            assert without_period(name, shown(page)) == [expected[n]]


def test_a_stop_is_where_its_point_is_drawn(chromium: Browser, collector: Collector) -> None:
    numbers = document(collector)
    with looking(chromium, collector) as page:
        places = "all => all.map(it => it.getBoundingClientRect()).map(it => [it.left, it.right])"
        of_days = page.locator("#active .stops label").evaluate_all(places)
        dots = page.locator("#active circle").evaluate_all(places)
        assert len(dots) == len(LINES)
        of_releases = page.locator("#adoption .stops label").evaluate_all(places)
        ends = page.locator("#adoption circle").evaluate_all(places)
        bars = page.locator("#growth .chart path").evaluate_all(places)
        of_periods = page.locator("#growth .stops label").evaluate_all(places)
    for left, right in dots:
        assert of_days[-1][0] <= (left + right) / 2 <= of_days[-1][1]
    for (left, right), each in zip(ends, numbers["adoption"], strict=True):
        stop = of_releases[each["days"][-1]["after"]]
        assert stop[0] <= (left + right) / 2 <= stop[1]
    assert of_periods[0][0] <= min(left for left, _ in bars) <= of_periods[0][1]
    assert of_periods[-1][0] <= max(right for _, right in bars) <= of_periods[-1][1]


@pytest.mark.parametrize("scenario", ["7 installs", "60,000 installs", "80 versions", "long names"])
@pytest.mark.parametrize("text", [100, 200])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_numbers_of_a_point_stay_on_the_screen(
    chromium: Browser,
    collectors: dict[str, Collector],
    scenario: str,
    text: int,
    size: ViewportSize,
) -> None:
    with looking(chromium, collectors[scenario], size=size) as page:
        page.evaluate(f"look.enlarge({text})")
        outside = page.evaluate(
            """() => ['up', 'down'].flatMap(way => look.all('.stops input').flatMap(it => {
                scrollTo(0, way === 'up' ? document.body.scrollHeight : 0);
                it.focus();
                const box = it.nextElementSibling.getBoundingClientRect();
                const isInside = box.left >= 0 && box.right <= innerWidth && box.width > 20
                    && box.top >= 0 && box.bottom <= innerHeight;
                return isInside ? [] : [[way, it.nextElementSibling.textContent, box.toJSON()]];
            }))"""
        )
        assert outside == []


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("scenario", ["600 installs", "long names"])
def test_the_numbers_of_a_point_are_not_cut(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, size: ViewportSize
) -> None:
    with looking(chromium, collectors[scenario], size=size) as page:
        for name in ("active", "growth", "adoption"):
            enter(page, name)
            layout = page.evaluate("look.layout()")
            assert (layout["sideways"], layout["cut"], layout["beyond"]) == (0, [], [])


def test_a_screen_reader_reads_what_a_chart_shows_and_its_numbers(
    chromium: Browser, collector: Collector
) -> None:
    numbers = document(collector)
    with looking(chromium, collector) as page:
        charts = page.locator("svg[role=img]")
        assert charts.count() == 3
        for chart in charts.all():
            question = chart.locator("xpath=ancestor::section")
            title = question.locator("h2").inner_text()
            assert chart.locator("title").text_content() == title
            assert chart.locator("desc").text_content() == question.locator(".answer").inner_text()
            assert page.get_by_role("img", name=title).count() == 1
            assert page.get_by_role("group", name=title).count() == 1
            assert question.locator("table tbody tr").count() > 10
        for name in ("active", "adoption"):
            for words in stops(name, numbers)[::7]:
                assert page.get_by_role("radio", name=words, exact=True).count() == 1


@pytest.mark.parametrize("query", ["", "?days=30", "?days=365"])
def test_nearly_all_periods_of_growth_have_a_number(
    chromium: Browser, collector: Collector, query: str
) -> None:
    growth = document(collector, query)["growth"]["periods"]
    known = [each for each in growth if (each["new"], each["lost"]) != (None, None)]
    assert len(known) >= 0.9 * len(growth)
    with looking(chromium, collector, f"/{query}") as page:
        few, shown = (bars(page, look) for look in (".few", ":not(.few)"))
    assert few == sum(each[name] is None for each in growth for name in ("new", "lost"))
    assert shown == sum((each[name] or 0) > 0 for each in growth for name in ("new", "lost"))
    assert shown > 2 * few


def bars(page: Page, look: str) -> int:
    """Return how many bars of a look are drawn."""
    paths = page.locator(f"#growth .chart path{look}").all()
    return sum((path.get_attribute("d") or "").count("M") for path in paths)


@pytest.mark.parametrize("scenario", ["600 installs", "60,000 installs", "falling"])
def test_each_side_of_growth_has_only_the_room_that_it_needs(
    chromium: Browser, collectors: dict[str, Collector], scenario: str
) -> None:
    with looking(chromium, collectors[scenario]) as page:
        drawn, lines = page.evaluate(
            """['#growth .chart path', '#growth .grid'].map(query => look.all(query)
                .map(it => it.getBoundingClientRect()).map(({top, bottom}) => [top, bottom]))"""
        )
        plot = page.locator("#growth .chart").bounding_box()
    assert plot is not None
    step = (max(top for top, _ in lines) - min(top for top, _ in lines)) / (len(lines) - 1)
    highest, lowest = min(top for top, _ in drawn), max(bottom for _, bottom in drawn)
    assert -1 < highest - plot["y"] < step
    assert -1 < plot["y"] + plot["height"] - lowest < step


@pytest.mark.parametrize("path", ["/", "/?days=30", "/?days=365"])
def test_numbers_that_are_not_shown_are_not_drawn_as_zero(
    chromium: Browser, collectors: dict[str, Collector], path: str
) -> None:
    with looking(chromium, collectors["3 installs"], path) as page:
        assert page.locator(".plot, svg[role=img]").count() == 0
        assert page.locator("#active .number").first.inner_text() == "fewer than 5"
        assert section(page, "active").lower().count("fewer than 5 installs") == 2


def test_a_line_has_a_point_for_each_day(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector, "/?days=30") as page:
        for mark in ("m0", "m1", "m2"):
            path = page.locator(f"#active .chart path.{mark}").get_attribute("d") or ""
            assert len(re.findall("[ML]", path)) == 30
