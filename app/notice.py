"""The operator is told what a payload schema sends before a heartbeat of it is ever written."""

from datetime import datetime

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.postgresql import insert

from app.models import Notice


def given_at(connection: Connection, schema: int) -> datetime | None:
    """Return when the notice for ``schema`` was logged, or None where it has not been."""
    return connection.scalar(select(Notice.noticed_at).where(Notice.schema == schema))


def record(connection: Connection, schema: int) -> bool:
    """Record that the notice is given now; False where another process was first."""
    statement = (
        insert(Notice)
        .values(schema=schema, noticed_at=func.now())
        .on_conflict_do_nothing()
        .returning(Notice.schema)
    )
    return connection.scalar(statement) is not None
