"""What this program's sessions ask of the database's server, of the network and of a pooler."""

import socket
from collections.abc import Iterator
from datetime import timedelta
from threading import Event

import pytest
from sqlalchemy import Connection, Engine, make_url, text
from sqlalchemy.exc import DBAPIError

from app import control, database
from app.pipeline import Pipeline
from app.settings import Settings
from demo.servers import Servers
from migrations import migrate
from tests.conftest import ROLE, Clock
from tests.support.database import give_notice, one, run
from tests.support.receiver import Receiver, answer
from tests.support.relay import relaying
from tests.support.steps import DAY_BEGINS

TIMEOUTS = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")


def note_timeouts(db: Engine, event: str) -> None:
    """Have Postgres note a session's time-outs at the first event of a kind."""
    run(db, "CREATE TABLE public.noted (name text PRIMARY KEY, value interval)")
    run(db, "GRANT SELECT, INSERT ON public.noted TO PUBLIC")
    run(
        db,
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.noted SELECT name, (setting || ' ms')::interval FROM pg_settings"
        f" WHERE name IN {TIMEOUTS} ON CONFLICT DO NOTHING;"
        " RETURN coalesce(NEW, OLD); END $$",
    )
    run(db, f"CREATE TRIGGER note BEFORE {event} FOR EACH ROW EXECUTE FUNCTION public.note()")


def noted(db: Engine) -> tuple[timedelta, ...]:
    """Return the time-outs that were noted, in the order of ``TIMEOUTS``."""
    with db.begin() as connection:
        found = connection.execute(text("TABLE public.noted")).all()
    values = {row.name: row.value for row in found}
    return tuple(values[name] for name in TIMEOUTS)


def test_a_session_of_the_pipeline_is_ended_when_it_is_idle_in_a_transaction(
    pipeline: Pipeline, clock: Clock, db: Engine
) -> None:
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    note_timeouts(db, "INSERT ON telemetry_outbox")
    assert pipeline.write_heartbeat()
    lock, statement, idle = noted(db)
    assert timedelta() < lock < statement < idle <= timedelta(minutes=1)


class CountingEvent(Event):
    """A request to stop that never comes; each wait for it counts the pipeline's sessions."""

    def __init__(self, db: Engine) -> None:
        super().__init__()
        self.sessions: list[int] = []
        self._db = db

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout
        ours = "datname = current_database() AND usename = :role"
        statement = f"SELECT count(*) FROM pg_stat_activity WHERE {ours}"
        self.sessions.append(one(self._db, statement, role=ROLE))
        return False


@pytest.mark.usefixtures("environment")
def test_no_session_is_open_during_the_wait_for_another_try(
    receiver: Receiver, clock: Clock, db: Engine
) -> None:
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    stopping = CountingEvent(db)
    pipeline = Pipeline(Settings.load(), stopping)
    assert pipeline.write_heartbeat()
    receiver.answers = [answer(503), answer(503), answer(202)]
    pipeline.drain()
    assert stopping.sessions == [0, 0]


@pytest.mark.parametrize("change", ["rotate", "forget"])
def test_rotate_and_forget_wait_for_the_outbox_longer_than_a_write_may_hold_it(
    pipeline: Pipeline, clock: Clock, db: Engine, change: str
) -> None:
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    note_timeouts(db, "INSERT ON telemetry_outbox")
    assert pipeline.write_heartbeat()
    _, write, _ = noted(db)
    run(db, "DROP TABLE public.noted; DROP FUNCTION public.note CASCADE")
    note_timeouts(db, "DELETE ON instance")
    control.rotate(db, enabled=True) if change == "rotate" else control.forget(db)
    lock, statement, _ = noted(db)
    assert write < lock < statement < timedelta(seconds=database.PATIENCE_OF_AN_OWNER)


def test_a_migration_waits_for_a_lock_but_not_without_end(db: Engine) -> None:
    note_timeouts(db, "DELETE ON telemetry_alembic_version")
    with db.connect() as connection:
        migrate(connection, "telemetry", "base")
    lock, _, _ = noted(db)
    assert timedelta(seconds=5) <= lock <= timedelta(minutes=1)


@pytest.fixture
def over_tcp(embedded: Servers | None, database_url: str) -> Iterator[Connection]:
    """A connection of the pipeline's kind, over TCP."""
    if embedded is None:
        pytest.skip("the server that TEST_DATABASE_URL names has an address of its own")
    url = make_url(database_url)
    with relaying(f"{url.query['host']}/.s.PGSQL.{url.query['port']}") as relay:
        relayed = url.set(host="127.0.0.1", port=relay.port, query={})
        made = database.engine(relayed.render_as_string(hide_password=False))
        with made.connect() as connection:
            yield connection


def test_a_server_that_vanished_is_noticed_within_half_a_minute(over_tcp: Connection) -> None:
    descriptor = over_tcp.connection.driver_connection.fileno()  # type: ignore[union-attr]  # it is connected
    with socket.socket(fileno=descriptor) as ours:
        asked = {
            name: ours.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        }
        alive = ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        ours.detach()
    assert alive == 1
    assert asked["TCP_KEEPIDLE"] + asked["TCP_KEEPINTVL"] * asked["TCP_KEEPCNT"] <= 30
    assert 0 < asked["TCP_USER_TIMEOUT"] <= 30_000


def test_no_statement_is_prepared_because_a_pooler_changes_sessions_between_transactions(
    database_url: str,
) -> None:
    with database.engine(database_url).connect() as connection:
        for _ in range(10):
            connection.execute(text("SELECT :number"), {"number": 1})
        prepared = connection.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
    assert prepared == 0


def test_an_error_of_the_database_repeats_no_parameter(database_url: str) -> None:
    own = database.engine(database_url)
    with own.connect() as connection, pytest.raises(DBAPIError) as failure:
        connection.execute(text("SELECT nothing, :secret"), {"secret": "correct horse"})
    assert "correct horse" not in str(failure.value)
