"""How the page looks on each screen, in each colour scheme and on paper."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests.browser.looking import PAGES, PHONE, WIDE, Scheme, looking
from tests.support.collector import SECTIONS, Collector

WIDTHS = (320, 390, 768, 1100, 1440, 2560)
TEXT_SIZES = (100, 200)
"""In percent of the usual size."""
STACKED = (
    ("growth", "retention"),
    ("versions", "adoption"),
    ("where", "runtimes"),
    ("sizes", "features"),
)
"""Sections that share a cell, one above the other."""
TEXT, MARKS = 4.5, 3.0
"""The least contrast of text, and of what is no text."""

SCHEMES: Sequence[Scheme] = ("light", "dark")

Layouts = dict[str, dict[str, Any]]


LIKE_OTHERS = [("600 installs", "/"), ("falling", "/")]
"""Pages with no text elsewhere than on the one of ``stands still``."""


@pytest.fixture(
    scope="module", params=[each for each in PAGES if each not in LIKE_OTHERS], ids=" ".join
)
def layouts(
    request: pytest.FixtureRequest, chromium: Browser, collectors: dict[str, Collector]
) -> Layouts:
    """Where text is, at each width and text size, with the details closed and open."""
    scenario, path = request.param
    found = {}
    with looking(chromium, collectors[scenario], path) as page:
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for percent in TEXT_SIZES:
                for is_open in (False, True):
                    page.evaluate(f"look.enlarge({percent})")
                    page.evaluate(f"look.open({str(is_open).lower()})")
                    look = f"{width} px, {percent}%, {'open' if is_open else 'closed'}"
                    found[look] = page.evaluate("look.layout()")
    return found


def faults(layouts: Layouts, kind: str) -> dict[str, Any]:
    """Return the looks that have faults of a kind."""
    assert len(layouts) == len(WIDTHS) * len(TEXT_SIZES) * 2
    assert all(each["lines"] for each in layouts.values())
    return {look: each[kind] for look, each in layouts.items() if each[kind]}


def test_a_page_does_not_scroll_sideways(layouts: Layouts) -> None:
    assert faults(layouts, "sideways") == {}


def test_no_text_is_cut(layouts: Layouts) -> None:
    assert faults(layouts, "cut") == {}


def test_no_text_leaves_the_screen(layouts: Layouts) -> None:
    assert faults(layouts, "beyond") == {}


def test_no_text_of_a_chart_leaves_its_section(layouts: Layouts) -> None:
    assert faults(layouts, "astray") == {}


def test_no_text_overlaps_other_text(layouts: Layouts) -> None:
    assert faults(layouts, "overlaps") == {}


def test_every_key_is_above_its_plot(layouts: Layouts) -> None:
    assert faults(layouts, "keys") == {}


@pytest.fixture(scope="module")
def page(chromium: Browser, collector: Collector) -> Iterator[Page]:
    """The page of a usual fleet, for what only looks at it in several sizes."""
    with looking(chromium, collector) as page:
        yield page


@pytest.mark.parametrize(
    ("width", "columns"), [(390, 1), (991, 1), (992, 2), (1439, 3), (1440, 3), (2560, 3)]
)
def test_a_wider_screen_has_more_columns(page: Page, width: int, columns: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    lefts = page.evaluate("look.all('.cell').map(it => it.getBoundingClientRect().left)")
    assert len({round(left) for left in lefts}) == columns


@pytest.mark.parametrize("width", [1440, 2560])
def test_the_numbers_use_the_width_of_a_wide_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    boxes = page.evaluate(
        "look.all('.cell').map(it => it.getBoundingClientRect())"
        ".map(({left, right}) => [left, right])"
    )
    assert max(right for _, right in boxes) - min(left for left, _ in boxes) >= 0.85 * width


def test_the_page_is_short_on_a_wide_screen(page: Page) -> None:
    page.set_viewport_size(WIDE)
    assert page.evaluate("document.documentElement.scrollHeight") < 3600


@pytest.mark.parametrize("width", WIDTHS)
def test_sections_are_read_in_the_order_in_which_they_are_seen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("look.all('section').map(it => it.id)") == [*SECTIONS, "about", "reuse"]
    boxes = page.evaluate(
        "look.all('.cell, footer section').map(it => it.getBoundingClientRect())"
        ".map(({left, right, top, bottom}) => [left, right, top, bottom])"
    )
    for first, second in STACKED:
        above, below = (page.locator(f"#{name}").bounding_box() for name in (first, second))
        assert above is not None
        assert below is not None
        assert above["y"] + above["height"] <= below["y"]
    lowest = 0.0
    for before, (left, _, top, _) in pairwise(boxes):
        lowest = max(lowest, before[3])
        is_beside = left >= before[1] and top == pytest.approx(before[2])
        is_below = left == pytest.approx(boxes[0][0]) and top >= lowest
        assert is_beside or is_below


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize(
    ("scenario", "change"), [("600 installs", "+"), ("falling", "\N{MINUS SIGN}")]
)
def test_the_first_screen_says_how_many_are_active_and_whether_they_grow(
    chromium: Browser,
    collectors: dict[str, Collector],
    scenario: str,
    change: str,
    size: dict[str, int],
) -> None:
    with looking(chromium, collectors[scenario]) as page:
        page.set_viewport_size({"width": size["width"], "height": size["height"]})
        numbers = page.locator("#active .figures .number")
        active, changed = numbers.nth(0), numbers.nth(1)
        assert active.inner_text() == scenario.removesuffix(" installs") or scenario == "falling"
        assert changed.inner_text().startswith(change)
        for each in (active, changed):
            box = each.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= size["height"]


@pytest.mark.parametrize(("scenario", "path"), PAGES)
def test_all_text_and_every_mark_is_easy_to_see(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, path: str
) -> None:
    papers = []
    with looking(chromium, collectors[scenario], path) as page:
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            paper, words, marks = page.evaluate("[look.paper(), look.words(), look.marks()]")
            papers.append(paper)
            assert len(words) > 1
            assert [each for each in words if each[-1] < TEXT] == []
            assert [each for each in marks if each[-1] < MARKS] == []
    assert papers[0] > papers[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_reader_points_at_is_easy_to_see(
    chromium: Browser, collector: Collector, scheme: Scheme
) -> None:
    with looking(chromium, collector, scheme=scheme) as page:
        for link in ("a.permalink", "summary", "button", ".skip"):
            page.locator(link).first.focus()
            words, outline = page.evaluate("[look.words(), look.outline()]")
            assert [each for each in words if each[-1] < TEXT] == []
            assert outline >= MARKS
        page.locator("a.permalink").first.hover()
        assert [each for each in page.evaluate("look.words()") if each[-1] < TEXT] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_marks_differ_from_the_background_in_forced_colors(
    chromium: Browser, collector: Collector, scheme: Scheme
) -> None:
    with looking(chromium, collector, scheme=scheme) as page:
        usual = page.evaluate("look.marks()")
        page.emulate_media(forced_colors="active")
        words, marks = page.evaluate("[look.words(), look.marks()]")
    assert marks != usual
    assert [each for each in words if each[-1] < TEXT] == []
    assert [each for each in marks if each[-1] < MARKS] == []


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_dark_is_dark_and_light_is_light(
    chromium: Browser,
    collector: Collector,
    scheme: Scheme,
    is_dark: bool,  # noqa: FBT001 - pytest's parameter
) -> None:
    with looking(chromium, collector, scheme=scheme) as page:
        paper, ink = page.evaluate("[look.paper(), look.ink()]")
    assert (paper < 0.02 and ink > 0.7) if is_dark else (paper > 0.9 and ink < 0.03)


ON_PAPER = {"width": 718, "height": 1046}
"""A4 without its margins, in px."""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scenario", ["600 installs", "60,000 installs", "long names"])
def test_on_paper_there_is_only_what_can_be_read(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, scheme: Scheme
) -> None:
    with looking(chromium, collectors[scenario], scheme=scheme) as page:
        page.set_viewport_size({"width": ON_PAPER["width"], "height": ON_PAPER["height"]})
        unwanted = page.locator("form, summary, details, .stops, .skip, .permalink")
        assert unwanted.first.is_visible()
        page.emulate_media(media="print")
        assert [each for each in unwanted.all() if each.is_visible()] == []
        assert page.locator("#versions table").first.is_visible()
        assert page.locator("#retention table").is_visible()
        layout, words = page.evaluate("[look.layout(), look.words()]")
        scrolling = page.evaluate(
            "look.all('.scroll').filter(look.isShown)"
            ".filter(it => look.style(it).overflow !== 'visible').length"
        )
    assert {kind: layout[kind] for kind in ("cut", "beyond", "overlaps")} == {
        "cut": [],
        "beyond": [],
        "overlaps": [],
    }
    assert scrolling == 0
    assert [each for each in words if each[-1] < TEXT] == []


@pytest.mark.parametrize(("scenario", "path"), PAGES)
def test_axe_finds_nothing(
    chromium: Browser, collectors: dict[str, Collector], scenario: str, path: str
) -> None:
    with looking(chromium, collectors[scenario], path) as page:
        assert violations(page) == []
        page.set_viewport_size(PHONE)
        page.evaluate("look.open(true)")
        assert violations(page, rules={CONTRAST: {"enabled": False}}) == []
        page.evaluate("look.open(false)")
        page.emulate_media(color_scheme="dark")
        assert violations(page, runOnly=[CONTRAST]) == []


CONTRAST = "color-contrast"
"""The rule that takes most of the time. What is in details has the colours of what is not."""


def violations(page: Page, **options: Any) -> list[tuple[str, list[str]]]:
    response = Axe().run(page, options={"resultTypes": ["violations"], **options}).response
    assert response["passes"]
    return [
        (each["id"], [node["html"] for node in each["nodes"]][:3])
        for each in response["violations"]
    ]
