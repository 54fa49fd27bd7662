"""Each accepted spelling of a database's URL connects to that database."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from sqlalchemy import Engine, make_url, text

from app.pipeline import Pipeline
from app.settings import Settings
from demo.servers import Servers
from tests.conftest import ROLE
from tests.support.database import one
from tests.support.ports import free_port
from tests.support.relay import relaying


@pytest.fixture
def words(embedded: Servers | None, database_url: str) -> Iterator[dict[str, object]]:
    """What the URLs of the test's database are made of: a live port, a dead one, the socket."""
    if embedded is None:
        pytest.skip("the server that TEST_DATABASE_URL names has an address of its own")
    url = make_url(database_url)
    directory, port = str(url.query["host"]), url.query["port"]
    dead = free_port()
    with relaying(f"{directory}/.s.PGSQL.{port}") as relay:
        yield {
            "user": ROLE,
            "name": url.database,
            "live": relay.port,
            "dead": dead,
            "directory": directory,
            "quoted": quote(directory, safe=""),
            "port": port,
        }


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://{user}@127.0.0.1:{live}/{name}",
        " postgres://{user}@127.0.0.1:{live}/{name}\n",
        "postgresql://{user}@127.0.0.1:{dead},127.0.0.1:{live}/{name}",
        "postgresql://{user}@[::1]:{dead},127.0.0.1:{live}/{name}?target_session_attrs=read-write",
        "postgresql+asyncpg://{user}@/{name}?host=127.0.0.1:{dead}&host=127.0.0.1:{live}",
        "postgresql://{user}@/{name}?host=127.0.0.1,127.0.0.1&port={dead},{live}",
        "postgresql://{user}@127.0.0.1,localhost:{live}/{name}?port={live}",
        "postgresql://{user}@/{name}?host={directory}&port={port}",
        "postgresql:///{name}?host={directory}&port={port}&user={user}",
        "postgresql://{user}@{quoted}:{port}/{name}",
        "postgresql://{user}@{quoted}/{name}",
        "postgresql://{user}@127.0.0.1:{dead},{quoted}:{port}/{name}",
        "postgresql://{user}@:{port}/{name}?host={directory}",
    ],
)
@pytest.mark.usefixtures("environment")
def test_a_database_is_reached_by_every_spelling(
    url: str, words: dict[str, object], db: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url.format(**words))
    with Pipeline(Settings.load()).transaction() as connection:
        found = connection.execute(text("SELECT current_database(), current_user")).one()
    assert tuple(found) == (one(db, "SELECT current_database()"), ROLE)
