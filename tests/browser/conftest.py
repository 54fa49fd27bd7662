"""The real collector on each scenario, and a real browser that looks at it."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is in requirements/browser.txt alone")

from playwright.sync_api import Browser, sync_playwright

from tests.browser.chromium import launch
from tests.browser.fleet import make
from tests.browser.scenarios import SCENARIOS
from tests.conftest import Databases
from tests.support.collector import Collector, serving


class Collectors(dict[str, Collector]):
    """The collectors by the names of their scenarios; each is started when it is first needed."""

    def __init__(self, databases: Databases, logs: Path, running: ExitStack) -> None:
        super().__init__()
        self._databases = databases
        self._logs = logs
        self._running = running

    def __missing__(self, scenario: str) -> Collector:
        url = self._running.enter_context(self._databases.copy_of("template1"))
        make(url, SCENARIOS[scenario], datetime.now(UTC))
        log = self._logs / f"{scenario}.log"
        self[scenario] = self._running.enter_context(serving(url, log))
        return self[scenario]


@pytest.fixture(scope="session")
def collectors(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collectors]:
    """A collector of each scenario."""
    with ExitStack() as running:
        found = Collectors(databases, tmp_path_factory.mktemp("logs"), running)
        yield found
        for each in found.values():  # all at once: each needs a second to end
            each.process.terminate()
        for each in found.values():
            each.process.wait(10)


@pytest.fixture(scope="session")
def collector(collectors: Collectors) -> Collector:
    """The collector of a usual fleet."""
    return collectors["600 installs"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()
