"""Collectors for one test each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from app.collector import store
from migrations import migrate
from tests.support.collector import Collector, serving
from tests.support.metrics import free_port


@pytest.fixture
def migrated(collector_database: str) -> str:
    """The URL of a collector's database, with its tables."""
    with create_engine(collector_database, poolclass=NullPool).connect() as connection:
        migrate(connection, "collector")
    return collector_database


@pytest.fixture
def empty(empty_database: str) -> Iterator[Engine]:
    """A collector's tables, before any day is counted."""
    engine = store.connect(empty_database)
    with engine.connect() as connection:
        migrate(connection, "collector")
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
