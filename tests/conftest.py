"""Real Postgres, real Valkey and a real HTTP receiver for every test that needs one."""

import gc
import os
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from uuid import uuid4

import pytest
import redis
import trustme
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, NullPool, QueuePool, create_engine, make_url, text

import tests.guard.sitecustomize  # noqa: F401 - cuts the tests off from the network
from app import database, grants, sender
from app.collector import store
from app.pipeline import Pipeline
from app.settings import Settings
from demo import consentos, servers
from migrations import migrate
from tests.support.collector import Collector, serving
from tests.support.command import with_password
from tests.support.ports import free_port
from tests.support.processes import Processes
from tests.support.receiver import Receiver, receiving
from tests.support.room import room

RUNNER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
"""Which of the parallel runners this is: each has servers of its own."""

ROLE = f"telemetry_test_{RUNNER}"
"""The role of the pipeline under test, which may do what `consentos-telemetry grants` lists."""

# A busy machine makes an example slow, which is no fault of the code. Without a parent the profile
# extends the active one: Hypothesis's own "ci", whose examples are the same in every run, in CI.
settings.register_profile(
    "any machine", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

Clock = Callable[[str], None]
"""Moves the database's clock to an ISO time, from where it goes on running."""


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what lasts until the end: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Have the tests' processes end on SIGINT, which a shell's background job would ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def only_what_a_test_sets() -> None:
    """Take every variable of the pipeline, and every proxy, out of the tests' environment."""
    names = {name.upper() for name in Settings.model_fields}
    names |= {"COLLECTOR_DATABASE_URL", "COLLECTOR_READ_DATABASE_URL"}
    for name in os.environ:
        if name in names or name.startswith("TELEMETRY_") or name.lower().endswith("_proxy"):
            del os.environ[name]


@pytest.fixture(scope="session")
def embedded() -> Iterator[servers.Servers | None]:
    """The embedded servers, or None where TEST_DATABASE_URL and TEST_REDIS_URL name others."""
    if os.environ.get("TEST_DATABASE_URL") and os.environ.get("TEST_REDIS_URL"):
        yield None
        return
    directory = room() / f"test-{RUNNER}"
    with servers.running(directory) as running:
        yield running
    shutil.rmtree(directory)  # hundreds of databases


@pytest.fixture(scope="session")
def server_url(embedded: servers.Servers | None) -> str:
    """The maintenance database of the server that databases are made on."""
    url = embedded.postgres if embedded else os.environ["TEST_DATABASE_URL"]
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def pooled(url: str) -> Engine:
    """Return an engine for a test that looks at a database often: it keeps its sessions.

    A session that has died is replaced. To end all sessions, dispose of the engine.
    """
    unprepared = {"prepare_threshold": None}  # a test may change the columns of a result
    return create_engine(url, pool_pre_ping=True, connect_args=unprepared)


def _end_sessions(engine: Engine) -> None:
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    deadline = time.monotonic() + 10
    while pool.checkedout():  # by a thread of the receiver
        assert time.monotonic() < deadline, "a session is still in use"
        time.sleep(0.01)
    engine.dispose()


class Databases:
    """Makes databases from templates; one that is dropped at once hardly reaches the disk."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._server = pooled(url).execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def copy_of(self, template: str) -> Iterator[str]:
        """Make a database, give its URL, and drop it when the block ends."""
        name = f"telemetry_test_{uuid4().hex}"
        with self._server.connect() as server:
            # A copy of files writes no write-ahead log, as the default way of copying does. Before
            # Postgres 15 there was no other way.
            version = server.dialect.server_version_info
            strategy = " STRATEGY FILE_COPY" if version and version >= (15,) else ""
            server.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}{strategy}"))
        yield self._url.set(database=name).render_as_string(hide_password=False)
        with self._server.connect() as server:
            server.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))

    def drop_role(self, name: str) -> None:
        """Drop a role whose grants have gone with their databases."""
        with self._server.connect() as server:
            server.execute(text(f"DROP ROLE {name}"))

    def close(self) -> None:
        self._server.dispose()


@pytest.fixture(scope="session")
def databases(server_url: str) -> Iterator[Databases]:
    """The maker of databases."""
    maker = Databases(server_url)
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def truth_and_template(databases: Databases) -> Iterator[tuple[consentos.Truth, str]]:
    """A migrated ConsentOS database to copy, and what is true in it."""
    with databases.copy_of("template1") as url:
        engine = database.engine(url)
        with engine.begin() as connection:
            consentos.create_tables(connection)
            truth = consentos.populate(connection)
            connection.execute(text("CREATE SCHEMA clock"))
            connection.execute(text("GRANT USAGE ON SCHEMA clock TO PUBLIC"))
            connection.execute(
                text(
                    "CREATE FUNCTION clock.now() RETURNS timestamptz STABLE LANGUAGE sql AS"
                    " $$SELECT pg_catalog.now() + current_setting('clock.shift')::interval$$"
                )
            )
        with engine.connect() as connection:
            migrate(connection, "telemetry")
        with engine.begin() as connection:
            grants.apply(connection, ROLE, make_url(url).password)
        name = make_url(url).database
        assert name is not None
        yield truth, name
    databases.drop_role(ROLE)


@pytest.fixture(scope="session")
def truth(truth_and_template: tuple[consentos.Truth, str]) -> consentos.Truth:
    """The true counts of the ConsentOS database that the tests begin with."""
    return truth_and_template[0]


@pytest.fixture
def empty_database(databases: Databases) -> Iterator[str]:
    """The URL of a database without a table."""
    with databases.copy_of("template1") as url:
        yield url


@pytest.fixture(scope="session")
def collector_template(databases: Databases) -> Iterator[str]:
    """The name of a database with the tables of a collector, to copy."""
    with databases.copy_of("template1") as url:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            migrate(connection, "collector")
        name = make_url(url).database
        assert name is not None
        yield name


@pytest.fixture
def collector_database(empty_database: str) -> str:
    """The URL of a database for a collector, not migrated."""
    return empty_database


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


@pytest.fixture
def database_url(
    databases: Databases, truth_and_template: tuple[consentos.Truth, str]
) -> Iterator[str]:
    """The URL of a ConsentOS database with the tables of telemetry, and nothing sent yet."""
    with databases.copy_of(truth_and_template[1]) as url:
        yield url


@pytest.fixture
def db(database_url: str) -> Iterator[Engine]:
    """The ConsentOS database, looked at from outside."""
    engine = pooled(database_url)
    yield engine
    _end_sessions(engine)


@pytest.fixture
def locked_url(server_url: str, database_url: str) -> Iterator[str]:
    """The URL of a database and a role whose password is another one."""
    role = f"locked_{uuid4().hex}"
    server = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        file = connection.scalar(text("SHOW hba_file"))
        rules = connection.scalar(text("SELECT pg_read_file(:file)"), {"file": file})
        lines = f"local all {role} scram-sha-256\nhost all {role} all scram-sha-256\n"
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'another'"))
        write_on_server(connection.engine, str(file), lines + str(rules))
        try:
            yield with_password(database_url.replace("postgres@", f"{role}@"))
        finally:
            write_on_server(connection.engine, str(file), str(rules))
            connection.execute(text(f"DROP ROLE {role}"))
    server.dispose()


def write_on_server(server: Engine, file: str, content: str) -> None:
    """Write a file as the server's own user does, and have the server read its rules again."""
    with server.connect() as connection:
        made = connection.scalar(
            text("SELECT lo_from_bytea(0, convert_to(:content, 'UTF8'))"), {"content": content}
        )
        connection.execute(text("SELECT lo_export(:made, :file)"), {"made": made, "file": file})
        connection.execute(text("SELECT lo_unlink(:made)"), {"made": made})
        connection.execute(text("SELECT pg_reload_conf()"))


@pytest.fixture
def clock(db: Engine) -> Clock:
    """Move the database's clock: `now()` is found in a schema that comes before Postgres's own.

    Sessions opened from then on have the new time.
    """

    def travel(to: str) -> None:
        with db.begin() as connection:
            name, shift = connection.execute(
                text(
                    "SELECT current_database(),"
                    " CAST(CAST(:to AS timestamptz) - pg_catalog.now() AS text)"
                ),
                {"to": to},
            ).one()
            for setting, value in {
                "search_path": "clock, public, pg_catalog",
                "clock.shift": f"'{shift}'",
            }.items():
                connection.execute(text(f'ALTER DATABASE "{name}" SET {setting} = {value}'))
        _end_sessions(db)

    return travel


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of heartbeats on loopback."""
    with receiving() as listening:
        yield listening


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """An authority that nobody knows, unless SSL_CERT_FILE names its certificate."""
    return trustme.CA()


@pytest.fixture
def over_tls(receiver: Receiver, authority: trustme.CA) -> Iterator[str]:
    """The address of the receiver over TLS, with a certificate for it and collector.invalid."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "collector.invalid").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        server = context.wrap_socket(plain, server_side=True)

        def serve() -> None:
            while server.fileno() != -1:  # a handshake that fails ends an accept, not the server
                receiver.serve(server)

        Thread(target=serve, daemon=True).start()
        sender.tls_context.cache_clear()  # a new process reads its environment anew
        yield f"https://127.0.0.1:{server.getsockname()[1]}/v1/heartbeat"
        sender.tls_context.cache_clear()
        server.close()


@pytest.fixture
def over_ipv6(receiver: Receiver) -> Iterator[str]:
    """The address of the receiver on the loopback of IPv6."""
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        thread = Thread(target=receiver.serve, args=(server,))
        thread.start()
        yield f"http://[::1]:{server.getsockname()[1]}/v1/heartbeat"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def redis_url(embedded: servers.Servers | None) -> str:
    """A Redis without a key in it."""
    number = int(RUNNER.removeprefix("gw"))
    named = os.environ.get("TEST_REDIS_URL", "").removesuffix("/0").removesuffix("/")
    url = embedded.redis if embedded else f"{named}/{number}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def environment(
    database_url: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Telemetry under its small role, on, to the receiver, without the install's offset."""
    url = make_url(database_url).set(username=ROLE)
    variables = {
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "ENVIRONMENT": "production",
        "APP_VERSION": "0.2.0",
        "TELEMETRY_ENDPOINT": receiver.url,
        "TELEMETRY_SPREAD_SECONDS": "0",
        "TELEMETRY_TIMEOUT_SECONDS": "5",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def administered(environment: dict[str, str], database_url: str) -> dict[str, str]:
    """The same, for commands that need more rights than the pipeline."""
    return {**environment, "MIGRATION_DATABASE_URL": database_url}


@pytest.fixture
def pipeline(environment: dict[str, str]) -> Pipeline:
    """The pipeline of a worker that has just started."""
    assert environment
    return Pipeline(Settings.load())


@pytest.fixture
def processes(environment: dict[str, str], redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    """The Procfile's own processes, in the test's environment; all ended after the test."""
    running = Processes({**environment, "REDIS_URL": redis_url}, tmp_path)
    yield running
    running.end()
