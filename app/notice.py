"""The record of notices. The notice of a payload schema is logged before its first heartbeat."""

from datetime import datetime

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.postgresql import insert

from app.models import NOTICE
from app.schedule import CLOCKS_DIFFER


def given_at(connection: Connection, schema: int) -> datetime | None:
    """Return when the notice for ``schema`` was logged, or None if it has not been."""
    return connection.scalar(select(NOTICE.c.noticed_at).where(NOTICE.c.schema == schema))


def record(connection: Connection, schema: int) -> bool:
    """Record that the notice is given now; return False if another process was first.

    A recorded time that lies in the future is replaced.
    """
    statement = (
        insert(NOTICE)
        .values(schema=schema, noticed_at=func.now())
        .on_conflict_do_update(
            index_elements=[NOTICE.c.schema],
            set_={"noticed_at": func.now()},
            where=NOTICE.c.noticed_at > func.now() + CLOCKS_DIFFER,
        )
        .returning(NOTICE.c.schema)
    )
    return connection.scalar(statement) is not None


def remove(connection: Connection) -> None:
    """Delete the record of all notices: each is given again, as on a new install."""
    connection.execute(delete(NOTICE))
