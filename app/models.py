"""The tables: ConsentOS's ``instance``, and the three of telemetry that migration 0001 makes.

Constraints, indexes and the trigger that freezes a row are written out in the migration; a test
compares the two.
"""

from datetime import date, datetime
from typing import Any, Literal, get_args
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, Identity, Text, cast, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import UserDefinedType

State = Literal["pending", "sending", "sent", "rejected", "expired", "discarded"]
STATES: tuple[State, ...] = get_args(State)
FINAL: tuple[State, ...] = ("sent", "rejected", "expired", "discarded")


class JsonText(UserDefinedType[str]):
    """Postgres ``json`` kept as the text it is: psycopg would make a dict of it."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the type's name in DDL."""
        return "JSON"

    def column_expression(self, column: ColumnElement[str]) -> ColumnElement[str]:
        """Read the column as text, byte for byte what was stored."""
        return cast(column, Text)


class Base(DeclarativeBase):
    """The metadata of all tables."""

    type_annotation_map = {datetime: DateTime(timezone=True), str: Text}  # noqa: RUF012 - SQLAlchemy's own way


class Instance(Base):
    """ConsentOS's own table: who this install is. Never altered, only read, inserted, stamped."""

    __tablename__ = "instance"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    last_telemetry_at: Mapped[datetime | None]


CURRENT_INSTANCE = select(Instance).order_by(Instance.created_at, Instance.id).limit(1)
"""One row by convention, not by constraint: where there are several, the oldest is the instance."""


class Notice(Base):
    """When the operator was told what a payload schema sends."""

    __tablename__ = "telemetry_notice"

    schema: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    noticed_at: Mapped[datetime]


class OutboxRow(Base):
    """One day's heartbeat: its body never changes, its state moves to a final one."""

    __tablename__ = "telemetry_outbox"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(unique=True)
    instance_id: Mapped[UUID]
    payload: Mapped[str] = mapped_column(JsonText())
    state: Mapped[State] = mapped_column(Text)
    drains: Mapped[int]
    attempts: Mapped[int]
    created_at: Mapped[datetime]
    next_attempt_at: Mapped[datetime]
    not_before: Mapped[datetime | None]
    expires_at: Mapped[datetime]
    lease_token: Mapped[UUID | None]
    lease_until: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    last_error: Mapped[str | None]


class Attempt(Base):
    """One POST, recorded before it starts; without an outcome the process died in it."""

    __tablename__ = "telemetry_attempt"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    outbox_id: Mapped[UUID]
    n: Mapped[int]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    http_status: Mapped[int | None]
    error: Mapped[str | None]
    endpoint: Mapped[str]
    duration_ms: Mapped[int | None]
