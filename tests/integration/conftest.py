"""Collectors for one test each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.collector import store
from tests.conftest import Databases
from tests.support.collector import Collector, serving


@pytest.fixture
def migrated(databases: Databases, collector_template: str) -> Iterator[str]:
    """The URL of a collector's database, with its tables."""
    with databases.copy_of(collector_template) as url:
        yield url


@pytest.fixture
def empty(migrated: str) -> Iterator[Engine]:
    """The tables of a collector that has counted no day."""
    engine = store.connect(migrated)
    yield engine
    engine.dispose()


@pytest.fixture
def own(migrated: str, tmp_path: Path) -> Iterator[Collector]:
    """A collector for one test, which may break it or read its log."""
    with serving(migrated, tmp_path / "log") as running:
        yield running
