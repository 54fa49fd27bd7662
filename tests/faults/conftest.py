"""Servers that may be broken, and a day's heartbeat that waits to be sent."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from app.pipeline import Pipeline
from demo import servers
from tests.conftest import ROLE, Clock
from tests.support.breakable import Server
from tests.support.database import give_notice
from tests.support.processes import Processes
from tests.support.relay import Relay, relaying
from tests.support.steps import DAY_BEGINS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, those with a timeout of their own; others fill the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture
def noticed(db: Engine) -> None:
    """The operator got the notice on the day before."""
    give_notice(db, "2026-05-01")


@pytest.fixture
def pending(noticed: None, pipeline: Pipeline, clock: Clock) -> None:  # noqa: ARG001 - pytest runs it first
    """It is half past two, and the day's heartbeat waits to be sent."""
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()


@pytest.fixture(scope="session")
def breakable(embedded: servers.Servers | None) -> servers.Servers:
    """The embedded servers; those that TEST_DATABASE_URL and TEST_REDIS_URL name are not broken."""
    if embedded is None:
        pytest.skip("servers named by TEST_DATABASE_URL and TEST_REDIS_URL are not broken")
    return embedded


@pytest.fixture(scope="session")
def valkey(breakable: servers.Servers) -> Server:
    """The Valkey, which loses everything when it is killed."""

    def is_up() -> bool:
        with suppress(redis.RedisError), redis.Redis.from_url(breakable.redis) as client:
            return bool(client.ping())
        return False

    return Server(breakable, breakable.redis_pid, is_up)


@pytest.fixture(scope="session")
def postgres(breakable: servers.Servers, server_url: str) -> Server:
    """The Postgres, which keeps what was committed when it is killed."""
    engine = create_engine(server_url, poolclass=NullPool)

    def is_up() -> bool:
        with suppress(DBAPIError), engine.connect() as connection:
            return connection.scalar(text("SELECT true")) is True
        return False

    return Server(breakable, breakable.postgres_pid, is_up)


@pytest.fixture
def relayed_database(
    breakable: servers.Servers,
    database_url: str,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Relay]:
    """A relay to the database, through which new pipelines and processes reach it."""
    assert breakable
    url = make_url(database_url).set(username=ROLE)
    (directory, port) = (url.query["host"], url.query["port"])
    with relaying(str(Path(str(directory)) / f".s.PGSQL.{port}")) as relay:
        over_tcp = url.set(host="127.0.0.1", port=relay.port, query={})
        relayed_url = over_tcp.render_as_string(hide_password=False)
        processes.environment["DATABASE_URL"] = relayed_url
        monkeypatch.setenv("DATABASE_URL", relayed_url)
        yield relay


@pytest.fixture
def relayed_redis(redis_url: str, processes: Processes) -> Iterator[Relay]:
    """A relay to Redis, through which the processes reach it."""
    port = make_url(redis_url).port
    assert port
    with relaying(("127.0.0.1", port)) as relay:
        processes.environment["REDIS_URL"] = f"redis://127.0.0.1:{relay.port}/0"
        yield relay
