"""Connections to Postgres that hold nothing while idle, and errors told without a value in them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime

import psycopg
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

_CLOCK = "consentos-telemetry clock"

_BEGIN = text(
    "SELECT now(),"
    " set_config('statement_timeout', '5s', true),"
    " set_config('lock_timeout', '1s', true),"
    " set_config('idle_in_transaction_session_timeout', '30s', true),"
    # What has left is on record though the server crashes, whatever else may be lost in a crash.
    " set_config('synchronous_commit', coalesce("
    "nullif(current_setting('synchronous_commit'), 'off'), 'local'), true),"
    # psycopg reads times as these say, whatever the database's own settings are.
    " set_config('TimeZone', 'UTC', true),"
    " set_config('DateStyle', 'ISO', true),"
    " set_config('IntervalStyle', 'postgres', true)"
)


def engine(url: str) -> Engine:
    """Return an engine that connects for each transaction and lets go after it.

    Raises:
        sqlalchemy.exc.ArgumentError: ``url`` cannot be parsed.
    """
    return create_engine(
        url,
        poolclass=NullPool,
        # Waiting for a lock and then looking again sees what its holder has committed.
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


def alive(connection: Connection) -> Connection:
    """Return a shared connection; one that has died since its last use is made anew."""
    if _CLOCK not in connection.info:
        return connection
    try:
        live = connection.connection.dbapi_connection
        connection.dialect.do_ping(live)  # type: ignore[arg-type]  # None once it is closed
    except psycopg.Error:
        connection.invalidate()
    return connection


@contextmanager
def transaction(
    connecting: AbstractContextManager[Connection], *, read_only: bool = False
) -> Iterator[Connection]:
    """Open a transaction whose statements and lock waits are bounded; commit it at the end.

    ``connecting`` gives the connection, and may have opened it: enter what is returned at once. A
    transaction that is read-only sees the database as of one moment.
    """
    with connecting as connection, connection.begin():
        if read_only:
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        connection.info[_CLOCK] = connection.execute(_BEGIN).one()[0]
        yield connection


def clock(connection: Connection) -> datetime:
    """Return the database's time, the only one that decides about a day or a lease.

    It is that of the beginning of the transaction, as Postgres's own ``now()`` is.
    """
    at: datetime = connection.info[_CLOCK]
    return at
