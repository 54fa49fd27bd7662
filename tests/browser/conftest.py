"""The real collector on a seeded fleet, and a real browser that looks at it."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest
from playwright.sync_api import Browser, sync_playwright
from sqlalchemy import NullPool, create_engine

from migrations import migrate
from tests.browser.chromium import launch
from tests.browser.collector import seed
from tests.collector import Collector, serving
from tests.conftest import Databases

SIZES = {"a fleet": (600, 120), "seven installs": (7, 20)}
"""How many installs, over how many days."""


@pytest.fixture(scope="session")
def collectors(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Collector]]:
    """A collector of a fleet, one of seven installs, and one that has heard of none."""
    now = datetime.now(UTC)
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as running:
        found = {}
        for name, (installs, days) in SIZES.items():
            url = running.enter_context(databases.copy_of("template1"))
            seed(url, installs=installs, days=days, until=now)
            found[name] = running.enter_context(serving(url, logs / f"{installs}.log"))
        url = running.enter_context(databases.copy_of("template1"))
        with create_engine(url, poolclass=NullPool).connect() as connection:
            migrate(connection, "collector")
        found["none"] = running.enter_context(serving(url, logs / "none.log"))
        yield found


@pytest.fixture(scope="session")
def collector(collectors: dict[str, Collector]) -> Collector:
    """The collector of a fleet."""
    return collectors["a fleet"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()
