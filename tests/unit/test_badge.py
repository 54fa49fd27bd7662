"""The badge says how many installs are active, and never shows an old number as a new one."""

import re
import xml.etree.ElementTree as ET
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.collector import badge
from app.collector.badge import FRESH, GREY, Badge, document, of
from app.collector.daily import ACTIVE_2D, Counted, Filter, Span
from app.collector.rendering import Templates
from app.collector.rounding import FOLD_BELOW
from app.collector.stats import Numbers, Stats, nothing, show

DAY = date(2026, 11, 12)
TEMPLATES = Templates(established_days=3)
SVG = "{http://www.w3.org/2000/svg}"


def counted(active: int) -> Stats:
    """What is shown where so many are active at the end of ``DAY``."""
    numbers = Numbers(
        versions={DAY: {"1.0.0": active}},
        versions_of_all={},
        editions_of_all={},
        stocks={DAY: {ACTIVE_2D: active}},
        counted={DAY: Counted(None)},
    )
    at = datetime(2026, 11, 13, 0, 1, tzinfo=UTC)
    return show(nothing(Filter()), numbers, Span(DAY, DAY, at), days=1)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (0, "0"),
        *((few, "fewer than 5") for few in range(1, FOLD_BELOW)),
        (5, "5"),
        (7, "7"),
        (1_234_567, "1,234,567"),
    ],
)
def test_it_shows_the_exact_number_or_that_there_are_few(active: int, message: str) -> None:
    shown = of(counted(active), counting_stopped=False)
    assert shown == Badge(
        message, f"Active installs at the end of 12 November 2026: {message}.", FRESH
    )


def test_an_old_number_has_its_day_and_is_grey_and_nobody_can_give_it_another_colour() -> None:
    shown = of(counted(1_234), counting_stopped=True)
    assert shown.message == "1,234 on 12 November 2026"
    assert shown.title.startswith("Counting has stopped. ")
    found = document(shown)
    assert (found["color"], found["isError"]) == (GREY, True)


def test_an_old_number_of_few_is_as_few_as_a_new_one() -> None:
    assert of(counted(3), counting_stopped=True).message == "fewer than 5 on 12 November 2026"


@pytest.mark.parametrize("counting_stopped", [False, True])
def test_before_the_first_day_it_says_that_none_is_counted(*, counting_stopped: bool) -> None:
    shown = of(nothing(Filter()), counting_stopped=counting_stopped)
    assert (shown.message, shown.color) == ("no day counted yet", GREY)


def test_shields_gets_each_field_in_its_form() -> None:
    assert document(of(counted(1_234), counting_stopped=False)) == {
        "schemaVersion": 1,
        "label": "active installs",
        "message": "1,234",
        "color": FRESH,
        "isError": False,
        "cacheSeconds": 300,
    }


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Z")), min_size=1))
def test_whatever_it_says_no_text_is_wider_than_its_room(message: str) -> None:
    picture = TEMPLATES.picture(Badge(message, "A title."))
    root = ET.fromstring(picture)  # noqa: S314 - our own words
    _, label_room, message_room = (float(each.attrib["width"]) for each in root.iter(f"{SVG}rect"))
    label, shown = root.iter(f"{SVG}text")
    assert float(root.attrib["width"]) == label_room + message_room
    begins = 0.0
    for text, room in ((label, label_room), (shown, message_room)):
        width = float(text.attrib["textLength"])
        assert text.attrib["lengthAdjust"] == "spacingAndGlyphs"
        assert width == room - badge.PADDING
        assert float(text.attrib["x"]) == begins + room / 2
        begins += room


def test_its_title_is_read_out() -> None:
    picture = TEMPLATES.picture(of(counted(1_234), counting_stopped=False))
    root = ET.fromstring(picture)  # noqa: S314 - our own words
    title = "Active installs at the end of 12 November 2026: 1,234."
    assert root.attrib["role"] == "img"
    assert root.findtext(f"{SVG}title") == root.attrib["aria-label"] == title


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [
        each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [FRESH, GREY])
def test_its_words_are_legible_on_every_colour_that_it_has(color: str) -> None:
    picture = TEMPLATES.picture(Badge("1", "A title.", color))
    backgrounds = re.findall(r'fill="#([0-9a-f]{6})"', picture)
    assert len(backgrounds) == 2
    assert color in backgrounds
    assert re.findall(r'fill="#([0-9a-f]{3})"', picture) == ["fff"]
    for background in backgrounds:
        assert 1.05 / (luminance(background) + 0.05) >= 4.5
