"""Collectors for one test each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.collector import store
from tests.conftest import Databases
from tests.support.collector import Collector, serving
from tests.support.metrics import free_port


@pytest.fixture
def migrated(databases: Databases, collector_template: str) -> Iterator[str]:
    """The URL of a collector's database, with its tables."""
    with databases.copy_of(collector_template) as url:
        yield url


@pytest.fixture
def empty(migrated: str) -> Iterator[Engine]:
    """A collector's tables, before any day is counted."""
    engine = store.connect(migrated)
    yield engine
    engine.dispose()


@pytest.fixture
def metrics_port() -> int:
    """The port of the metrics of ``own``."""
    return free_port()


@pytest.fixture
def own(migrated: str, tmp_path: Path, metrics_port: int) -> Iterator[Collector]:
    """A collector for one test, which may break it or read its log."""
    port = str(metrics_port)
    with serving(migrated, tmp_path / "log", COLLECTOR_METRICS_PORT=port) as running:
        yield running
