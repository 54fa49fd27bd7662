"""Who this install is: ConsentOS's ``instance`` row, adopted as it is or made once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import Connection, case, delete, func, insert, select, text, update

from app.models import CURRENT_INSTANCE, INSTANCE
from app.schedule import CLOCKS_DIFFER

_THE_INSTANCE = CURRENT_INSTANCE.with_only_columns(INSTANCE.c.id, INSTANCE.c.last_telemetry_at)
_ALONE = text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry instance'))")


@dataclass(frozen=True)
class Identity:
    """The install's id, and when it last sent, by whatever program."""

    id: UUID
    last_telemetry_at: datetime | None


def find(connection: Connection) -> Identity | None:
    """Return who this install is, or None before its first heartbeat."""
    row = connection.execute(_THE_INSTANCE).one_or_none()
    return Identity(*row) if row else None


def ensure(connection: Connection) -> UUID:
    """Return the install's id, making it where there is none; two first boots make one."""
    if known := find(connection):
        return known.id
    connection.execute(_ALONE)
    if known := find(connection):
        return known.id
    made = insert(INSTANCE).values(id=uuid4(), created_at=func.now(), updated_at=func.now())
    return connection.execute(made.returning(INSTANCE.c.id)).scalar_one()


def ids(connection: Connection) -> Sequence[UUID]:
    """Return every id in the table, of whatever origin."""
    return connection.scalars(select(INSTANCE.c.id)).all()


def remove(connection: Connection) -> list[UUID]:
    """Delete the install's id, and those of the rows that came after it; return them all."""
    return [*connection.scalars(delete(INSTANCE).returning(INSTANCE.c.id))]


def stamp(connection: Connection, instance_id: UUID, at: datetime) -> None:
    """Record that this instance has delivered a heartbeat, in an attempt that began ``at``.

    The beginning lies within the heartbeat's own day; its answer may come in the next, and later
    than that of another attempt: what is stamped never goes back, unless it lies in the future.
    """
    later = func.greatest(INSTANCE.c.last_telemetry_at, at)
    ahead = INSTANCE.c.last_telemetry_at > func.now() + CLOCKS_DIFFER
    connection.execute(
        update(INSTANCE)
        .where(INSTANCE.c.id == instance_id)
        .values(last_telemetry_at=case((ahead, at), else_=later), updated_at=func.now())
    )
