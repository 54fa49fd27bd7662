"""The tables: ConsentOS's ``instance``, and the three of telemetry that the migrations create.

The migrations also define constraints, indexes and the trigger that freezes a row; a test compares
the two. These are tables, not ORM classes, because the ORM would add 6 MB to each process.
"""

from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Column,
    DateTime,
    MetaData,
    Named,
    ScalarSelect,
    Table,
    Text,
    TypedColumns,
    cast,
    func,
    select,
)
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import UserDefinedType


class State(StrEnum):
    """The states of a row in the outbox."""

    PENDING = "pending"
    SENDING = "sending"
    SENT = "sent"
    REJECTED = "rejected"
    EXPIRED = "expired"
    DISCARDED = "discarded"


STATES = tuple(State)
OPEN = (State.PENDING, State.SENDING)
FINAL = (State.SENT, State.REJECTED, State.EXPIRED, State.DISCARDED)

_TIME = DateTime(timezone=True)


class JsonText(UserDefinedType[str]):
    """Postgres ``json``, read as the stored text. psycopg would return a dict."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the type's name for DDL."""
        return "JSON"

    def column_expression(self, column: ColumnElement[str]) -> ColumnElement[str]:
        """Read the column as text, exactly as stored."""
        return cast(column, Text)


METADATA = MetaData()


class InstanceColumns(TypedColumns):
    """ConsentOS's own table of the install's identity; the pipeline never alters the table."""

    id: Named[UUID] = Column(primary_key=True)
    created_at: Named[datetime] = Column(_TIME)
    updated_at: Named[datetime] = Column(_TIME)
    last_telemetry_at: Named[datetime | None] = Column(_TIME)


class NoticeColumns(TypedColumns):
    """When the notice of each payload schema was logged for the operator."""

    schema: Named[int] = Column(primary_key=True, autoincrement=False)
    noticed_at: Named[datetime] = Column(_TIME)


class OutboxColumns(TypedColumns):
    """One day's heartbeat. Its body never changes; its state moves to a final one."""

    id: Named[UUID] = Column(primary_key=True)
    day: Named[date] = Column(unique=True)
    instance_id: Named[UUID]
    payload: Named[str] = Column(JsonText())
    state: Named[str] = Column(Text)
    drains: Named[int]
    attempts: Named[int]
    created_at: Named[datetime] = Column(_TIME)
    next_attempt_at: Named[datetime] = Column(_TIME)
    not_before: Named[datetime | None] = Column(_TIME)
    expires_at: Named[datetime] = Column(_TIME)
    lease_token: Named[UUID | None]
    lease_until: Named[datetime | None] = Column(_TIME)
    finished_at: Named[datetime | None] = Column(_TIME)
    last_error: Named[str | None] = Column(Text)
    host_revision: Named[str | None] = Column(Text)


class AttemptColumns(TypedColumns):
    """One POST, recorded before it starts; it has no outcome if the process died during it."""

    outbox_id: Named[UUID] = Column(primary_key=True)
    n: Named[int] = Column(primary_key=True, autoincrement=False)
    started_at: Named[datetime] = Column(_TIME)
    finished_at: Named[datetime | None] = Column(_TIME)
    outcome: Named[str | None] = Column(Text)
    http_status: Named[int | None]
    error: Named[str | None] = Column(Text)
    endpoint: Named[str] = Column(Text)
    duration_ms: Named[int | None]


INSTANCE = Table("instance", METADATA, InstanceColumns)
NOTICE = Table("telemetry_notice", METADATA, NoticeColumns)
OUTBOX = Table("telemetry_outbox", METADATA, OutboxColumns)
ATTEMPT = Table("telemetry_attempt", METADATA, AttemptColumns)

CURRENT_INSTANCE = select(INSTANCE).order_by(INSTANCE.c.created_at, INSTANCE.c.id).limit(1)
"""There is one row by convention, not by constraint. If there are several, the oldest counts."""


def last_telemetry_at(tolerance: timedelta) -> ScalarSelect[datetime | None]:
    """Return when the install last sent, by any row's stamp, because ConsentOS may stamp another.

    A time that is further ahead than ``tolerance`` counts only if there is no other.
    """
    stamp = INSTANCE.c.last_telemetry_at
    believed = func.max(stamp).filter(stamp <= func.now() + tolerance)
    return select(func.coalesce(believed, func.max(stamp))).scalar_subquery()
