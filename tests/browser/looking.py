"""A window of the browser, and what is seen in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, Page, ViewportSize

from tests.support.collector import Collector

Scheme = Literal["light", "dark"]

PHONE: ViewportSize = {"width": 390, "height": 740}
WIDE: ViewportSize = {"width": 1440, "height": 900}
SEEN = Path(__file__).with_name("looking.js").read_text()
"""Defines ``look`` in each window."""

PAGES = [
    ("none", "/"),
    ("3 installs", "/"),
    ("7 installs", "/"),
    ("60 installs", "/"),
    ("600 installs", "/"),
    ("600 installs", "/?days=30&edition=ee"),
    ("600 installs", "/?version=0.17.1"),
    ("600 installs", "/?version=99.9.9"),
    ("600 installs", "/?days=7"),
    ("600 installs", "/nothing"),
    ("600 installs", "/heartbeat"),
    ("60,000 installs", "/"),
    ("one version", "/"),
    ("80 versions", "/"),
    ("long names", "/"),
    ("later schema", "/"),
    ("stands still", "/"),
    ("falling", "/"),
    ("edition", "/?edition=ee"),
]
"""A scenario and a path for each kind of page. Nobody runs version 99.9.9, 7 days cannot be chosen,
and the path ``/nothing`` has no page."""


@contextmanager
def looking(
    chromium: Browser,
    collector: Collector,
    path: str = "/",
    *,
    size: ViewportSize = WIDE,
    scheme: Scheme = "light",
    without: Literal["", "scripts", "mouse"] = "",
) -> Iterator[Page]:
    """Open a page in a browser without a history; one without a mouse has a touch screen."""
    context = chromium.new_context(
        viewport=size,
        color_scheme=scheme,
        java_script_enabled=without != "scripts",
        has_touch=without == "mouse",
        reduced_motion="reduce",
    )
    context.add_init_script(SEEN)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{collector.port}{path}")
    yield page
    context.close()


def document(collector: Collector, query: str = "") -> Any:
    """Return the numbers of a page as JSON."""
    return collector.client.get(f"/v1/stats.json{query}").json()


def section(page: Page, name: str) -> str:
    """Return the text of a section."""
    found: str = page.locator(f"#{name}").inner_text()
    return found
