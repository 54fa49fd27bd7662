"""What the collector's page says, and how somebody finds a way through it."""

from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from app.collector.names import age
from app.collector.phrases import DASH, number, percent
from app.collector.tables import bucket
from app.collector.trends import FEWEST_FOR_A_SHARE
from tests.browser.looking import PAGES, document, looking, section
from tests.support.collector import SECTIONS, Collector

NOT_LISTED = "other (not listed, or fewer than 5)"
TOGETHER = "all others"
FEW = "fewer than 5"

Rows = list[list[str]]


def table(page: Page, section: str, number: int = 0) -> Rows:
    """Return the cells of a table, and of what continues it, without its bars."""
    found: Rows = (
        page.locator(f"#{section} :is(.table, .scroll)")
        .nth(number)
        .locator("tbody tr")
        .evaluate_all(
            "rows => rows.map(row =>"
            " [...row.querySelectorAll('th, td:not(.bar)')].map(cell => cell.textContent.trim()))"
        )
    )
    return found


def test_the_page_is_there_within_a_second(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector, "/?days=365") as page:
        took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 1000


@pytest.mark.parametrize(("scenario", "path"), PAGES)
def test_nothing_is_asked_of_another_host_and_nothing_goes_wrong(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, path: str
) -> None:
    collector = collectors[scenario]
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    response = page.goto(f"http://127.0.0.1:{collector.port}{path}")
    assert response is not None
    sent = [each for each in asked if not each.startswith("data:")]
    assert [each.split("/static/")[-1].startswith("style-") for each in sent] == [False, True]
    assert {each.split("/")[2] for each in sent} == {f"127.0.0.1:{collector.port}"}
    failed = f"{response.status} ({response.status_text})"
    refused = f"Failed to load resource: the server responded with a status of {failed}"
    assert said == ([] if response.ok else [refused])
    context.close()


def test_the_style_is_in_effect_under_the_strict_policy(
    chromium: Browser, collector: Collector
) -> None:
    with looking(chromium, collector) as page:
        policy = page.request.get(page.url).headers["content-security-policy"]
        width = page.locator("#versions rect:not(.track)").first.bounding_box()
        assert width is not None
        assert width["width"] > 10
        assert page.locator(".skip").bounding_box() is not None
        assert page.evaluate("getComputedStyle(document.body).fontFamily").startswith("system-ui")
        assert page.locator("script, [style]").count() == 0
    assert policy.startswith("default-src 'none'; style-src 'self';")


def test_filters_work_by_keyboard_alone(chromium: Browser, collector: Collector) -> None:
    edition = document(collector)["all_editions"][0]
    with looking(chromium, collector) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        seen = []
        for key in ("ArrowUp", "", edition):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.id"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if key.startswith("Arrow"):
                page.keyboard.press(key)
            elif key:
                page.keyboard.type(key)
        assert seen == ["days", "version", "edition"]
        page.keyboard.press("Tab")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert page.url.endswith(f"/?days=30&version=&edition={edition}")
        filtered = page.locator(".filtered").inner_text()
        assert filtered.startswith(f"Only installs in the {edition} edition")
        assert page.locator("#edition").input_value() == edition


def test_the_skip_link_leads_to_the_numbers(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.url.endswith("#main")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#active"


def test_details_open_by_keyboard(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        for details in page.locator("details").all():
            content = details.locator("table").first
            assert not content.is_visible()
            details.locator("summary").focus()
            page.keyboard.press("Enter")
            assert content.is_visible()


@pytest.mark.parametrize("scenario", ["600 installs", "80 versions"])
def test_each_section_has_a_link_that_leads_to_it(
    chromium: Browser, collectors: dict[str, Collector], scenario: str
) -> None:
    with looking(chromium, collectors[scenario]) as page:
        links = page.locator(".permalink")
        names = [*SECTIONS, "about", "reuse"]
        assert links.count() == len(names)
        for link, name in zip(links.all(), names, strict=True):
            link.focus()
            page.keyboard.press("Enter")
            page.wait_for_url(f"**/#{name}")
            assert page.evaluate("document.querySelector(':target').id") == name
            wait_until_on_screen(page, name)
        page.goto(f"{page.url.split('#')[0]}#features")
        wait_until_on_screen(page, "features")
        page.locator("#active a[href='#about']").click()
        wait_until_on_screen(page, "about")


def wait_until_on_screen(page: Page, name: str) -> None:
    """Wait until the heading of a section is on the screen: the browser scrolls a moment later."""
    heading = f"document.querySelector('#{name} h2').getBoundingClientRect()"
    page.wait_for_function(f"{heading}.top >= -1 && {heading}.bottom <= innerHeight", timeout=5000)


def test_it_is_the_same_without_scripts(chromium: Browser, collector: Collector) -> None:
    with (
        looking(chromium, collector) as page,
        looking(chromium, collector, without="scripts") as other,
    ):
        assert page.locator("body").inner_text() == other.locator("body").inner_text()
        assert other.locator("svg[role=img]").count() == 3


def test_every_table_has_a_caption_and_headers(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        tables = page.evaluate(
            "[...document.querySelectorAll('table')].map(table => ["
            " table.caption.textContent !== '',"
            " [...table.querySelectorAll('th')].every(th => ['col', 'row'].includes(th.scope)),"
            " [...table.tBodies[0].rows].every(row => row.cells[0].tagName === 'TH')])"
        )
    assert len(tables) > 10
    assert all(all(each) for each in tables)


def test_headings_are_in_order_and_the_language_is_said(
    chromium: Browser, collector: Collector
) -> None:
    with looking(chromium, collector) as page:
        levels = page.evaluate("look.all('h1,h2,h3,h4,h5,h6').map(it => it.tagName)")
        assert levels == ["H1", *["H2"] * (len(SECTIONS) + 2)]
        assert page.evaluate("document.documentElement.lang") == "en"


NUMBERS = pytest.mark.parametrize(
    ("scenario", "query"),
    [
        ("600 installs", ""),
        ("600 installs", "?days=30&edition=ee"),
        ("60 installs", "?days=365"),
        ("80 versions", ""),
        ("later schema", ""),
    ],
)


@NUMBERS
def test_the_numbers_of_each_day_are_those_of_the_document(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str
) -> None:
    days = document(collectors[scenario], query)["days"][::-1]
    names = ("active_2d", "active_7d", "active_30d", "in_use")
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        assert table(page, "active") == [
            [
                each["day"],
                *(number(each["movements"][name]) for name in names),
                number(each["dev_builds"]),
            ]
            for each in days
        ]
        figure = page.locator("#active .figures .number").first.inner_text()
    assert figure == number(days[0]["movements"]["active_2d"])


@NUMBERS
def test_growth_and_who_stays_are_those_of_the_document(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str
) -> None:
    numbers = document(collectors[scenario], query)
    length = {"day": 10, "week": 10, "month": 7}[numbers["growth"]["by"]]
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        growth, retention = table(page, "growth"), table(page, "retention")
    assert growth == [
        [each["since"][:length], number(each["new"]), number(each["lost"])]
        for each in numbers["growth"]["periods"][::-1]
    ]
    assert len(retention) > 1
    for row, each in zip(retention, numbers["cohorts"][::-1], strict=True):
        assert row[:2] == [each["month"][:7], number(each["established"])]
        for cell, after in zip(row[2:], ("30", "90"), strict=True):
            words = cell.replace("\N{NO-BREAK SPACE}", " ")
            assert words == stayed(each, after) or (after not in each["retained"] and "not" in cell)


def stayed(cohort: Any, after: str) -> str:
    installs = cohort["retained"].get(after)
    if installs is None or (cohort["established"] or 0) < FEWEST_FOR_A_SHARE:
        return number(installs)
    return f"{number(installs)} ({percent(installs, cohort['established'])})"


@NUMBERS
def test_versions_have_the_newest_first_with_their_dates_and_the_share_of_newer_ones(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str
) -> None:
    numbers = document(collectors[scenario], query)
    last, released = numbers["days"][-1], {**dict(map(release, numbers["releases"]))}
    in_order = sorted(last["versions"], key=age, reverse=True)
    of = numbers["values"]["platform"]["reported_by"]
    whole = max(of, sum(last["versions"].values()) + (last["other_versions"] or 0))
    newer, expected = 0, []
    for version in in_order:
        installs = last["versions"][version]
        newer += installs
        name = f"{version} {released[version]}"
        expected.append([name, number(installs), percent(installs, whole), percent(newer, whole)])
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        found = table(page, "versions")
        answer = page.locator("#versions .answer").inner_text()
    others = last["other_versions"]
    rest = [row for row in found if row[0] == NOT_LISTED]
    assert [row[1] for row in rest] == ([number(others)] if others else [])
    named, enough = sum(last["versions"].values()), 0
    for most in expected:
        enough += int(most[1].replace(",", ""))
        if enough >= 0.9 * named:
            break
    # The line that answers the question is shown at once, wherever it would be.
    assert [row for row in found if row not in (*rest, most)] == [
        row for row in expected if row != most
    ]
    assert most in found
    assert answer.startswith(f"{most[0].split()[0]} or newer: {most[3]} of the active installs.")
    assert (f"The version of {percent(others or 0, whole)} is not shown." in answer) == bool(others)


def release(each: Any) -> tuple[str, str]:
    version, day = each.values() if isinstance(each, dict) else each
    return version, f"{date.fromisoformat(day)}"


@NUMBERS
def test_adoption_is_that_of_the_document(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str
) -> None:
    adoption = document(collectors[scenario], query)["adoption"]
    shares = [
        {day["after"]: percent(day["installs"], day["of"]) for day in each["days"]}
        for each in adoption
    ]
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        found = table(page, "adoption")
        names = page.locator("#adoption thead th").all_text_contents()[1:]
    assert [name.strip() for name in names] == [f"{each['version']} or newer" for each in adoption]
    assert [row[1:] for row in found] == [
        [each.get(after, DASH) for each in shares] for after in range(max(map(max, shares)) + 1)
    ]


@NUMBERS
def test_what_installs_are_like_is_that_of_the_document(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, query: str
) -> None:
    numbers = document(collectors[scenario], query)
    tables: list[tuple[str, int, str, str, Callable[[str], str]]] = [
        ("where", 0, "deployment", NOT_LISTED, str),
        ("where", 1, "platform", TOGETHER, str),
        ("runtimes", 0, "python_version", NOT_LISTED, "Python {}".format),
        ("runtimes", 1, "stack.postgres_version", NOT_LISTED, "Postgres {}".format),
        ("sizes", 0, "counts.orgs", TOGETHER, bucket),
        ("sizes", 1, "counts.sites", TOGETHER, bucket),
        ("sizes", 2, "counts.users", TOGETHER, bucket),
        ("sizes", 3, "counts.scans_last_24h", TOGETHER, bucket),
        ("sizes", 4, "counts.consents_last_24h", TOGETHER, bucket),
    ]
    with looking(chromium, collectors[scenario], f"/{query}") as page:
        for name, n, field, rest, words in tables:
            values = numbers["values"][field]
            found = table(page, name, n)
            assert sorted(row[:2] for row in found) == sorted(
                [
                    *(
                        [words(each["value"]), number(each["installs"])]
                        for each in values["groups"]
                    ),
                    *(
                        [[rest, number(values["folded_installs"])]]
                        * bool(values["folded_installs"])
                    ),
                ]
            )
            if words is bucket:
                assert [row[0] for row in found] == sorted((row[0] for row in found), key=smallest)
        features = table(page, "features")
    installs = [each["installs"] for each in numbers["features"].values()]
    assert sorted(row[1] for row in features) == sorted(map(number, installs))
    (limit,) = (row for row in features if row[0].startswith("Rate limit"))
    used = numbers["features"]["features.rate_limit_enabled"]
    assert limit[1:] == [number(used["installs"]), percent(used["installs"], used["of"])]


def smallest(size: str) -> tuple[bool, int, bool]:
    """Return the least number of a range of sizes, which orders them; the rest is last."""
    least = size.partition(DASH)[0].replace("k", "000")
    return size == TOGETHER, int(least.rstrip("+")) if size != TOGETHER else 0, "+" in least


@pytest.mark.parametrize("days", [30, 90, 365])
def test_the_change_in_30_days_is_there_for_any_number_of_days(
    chromium: Browser, collector: Collector, days: int
) -> None:
    numbers = document(collector, f"?days={days}")
    was, now = numbers["a_month_before"]["active"], numbers["days"][-1]["movements"]["active_2d"]
    change = f"+{now - was} (+{percent(now - was, was)})"
    with looking(chromium, collector, f"/?days={days}") as page:
        figure = page.locator("#active .figures div", has=page.get_by_text("in 30 days"))
        assert figure.locator(".number").inner_text() == change
        assert f"Yes: {change} active installs in 30 days." in section(page, "growth")
        assert f"{now - was} more than on" in section(page, "active")


@pytest.mark.parametrize("scenario", ["7 installs", "600 installs", "one version", "later schema"])
def test_no_sentence_counts_no_days(
    chromium: Browser, collectors: dict[str, Collector], scenario: str
) -> None:
    with looking(chromium, collectors[scenario]) as page:
        words = page.locator("body").inner_text().lower()
    assert [each for each in ("no days", "none", "nan", "undefined") if f" {each} " in words] == []


@pytest.mark.parametrize(
    ("scenario", "path"),
    [("80 versions", "/"), ("long names", "/"), ("60,000 installs", "/"), ("600 installs", "/")],
)
def test_at_most_ten_rows_and_the_rest_are_visible_before_a_reader_asks_for_more(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, path: str
) -> None:
    with looking(chromium, collectors[scenario], path) as page:
        answered = page.locator("#versions .answer").inner_text().split()[0]
        for each in page.locator(".table").all():
            if not each.is_visible():
                continue
            rows = each.locator("tbody tr")
            before = visible(rows.all())
            named = [row for row in before if "other" not in row]
            assert len([row for row in named if row.split()[0] != answered]) <= 10
            assert len(before) <= 12
            assert (len(before) < rows.count()) == (each.locator("summary").count() == 1)
            if len(before) < rows.count():
                more = each.locator("summary")
                assert more.inner_text().endswith(f"Show {rows.count() - len(before)} more")
                more.click()
                assert len(visible(rows.all())) == rows.count()


def visible(rows: Iterable[Any]) -> list[str]:
    return [row.inner_text() for row in rows if row.is_visible()]


def test_all_of_many_versions_can_be_read(
    chromium: Browser, collectors: dict[str, Collector]
) -> None:
    with looking(chromium, collectors["80 versions"]) as page:
        page.locator("#versions summary").click()
        rows = visible(page.locator("#versions tbody tr").all())
    assert len(rows) == 80 + 1  # and the other ones


def test_a_feature_that_nearly_all_installs_use_is_first_and_has_a_full_bar(
    chromium: Browser, collectors: dict[str, Collector]
) -> None:
    with looking(chromium, collectors["edition"], "/?edition=ee") as page:
        rows = table(page, "features")
        bars = (
            page.locator("#features .table")
            .first.locator("rect")
            .evaluate_all("all => all.map(it => it.getBoundingClientRect().width)")
        )
        answer = page.locator("#features .answer").inner_text()
    filled = [bar / track for track, bar in zip(bars[::2], bars[1::2], strict=True)]
    assert rows[0][2] == "100%"
    assert filled[0] == pytest.approx(1)
    assert answer.startswith(f"Most used is “{rows[0][0]}” (100%)")
    (limit,) = (n for n, row in enumerate(rows) if row[0] == "Rate limit")
    assert limit <= 1  # fewer than 5 do not use it
    assert filled[limit] > 0.95
    assert filled == sorted(filled, reverse=True)


def test_of_few_installs_only_their_days_are_shown(
    chromium: Browser, collectors: dict[str, Collector]
) -> None:
    with looking(chromium, collectors["3 installs"]) as page:
        names = page.evaluate("look.all('main section[id]').map(it => it.id)")
        page.evaluate("look.open(true)")
        rows = table(page, "active")
        main = page.locator("main").inner_text()
    assert names == ["active", "growth", "retention"]
    assert {cell for row in rows for cell in row[1:]} <= {FEW, "0"}
    assert "shown from 5 active installs on" in main


def test_the_page_reports_that_counting_has_stopped(
    chromium: Browser, collectors: dict[str, Collector]
) -> None:
    with looking(chromium, collectors["stands still"]) as page:
        assert page.locator(".warning").inner_text().startswith("Counting has stopped")
        page.goto(f"http://127.0.0.1:{collectors['600 installs'].port}/")
        assert page.locator(".warning").count() == 0
