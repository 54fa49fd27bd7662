"""The install's identity: ConsentOS's ``instance`` row, used as it is, or created once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import Connection, case, delete, func, insert, select, text, update

from app.models import CURRENT_INSTANCE, INSTANCE, last_telemetry_at
from app.schedule import CLOCKS_DIFFER

_THE_INSTANCE = CURRENT_INSTANCE.with_only_columns(
    INSTANCE.c.id, last_telemetry_at(CLOCKS_DIFFER).label("last_telemetry_at")
)
_ALONE = text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry instance'))")


@dataclass(frozen=True)
class Identity:
    """The install's id, and when any program last sent a heartbeat for it."""

    id: UUID
    last_telemetry_at: datetime | None


def find(connection: Connection) -> Identity | None:
    """Return the install's identity, or None if it has no row yet."""
    row = connection.execute(_THE_INSTANCE).one_or_none()
    return Identity(*row) if row else None


def ensure(connection: Connection) -> UUID:
    """Return the install's id, and create it if it is missing; two first boots create one."""
    if known := find(connection):
        return known.id
    connection.execute(_ALONE)
    if known := find(connection):
        return known.id
    made = insert(INSTANCE).values(id=uuid4(), created_at=func.now(), updated_at=func.now())
    return connection.execute(made.returning(INSTANCE.c.id)).scalar_one()


def ids(connection: Connection) -> Sequence[UUID]:
    """Return every id in the table."""
    return connection.scalars(select(INSTANCE.c.id)).all()


def remove(connection: Connection) -> list[UUID]:
    """Delete all rows, the install's and any later ones; return their ids."""
    return [*connection.scalars(delete(INSTANCE).returning(INSTANCE.c.id))]


def stamp(connection: Connection, instance_id: UUID, at: datetime) -> None:
    """Record that this instance has delivered a heartbeat, in an attempt that began ``at``.

    The beginning of an attempt lies in the heartbeat's own day; its answer may come in the next
    one, or after the answer to a later attempt. So a stored time is replaced only by a later one,
    unless the stored one lies in the future.
    """
    later = func.greatest(INSTANCE.c.last_telemetry_at, at)
    ahead = INSTANCE.c.last_telemetry_at > func.now() + CLOCKS_DIFFER
    connection.execute(
        update(INSTANCE)
        .where(INSTANCE.c.id == instance_id)
        .values(last_telemetry_at=case((ahead, at), else_=later), updated_at=func.now())
    )
