"""The collector's only SQL: each heartbeat once, and nothing about who sent it."""

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from app.payload import Heartbeat

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUND = text("SET LOCAL statement_timeout = '5s'")

_INSERT = text("""
    INSERT INTO heartbeat (instance_id, sent_at, body)
    VALUES (CAST(:instance_id AS uuid), CAST(:sent_at AS timestamptz), CAST(:body AS jsonb))
    ON CONFLICT (instance_id, sent_at) DO NOTHING
""")


def connect(url: str) -> Engine:
    """Return an engine of at most five connections that gives up on a silent server.

    Nothing is connected yet, and no error of the engine's repeats a parameter.
    """
    return create_engine(
        url,
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"prepare_threshold": None, "connect_timeout": 5, "tcp_user_timeout": 10_000},
    )


def insert(engine: Engine, heartbeat: Heartbeat) -> None:
    """Commit ``heartbeat``, or nothing if it is there already.

    Raises:
        SQLAlchemyError: the database did not take it; whether it is stored is not known.
    """
    row = {
        "instance_id": heartbeat.instance_id,
        "sent_at": heartbeat.sent_at,
        "body": heartbeat.canonical(),
    }
    with engine.begin() as connection:
        connection.execute(_BOUND)
        connection.execute(_INSERT, row)


def cause(error: SQLAlchemyError) -> str:
    """Name what went wrong, without the message: it may hold hosts, users or values."""
    return type(getattr(error, "orig", None) or error).__name__
