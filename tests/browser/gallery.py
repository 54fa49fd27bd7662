"""Take pictures of the collector's page, for people who look at it.

    python -m tests.browser.gallery DIRECTORY [--only WORD]

It serves each scenario by a real collector and takes a picture of the whole page in every look: on
narrow and wide screens, light and dark, in print, with large text, in forced colors. Each file is
named after its scenario, its path and its look, such as ``600-installs-days-30-1440-dark.png``.
``--only`` takes the pictures whose scenario or file name contains a word.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright
from sqlalchemy import make_url

from demo import servers
from tests.browser.chromium import launch
from tests.browser.fleet import make
from tests.browser.scenarios import SCENARIOS
from tests.conftest import Databases
from tests.support.collector import Collector, serving
from tests.support.processes import ROOT

PATHS: Mapping[str, Sequence[str]] = {
    "600 installs": ("/", "/?days=30", "/?days=365", "/?edition=ee", "/nothing"),
    "edition": ("/?edition=ee",),
}
"""Where to look, if that is not the page itself."""
HEIGHT = 900


@dataclass(frozen=True)
class Look:
    """How somebody looks at a page: the name says what is not as usual."""

    width: int
    name: str = ""
    scheme: Literal["light", "dark"] = "light"
    media: Literal["screen", "print"] = "screen"
    forced_colors: Literal["active", "none"] = "none"
    text: str = "100%"


LOOKS = (
    *(Look(width) for width in (320, 390, 768, 1440, 2560)),
    *(Look(width, "dark", scheme="dark") for width in (390, 1440)),
    *(Look(width, "large-text", text="200%") for width in (390, 1440)),
    Look(1440, "print", media="print"),
    Look(1440, "forced-colors", forced_colors="active"),
)


@dataclass(frozen=True)
class Picture:
    """A picture to take."""

    scenario: str
    path: str
    look: Look

    @property
    def file(self) -> str:
        """Its file's name."""
        words = (self.scenario.replace(",", ""), self.path, self.look.width, self.look.name)
        return "-".join(re.findall(r"\w+", " ".join(map(str, words)))) + ".png"


def wanted(word: str) -> list[Picture]:
    """Return the pictures whose scenario or file name contains a word."""
    every = [
        Picture(scenario, path, look)
        for scenario in SCENARIOS
        for path in PATHS.get(scenario, ("/",))
        for look in LOOKS
    ]
    return [each for each in every if word in each.scenario or word in each.file]


@contextmanager
def looking(browser: Browser, look: Look) -> Iterator[Page]:
    """Open a window for a look."""
    context = browser.new_context(
        viewport={"width": look.width, "height": HEIGHT},
        color_scheme=look.scheme,
        forced_colors=look.forced_colors,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.emulate_media(media=look.media)
    yield page
    context.close()


def take(browser: Browser, collector: Collector, picture: Picture, file: Path) -> None:
    """Write a picture of the whole page."""
    with looking(browser, picture.look) as page:
        page.goto(f"http://127.0.0.1:{collector.port}{picture.path}")
        page.evaluate("size => document.documentElement.style.fontSize = size", picture.look.text)
        page.screenshot(path=file, full_page=True)


def take_all(pictures: Sequence[Picture], directory: Path) -> None:
    """Write the pictures, scenario by scenario, and print each file's name."""
    taken = 0
    with (
        servers.running(ROOT / ".data" / "gallery") as running,
        TemporaryDirectory() as logs,
        sync_playwright() as playwright,
    ):
        url = make_url(running.postgres).set(drivername="postgresql+psycopg")
        databases = Databases(url.render_as_string(hide_password=False))
        browser = launch(playwright)
        for scenario in dict.fromkeys(picture.scenario for picture in pictures):
            with databases.copy_of("template1") as database:
                make(database, SCENARIOS[scenario], datetime.now(UTC))
                with serving(database, Path(logs) / "log") as collector:
                    for picture in pictures:
                        if picture.scenario == scenario:
                            take(browser, collector, picture, directory / picture.file)
                            taken += 1
                            print(f"{taken}/{len(pictures)} {picture.file}", flush=True)  # noqa: T201 - progress
        browser.close()


def main() -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser.gallery")
    parser.add_argument("directory", type=Path, help="where the pictures are written")
    parser.add_argument("--only", default="", metavar="WORD", help="part of a scenario or a file")
    arguments = parser.parse_args()
    pictures = wanted(arguments.only)
    if not pictures:
        parser.error(f"the name of no scenario and of no file contains {arguments.only!r}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    take_all(pictures, arguments.directory)


if __name__ == "__main__":
    main()
