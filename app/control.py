"""What an operator changes by hand: the install's id, and the records under it.

``rotate`` and ``forget`` need more rights than the pipeline has. They lock the outbox, so that they
also affect a heartbeat that is being written and an attempt that is about to begin.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from app import database, instance, notice, outbox, payload, sender
from app.schedule import believed
from app.settings import Settings


@dataclass(frozen=True)
class Rotated:
    """The former ids, the new one, and the days affected."""

    former: list[UUID]
    current: UUID | None
    discarded: list[date]
    in_flight: list[date]


@dataclass(frozen=True)
class Forgotten:
    """Every id that was on record, what was deleted with them, and the days that are being sent."""

    former: list[UUID]
    heartbeats: int
    attempts: int
    in_flight: list[date]


def rotate(engine: Engine, *, enabled: bool) -> Rotated:
    """Replace the install's id, and discard what is pending under the former one.

    While telemetry is off no new id is created; the first heartbeat after that creates it. The new
    row takes over when the install last sent, because a day has one heartbeat, whatever the id.
    """
    with _outbox_locked(engine) as connection:
        known = instance.find(connection)
        former = instance.remove(connection)
        current = instance.ensure(connection) if known and enabled else None
        sent_at = believed(known.last_telemetry_at, database.clock(connection)) if known else None
        if sent_at and current:
            instance.stamp(connection, current, sent_at)
        discarded = outbox.discard_all(connection)
        in_flight = _in_flight(connection)
    return Rotated(former, current, [row.day for row in discarded], in_flight)


class NotErasedError(Exception):
    """The receiver did not confirm a deletion; nothing has been deleted here."""

    def __init__(self, instance_id: UUID, why: str) -> None:
        """Name the id, and the receiver's answer or why there was no answer."""
        super().__init__(
            f"The receiver did not confirm that it has deleted {instance_id} ({why}). Nothing is"
            " deleted here, so that no id is lost: try again, or leave out --remote."
        )


def erase(engine: Engine, settings: Settings) -> list[UUID]:
    """Have the receiver delete everything under each id on record; return the ids.

    The receiver is the one that TELEMETRY_ENDPOINT names now. It is asked even if telemetry is off,
    because the operator asks, not the pipeline.

    Raises:
        SettingsError: the settings name no usable endpoint; no receiver is asked.
        NotErasedError: the receiver did not confirm the deletion of an id.
    """
    endpoint = settings.require_endpoint()
    with database.transaction(engine.connect(), read_only=True) as connection:
        ids = sorted({*instance.ids(connection), *outbox.instance_ids(connection)})
    target = sender.Target(
        endpoint=endpoint,
        schema=payload.SCHEMA_VERSION,
        timeout=settings.telemetry_timeout_seconds,
        proxy=settings.proxy,
    )
    for each in ids:
        outcome = sender.erase(target, each)
        if outcome.result != "sent":
            raise NotErasedError(each, outcome.error or f"HTTP {outcome.status}")
    return ids


def forget(engine: Engine) -> Forgotten:
    """Delete the install's id and all records of its heartbeats.

    The record of the notice is deleted too. So the notice is given again, and no heartbeat is
    written for a 02:30 before that: the day of a forgotten heartbeat gets no second one.
    """
    with _outbox_locked(engine) as connection:
        in_flight = _in_flight(connection)
        known = instance.remove(connection)
        heartbeats, attempts = outbox.remove(connection)
        notice.remove(connection)
    return Forgotten(sorted({*known, *heartbeats}), len(heartbeats), attempts, in_flight)


def _in_flight(connection: Connection) -> list[date]:
    return [row["day"] for row in outbox.unfinished(connection) if row["state"] == "sending"]


@contextmanager
def _outbox_locked(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that holds the exclusive lock on the outbox, after a wait for writers."""
    with database.transaction(engine.connect()) as connection:
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(text("SET LOCAL statement_timeout = '15s'"))
        outbox.lock_exclusive(connection)
        yield connection
