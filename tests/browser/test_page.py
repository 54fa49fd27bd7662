"""The collector's page as somebody sees it, hears it and finds a way through it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize

from tests.collector import Collector

Scheme = Literal["light", "dark"]
PHONE: ViewportSize = {"width": 360, "height": 740}
WIDE: ViewportSize = {"width": 1440, "height": 900}
LOOKS = pytest.mark.parametrize(
    ("scheme", "size"),
    [("light", WIDE), ("light", PHONE), ("dark", WIDE), ("dark", PHONE)],
    ids=["light, wide", "light, phone", "dark, wide", "dark, phone"],
)
PAGES = [
    ("600 installs", "/"),
    ("600 installs", "/?days=30&edition=ee"),
    ("600 installs", "/?version=99.9.9"),
    ("600 installs", "/?days=7"),
    ("7 installs", "/"),
    ("none", "/"),
]
NOT_LISTED = "other (not listed, or fewer than 5)"
TEXT = 4.5
MARKS = 3.0

# The contrast of two colours, as WCAG 2 defines it.
CONTRAST = """
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(n => n / 255)
            .map(n => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const paper = getComputedStyle(document.body).backgroundColor;
"""


@contextmanager
def looking(
    chromium: Browser,
    collector: Collector,
    path: str = "/",
    *,
    size: ViewportSize = WIDE,
    scheme: Scheme = "light",
    scripts: bool = True,
) -> Iterator[Page]:
    """Open a page in a browser that knows nothing yet."""
    context = chromium.new_context(
        viewport=size, color_scheme=scheme, java_script_enabled=scripts, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{collector.port}{path}")
    yield page
    context.close()


def document(collector: Collector, query: str = "") -> Any:
    return collector.client.get(f"/v1/stats.json{query}").json()


def table(page: Page, section: str, number: int = 0) -> list[list[str]]:
    """Return the cells of a table's body, without its bars."""
    rows = page.locator(f"#{section} table").nth(number).locator("tbody tr")
    found: list[list[str]] = rows.evaluate_all(
        "rows => rows.map(row =>"
        " [...row.querySelectorAll('th, td:not(.bar)')].map(cell => cell.textContent.trim()))"
    )
    return found


def shown(installs: int | None) -> str:
    return "fewer than 5" if installs is None else f"{installs:,}"


def test_the_page_is_there_within_a_second(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector, "/?days=365") as page:
        took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 1000


@pytest.mark.parametrize(("name", "path"), PAGES)
def test_nothing_is_asked_of_another_host_and_nothing_goes_wrong(
    chromium: Browser, collectors: dict[str, Collector], name: str, path: str
) -> None:
    collector = collectors[name]
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    response = page.goto(f"http://127.0.0.1:{collector.port}{path}", wait_until="networkidle")
    assert response is not None
    told = [each for each in asked if not each.startswith("data:")]
    assert [each.split("/static/")[-1].startswith("style-") for each in told] == [False, True]
    assert {each.split("/")[2] for each in told} == {f"127.0.0.1:{collector.port}"}
    refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    assert said == ([refused] if response.status == 400 else [])
    context.close()


def test_the_style_is_in_effect_under_the_strict_policy(
    chromium: Browser, collector: Collector
) -> None:
    with looking(chromium, collector) as page:
        width = page.locator("#versions rect:not(.track)").first.bounding_box()
        assert width is not None
        assert width["width"] > 10
        assert page.locator(".skip").bounding_box() is not None
        assert page.evaluate("getComputedStyle(document.body).fontFamily").startswith("system-ui")


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
        assert (
            page.locator(".filtered")
            .inner_text()
            .startswith(f"Only installs in the {edition} edition")
        )
        assert page.locator("#edition").input_value() == edition


def test_the_skip_link_leads_to_the_numbers(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.url.endswith("#main")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.keyboard.press("Enter")
        assert page.locator("#active details").get_attribute("open") is not None


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_dark_is_dark_and_light_is_light(
    chromium: Browser,
    collector: Collector,
    scheme: Scheme,
    is_dark: bool,  # noqa: FBT001 - pytest's parameter
) -> None:
    with looking(chromium, collector, scheme=scheme) as page:
        paper, ink = page.evaluate(
            f"() => {{ {CONTRAST}"
            " return [light(paper), light(getComputedStyle(document.body).color)]; }"
        )
    assert (paper < 0.02 and ink > 0.7) if is_dark else (paper > 0.9 and ink < 0.03)


@LOOKS
def test_every_mark_and_every_word_of_a_chart_stands_out(
    chromium: Browser, collector: Collector, scheme: Scheme, size: ViewportSize
) -> None:
    with looking(chromium, collector, scheme=scheme, size=size) as page:
        found = page.evaluate(
            f"""() => {{ {CONTRAST}
                const seen = (query, read, least) => [...document.querySelectorAll(query)]
                    .map(it => [it.getAttribute('class') || query, getComputedStyle(it)])
                    .map(([name, style]) => [name, contrast(read(style), paper), least]);
                return [
                    ...seen('path', s => s.stroke === 'none' ? s.fill : s.stroke, {MARKS}),
                    ...seen('circle, rect:not(.track)', s => s.fill, {MARKS}),
                    ...seen('.chart text', s => s.fill, {TEXT}),
                    ...seen('select', s => s.borderTopColor, {MARKS}),
                ];
            }}"""
        )
    assert len(found) > 100
    assert [each for each in found if each[1] < each[2]] == []


@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
@pytest.mark.parametrize(("name", "path"), PAGES)
def test_no_page_is_wider_than_the_screen(
    chromium: Browser,
    collectors: dict[str, Collector],
    name: str,
    path: str,
    size: ViewportSize,
) -> None:
    with looking(chromium, collectors[name], path, size=size) as page:
        page.evaluate("document.querySelectorAll('details').forEach(it => it.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        beyond = page.evaluate(
            "[...document.querySelectorAll('.chart text, td, th, dd, p, select')]"
            ".filter(it => !it.closest('.scroll') && getComputedStyle(it).display !== 'none')"
            ".filter(it => it.getBoundingClientRect().right > innerWidth)"
            ".map(it => it.textContent)"
        )
        assert beyond == []


def test_labels_of_a_chart_do_not_cover_one_another(
    chromium: Browser, collector: Collector
) -> None:
    with looking(chromium, collector, size=PHONE) as page:
        boxes = page.evaluate(
            "[...document.querySelectorAll('.chart')].map(chart =>"
            " [...chart.querySelectorAll('.label, .x:not(.minor)')].map(it => {"
            " const {left, right, top, bottom} = it.getBoundingClientRect();"
            " return [left, right, top + 2, bottom - 2]; }))"
        )
    assert len(boxes) == 3
    for chart in boxes:
        assert len(chart) > 2
        for n, (left, right, top, bottom) in enumerate(chart):
            for of_left, of_right, of_top, of_bottom in chart[n + 1 :]:
                apart = right <= of_left or of_right <= left
                assert apart or bottom <= of_top or of_bottom <= top


def test_it_is_the_same_without_scripts(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page, looking(chromium, collector, scripts=False) as other:
        assert page.locator("body").inner_text() == other.locator("body").inner_text()
        assert other.locator("svg[role=img]").count() == 3


def test_every_chart_has_words_and_a_table(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        found = page.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(svg => ({"
            " title: svg.querySelector('title').textContent,"
            " desc: svg.querySelector('desc').textContent,"
            " named: svg.getAttribute('aria-labelledby').split(' ')"
            "   .every(id => svg.contains(document.getElementById(id))),"
            " heading: svg.closest('section').querySelector('h2').textContent,"
            " answer: svg.closest('section').querySelector('.answer').textContent,"
            " rows: svg.closest('section').querySelectorAll('table tbody tr').length}))"
        )
        tables = page.evaluate(
            "[...document.querySelectorAll('table')].map(table => ["
            " table.caption.textContent !== '',"
            " [...table.querySelectorAll('th')].every(th => ['col', 'row'].includes(th.scope)),"
            " [...table.tBodies[0].rows].every(row => row.cells[0].tagName === 'TH')])"
        )
    assert len(found) == 3
    for chart in found:
        assert (chart["title"], chart["desc"]) == (chart["heading"], chart["answer"])
        assert chart["named"]
        assert chart["rows"] > 20
    assert len(tables) > 10
    assert all(all(each) for each in tables)


def test_headings_are_in_order_and_the_language_is_said(
    chromium: Browser, collector: Collector
) -> None:
    with looking(chromium, collector) as page:
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
        assert levels == ["H1", *["H2"] * 9]
        assert page.evaluate("document.documentElement.lang") == "en"


@LOOKS
@pytest.mark.parametrize(("name", "path"), PAGES)
def test_axe_finds_nothing(
    chromium: Browser,
    collectors: dict[str, Collector],
    name: str,
    path: str,
    scheme: Scheme,
    size: ViewportSize,
) -> None:
    with looking(chromium, collectors[name], path, scheme=scheme, size=size) as page:
        for is_open in ("false", "true"):
            page.evaluate(
                f"document.querySelectorAll('details').forEach(it => it.open = {is_open})"
            )
            response = Axe().run(page).response
            assert response["passes"]
            found = [
                (each["id"], each["impact"], [node["html"] for node in each["nodes"]][:3])
                for each in response["violations"]
            ]
            assert found == []


@pytest.mark.parametrize("query", ["", "?days=30&edition=ee"])
def test_the_numbers_are_those_of_the_document(
    chromium: Browser, collector: Collector, query: str
) -> None:
    told = document(collector, query)
    days = told["days"][::-1]
    movements: Callable[..., list[list[str]]] = lambda *names: [  # noqa: E731 - as short as its name
        [each["day"], *(shown(each["movements"][name]) for name in names)] for each in days
    ]
    with looking(chromium, collector, f"/{query}") as page:
        heard = page.locator(".heard dd").all_inner_texts()
        assert table(page, "active") == movements("active_2d", "active_7d", "active_30d", "in_use")
        assert table(page, "growth") == movements("new", "lost", "retained")
        versions = table(page, "versions")
        adopted = table(page, "adoption")
        names = page.locator("#adoption thead th").all_text_contents()[1:-1]
        shares = {row[0]: row[1] for row in table(page, "features")}
        platforms, deployments = table(page, "where", 1), table(page, "where", 0)
    assert heard == table_of(days[0], "active_2d", "active_7d", "active_30d")
    assert {name: installs for name, installs, *_ in versions} == with_others(
        days[0]["versions"], days[0]["other_versions"], NOT_LISTED
    )
    for row, each in zip(adopted, days, strict=False):
        on = [shown(each["versions"][name]) if name in each["versions"] else "–" for name in names]  # noqa: RUF001 - what the page says
        assert row[:-1] == [each["day"], *on]
    tables = (
        (platforms, "platform", "others together"),
        (deployments, "deployment", NOT_LISTED),
    )
    for rows, name, rest in tables:
        spread = told["values"][name]
        groups = {group["value"]: group["installs"] for group in spread["groups"]}
        assert {row[0]: row[1] for row in rows} == with_others(
            groups, spread["folded_installs"], rest
        )
    assert shares["Rate limit"] == shown(told["features"]["features.rate_limit_enabled"])


def table_of(day: Any, *names: str) -> list[str]:
    return [shown(day["movements"][name]) for name in names]


def with_others(groups: dict[str, int], others: int | None, rest: str) -> dict[str, str]:
    found = {name: shown(installs) for name, installs in groups.items()}
    return found if others is None else {**found, rest: shown(others)}


def test_on_paper_there_is_no_form(chromium: Browser, collector: Collector) -> None:
    with looking(chromium, collector) as page:
        assert page.locator("form").is_visible()
        page.emulate_media(media="print")
        assert not page.locator("form").is_visible()
        assert page.locator("#versions table").is_visible()
