"""Connections to Postgres that give up on a frozen server.

Neither the server's time-outs nor those of TCP detect it: its connections stay open, but it does
not answer.
"""

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import URL, Engine, NullPool, QueuePool, create_engine, event

WITHIN_SECONDS = 2.0
"""A database that takes longer counts as one that does not answer."""

_T = TypeVar("_T")


class _Bounded(psycopg.Connection[Any]):
    patience = WITHIN_SECONDS

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        deadline = time.monotonic() + (timeout or self.patience)
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError:
            if time.monotonic() >= deadline:
                self.pgconn.finish()  # a late answer must not go to the next statement
            raise


def connect(url: str | URL, *, patience: float = WITHIN_SECONDS, kept: int = 0) -> Engine:
    """Return an engine whose server has ``patience`` seconds for each answer.

    It makes a new connection for each transaction, or has a pool of at most ``kept`` connections.
    """
    pool: dict[str, Any] = {"poolclass": NullPool}
    if kept:
        pool = {
            "poolclass": QueuePool,
            "pool_size": kept,
            "max_overflow": 0,
            "pool_timeout": patience,
        }
    made = create_engine(
        url,
        **pool,
        hide_parameters=True,
        use_native_hstore=False,  # otherwise each connection would query the type
        connect_args={"prepare_threshold": None, "connect_timeout": 2},
    )

    @event.listens_for(made, "do_connect")
    def bounded(_dialect: Any, _record: Any, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        connection = _Bounded.connect(*cargs, **cparams)
        connection.patience = patience
        return connection

    return made
