"""Draw the page of a simulated fleet: ``python -m tests.browser.screenshot FILE``."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import FloatRect, ViewportSize, sync_playwright
from sqlalchemy import make_url

from demo import servers
from tests.browser.chromium import launch
from tests.browser.fleet import make
from tests.browser.scenarios import SCENARIOS
from tests.support.collector import serving
from tests.support.processes import ROOT

WIDE: ViewportSize = {"width": 1440, "height": 900}
LAST = "#retention"
"""The question that ends lowest of those that are drawn."""
MARGIN = 30


def draw(file: Path) -> None:
    """Write a PNG of the first questions and their answers."""
    with servers.running(ROOT / ".data" / "screenshot") as running, TemporaryDirectory() as logs:
        url = make_url(running.postgres).set(drivername="postgresql+psycopg")
        address = url.render_as_string(hide_password=False)
        make(address, SCENARIOS["600 installs"], datetime.now(UTC))
        with serving(address, Path(logs) / "log") as collector, sync_playwright() as playwright:
            browser = launch(playwright)
            page = browser.new_page(viewport=WIDE, color_scheme="light")
            page.goto(f"http://127.0.0.1:{collector.port}/")
            box = page.locator(LAST).bounding_box()
            if box is None:
                raise RuntimeError(f"The page has no {LAST}.")
            height = box["y"] + box["height"] + MARGIN
            clip: FloatRect = {"x": 0, "y": 0, "width": WIDE["width"], "height": height}
            page.screenshot(path=file, full_page=True, clip=clip)
            browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
