"""What the operator asks to see: read-only, in one transaction each."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection

from app import database, instance, log, notice, outbox, payload
from app.instance import Identity
from app.outbox import Record
from app.pipeline import CollectError, Pipeline, collect
from app.schedule import OPENS_AT, OVERDUE_AFTER, Obstacle, obstacle, offset, running_day
from app.settings import Disabled, Enabled


@dataclass(frozen=True)
class Status:
    """What an operator asks first: is it on, what happened last, and what comes next."""

    enabled: bool
    reason: str | None
    warnings: tuple[str, ...]
    endpoint: str
    schedule: str
    instance_id: UUID | None
    noticed_at: datetime | None
    last_success: datetime | None
    next_send: datetime | None
    pending: list[Record]
    last_error: Record | None
    overdue: bool
    cannot_write: str | None


def preview(pipeline: Pipeline) -> tuple[str, bool]:
    """Return the body that would be written now, and whether its instance exists yet.

    It stores nothing and sends nothing, and reads whether telemetry is on or off.

    Raises:
        CollectError: ConsentOS's tables cannot be counted.
    """
    with pipeline.transaction(read_only=True) as connection:
        known = instance.find(connection)
        heartbeat = payload.compose(
            collect(connection, pipeline.settings),
            instance_id=known.id if known else payload.NIL_INSTANCE,
            at=database.clock(connection),
        )
    return heartbeat.canonical(), known is not None


def audit(pipeline: Pipeline) -> list[Record]:
    """Return the whole outbox, the newest day first, each row with its attempts as ``tries``."""
    with pipeline.transaction(read_only=True) as connection:
        attempts = outbox.attempts(connection)
        rows = outbox.rows(connection)
    for row in rows:
        row["tries"] = [each for each in attempts if each["outbox_id"] == row["id"]]
    return rows


def status(pipeline: Pipeline) -> Status:
    """Return the state of things, as of one moment."""
    settings, gate = pipeline.settings, pipeline.settings.gate
    enabled = isinstance(gate, Enabled)
    with pipeline.transaction(read_only=True) as connection:
        now = database.clock(connection)
        day = running_day(now)
        known = instance.find(connection)
        noticed_at = notice.given_at(connection, payload.SCHEMA_VERSION)
        pending = outbox.unfinished(connection)
        last_error = outbox.last_failure(connection)
        hurdle = obstacle(
            day,
            written=outbox.has_day(connection, day.date),
            last_telemetry_at=known.last_telemetry_at if known else None,
            noticed_at=noticed_at,
        )
        # Last, for a failure ends the transaction.
        due = enabled and hurdle is None
        cannot_write = _why_it_cannot_be_written(connection, pipeline) if due else None
    return Status(
        enabled=enabled,
        reason=gate.reason if isinstance(gate, Disabled) else None,
        warnings=settings.warnings,
        endpoint=settings.endpoint_without_query,
        schedule=f"daily at {OPENS_AT:%H:%M} UTC",
        instance_id=known.id if known else None,
        noticed_at=noticed_at,
        last_success=known.last_telemetry_at if known else None,
        next_send=_next_send(pipeline, now, known, pending, hurdle) if enabled else None,
        pending=pending,
        last_error=last_error,
        overdue=due and now >= day.opens + OVERDUE_AFTER,
        cannot_write=cannot_write,
    )


def _why_it_cannot_be_written(connection: Connection, pipeline: Pipeline) -> str | None:
    """Return what keeps ConsentOS's tables from being counted, or None where nothing does."""
    try:
        collect(connection, pipeline.settings)
    except CollectError as error:
        return log.cause(error)
    return None


def _next_send(
    pipeline: Pipeline,
    now: datetime,
    known: Identity | None,
    pending: list[Record],
    hurdle: Obstacle | None,
) -> datetime:
    """Return when a heartbeat leaves next: now if one is due and merely not written yet."""
    waiting: list[datetime] = [row["next_attempt_at"] for row in pending if row["expires_at"] > now]
    if waiting:
        return max(min(waiting), now)
    spread = pipeline.settings.telemetry_spread_seconds
    second = offset(known.id, spread) if known else timedelta()
    day = running_day(now)
    return max(now, day.opens + second) if hurdle is None else day.closes + second
