"""Connections to Postgres, none of which is held while idle, and transactions with time limits.

Errors are reported without the values of their statements.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from time import monotonic
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from app.advice import advise_on_rights, advise_on_tables

_CLOCK = "consentos-telemetry clock"

_T = TypeVar("_T")

PATIENCE = 6.0
"""Seconds that the server has for each answer: one more than a statement of the pipeline has."""

PATIENCE_OF_AN_OWNER = 60.0
"""The same for a command that changes tables or waits for a lock on the outbox."""

_BEGIN = text(
    "SELECT now(),"
    " set_config('statement_timeout', '5s', true),"
    " set_config('lock_timeout', '1s', true),"
    # Rows that a policy hides would not be counted: with this, Postgres reports an error instead.
    " set_config('row_security', 'off', true),"
    " set_config('idle_in_transaction_session_timeout', '30s', true),"
    # The record of what was sent must survive a crash of the server.
    " set_config('synchronous_commit', coalesce("
    "nullif(current_setting('synchronous_commit'), 'off'), 'local'), true),"
    # psycopg can parse times only in these formats.
    " set_config('TimeZone', 'UTC', true),"
    " set_config('DateStyle', 'ISO', true),"
    " set_config('IntervalStyle', 'postgres', true)"
)

_READ_ONLY = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


class _Bounded(psycopg.Connection[Any]):
    """A connection whose every exchange has a deadline.

    A frozen server, or a proxy that keeps a dead connection open, never answers, and neither the
    server's time-outs nor TCP's notice that.
    """

    patience = PATIENCE

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Wait for the server as psycopg does, but at most ``patience`` seconds."""
        deadline = monotonic() + (timeout or self.patience)
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError:
            if monotonic() >= deadline:
                self.pgconn.finish()  # a late answer would be read as that of the next statement
            raise


def engine(url: str, *, patience: float = PATIENCE) -> Engine:
    """Return an engine that opens a connection when asked for one, and keeps none.

    ``patience`` is how many seconds the server has for each answer.

    Raises:
        sqlalchemy.exc.ArgumentError: ``url`` cannot be parsed.
    """
    made = create_engine(
        url,
        poolclass=NullPool,
        # After a wait for a lock, the next statement sees what the lock's holder has committed.
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        use_native_hstore=False,
        connect_args={
            "application_name": "consentos-telemetry",
            "client_encoding": "utf8",
            "connect_timeout": 5,
            # A server that vanished is noticed within half a minute, sending or waiting.
            "tcp_user_timeout": 15_000,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # A pooler such as PgBouncer hands the next transaction to another server session.
            "prepare_threshold": None,
        },
    )

    @event.listens_for(made, "do_connect")
    def connect(_dialect: Any, _record: Any, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        bounded = _Bounded.connect(*cargs, **cparams)
        bounded.patience = patience
        return bounded

    return made


@contextmanager
def transaction(
    connecting: AbstractContextManager[Connection], *, read_only: bool = False
) -> Iterator[Connection]:
    """Open a transaction whose statements and lock waits have time limits; commit it at the end.

    ``connecting`` gives the connection and closes it at the end if it must be closed. A read-only
    transaction sees the database as of one moment.
    """
    with connecting as connection:
        try:
            with connection.begin():
                if read_only:
                    connection.execute(_READ_ONLY)
                connection.info[_CLOCK] = connection.execute(_BEGIN).one()[0]
                yield connection
        except DBAPIError as error:
            advise_on_tables(connection, error)
            raise


def clock(connection: Connection) -> datetime:
    """Return the database's time. No other clock decides about a day or a lease.

    It is the time at which the transaction began, like Postgres's ``now()``.
    """
    at: datetime = connection.info[_CLOCK]
    return at


class Link:
    """The pipeline's connection to Postgres, for transactions that follow one another.

    It is opened at once. After ``close``, the next transaction opens it again.
    """

    def __init__(self, engine: Engine) -> None:
        """Connect."""
        self._engine = engine
        self._connection: Connection | None = engine.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: before a POST, before a wait, and at the end."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Connection]:
        """Open a transaction, as the function of that name does."""
        live = self._live()
        try:
            with transaction(nullcontext(live), read_only=read_only) as connection:
                yield connection
        except DBAPIError as error:
            advise_on_rights(error.orig)
            raise

    def _live(self) -> Connection:
        """Return the connection, opened again if it was closed or has died since its last use."""
        if self._connection is None:
            self._connection = self._engine.connect()
        elif _CLOCK in self._connection.info:
            _reopen_if_dead(self._connection)
        return self._connection


def _reopen_if_dead(connection: Connection) -> None:
    try:
        live = connection.connection.dbapi_connection
        connection.dialect.do_ping(live)  # type: ignore[arg-type]  # None once it is closed
    except psycopg.Error:
        connection.invalidate()
