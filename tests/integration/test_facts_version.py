"""The Postgres version is built from numbers, never from a text that a build may have changed."""

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import Connection

from app import database, facts
from app.payload import Facts, compose


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A connection to the generated ConsentOS, whose transaction is rolled back."""
    with database.engine(database_url).connect() as connection:
        yield connection


@pytest.mark.parametrize(
    ("number", "version"),
    [
        ("150018", "15.18"),
        ("160002", "16.2"),
        ("170000", "17.0"),
        ("180004", "18.4"),
        ("200010", "20.10"),
    ],
)
def test_the_postgres_version_is_made_of_the_servers_number(
    connection: Connection, number: str, version: str
) -> None:
    connection.exec_driver_sql("CREATE SCHEMA other")
    connection.exec_driver_sql(
        "CREATE FUNCTION other.current_setting(text) RETURNS text LANGUAGE sql AS"
        f" $$ SELECT CASE $1 WHEN 'server_version_num' THEN '{number}' END $$"
    )
    connection.exec_driver_sql("SET LOCAL search_path = other, public, pg_catalog")
    assert stated(connection) == version


def test_it_is_the_real_servers(connection: Connection) -> None:
    found = connection.exec_driver_sql("SELECT substring(version() from '[0-9]+[.][0-9]+')")
    assert stated(connection) == found.scalar_one()


def stated(connection: Connection) -> str:
    """Return the Postgres version that a heartbeat written now would state."""
    found = Facts(
        census=facts.census(connection), version="1.0.0", edition="ce", deployment="unknown",
        python=(3, 12, 7), platform="linux", geoip_header_configured=False,
        geoip_maxmind_configured=False, rate_limit_enabled=True,
    )  # fmt: skip
    heartbeat = compose(found, instance_id=UUID(int=1), at=datetime.now(UTC))
    return heartbeat.stack.postgres_version
