"""What the operator asks to see: read-only, in one transaction each."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection

from app import database, grants, instance, log, notice, outbox, payload, verification
from app.instance import Identity
from app.outbox import Record
from app.pipeline import CollectError, Pipeline, collect
from app.schedule import OPENS_AT, OVERDUE_AFTER, Obstacle, obstacle, offset, running_day
from app.settings import Disabled, Enabled
from app.verification import Problem


@dataclass(frozen=True)
class Status:
    """What an operator asks first: is it on, what happened last, and what comes next."""

    enabled: bool
    reason: str | None
    warnings: tuple[str, ...]
    endpoint: str
    version: str
    edition: str
    schedule: str
    instance_id: UUID | None
    noticed_at: datetime | None
    last_success: datetime | None
    next_send: datetime | None
    pending: list[Record]
    last_error: Record | None
    overdue: bool
    cannot_write: str | None
    excess_rights: list[str]


@dataclass(frozen=True)
class Preview:
    """The body that would be written now, and what it is to be read beside."""

    body: str
    instance_known: bool
    last_sent: Record | None = None


@dataclass(frozen=True)
class Verification:
    """How much was looked at, and what is not as it should be."""

    rows: int
    attempts: int
    logged: int | None
    problems: list[Problem]


def preview(pipeline: Pipeline, *, beside_last_sent: bool = False) -> Preview:
    """Return the body that would be written now, and the last that was sent where it is asked for.

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
        last = outbox.last_sent(connection) if beside_last_sent else None
    return Preview(heartbeat.canonical(), instance_known=known is not None, last_sent=last)


def audit(pipeline: Pipeline) -> list[Record]:
    """Return the whole outbox, the newest day first, each row with its attempts as ``tries``."""
    with pipeline.transaction(read_only=True) as connection:
        return _rows(connection)


def _rows(connection: Connection) -> list[Record]:
    tries: dict[UUID, list[Record]] = defaultdict(list)
    for each in outbox.attempts(connection):
        tries[each["outbox_id"]].append(each)
    return [{**row, "tries": tries[row["id"]]} for row in outbox.rows(connection)]


def verify(
    pipeline: Pipeline, log_lines: Iterable[str] | None, *, since: date | None
) -> Verification:
    """Check the rows of ``since`` and later, and a log against them where its lines are given."""
    with pipeline.transaction(read_only=True) as connection:
        rows = [row for row in _rows(connection) if since is None or row["day"] >= since]
        frozen = outbox.frozen(connection)
    problems = [] if frozen else [Problem(verification.NOT_FROZEN)]
    problems += verification.of_rows(rows)
    bodies = None
    if log_lines is not None:
        bodies = list(verification.logged(log_lines))
        if since:
            bodies = list(verification.since(since, bodies))
        problems += verification.of_log(rows, bodies)
    return Verification(
        rows=len(rows),
        attempts=sum(len(row["tries"]) for row in rows),
        logged=len(bodies) if bodies is not None else None,
        problems=problems,
    )


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
        excess = grants.excess(connection)
        # Last, for a failure ends the transaction.
        due = enabled and hurdle is None
        cannot_write = _why_it_cannot_be_written(connection, pipeline) if due else None
    return Status(
        enabled=enabled,
        reason=gate.reason if isinstance(gate, Disabled) else None,
        warnings=settings.warnings,
        endpoint=settings.endpoint_without_query,
        version=settings.app_version,
        edition=settings.edition,
        schedule=f"daily at {OPENS_AT:%H:%M} UTC",
        instance_id=known.id if known else None,
        noticed_at=noticed_at,
        last_success=known.last_telemetry_at if known else None,
        next_send=_next_send(pipeline, now, known, pending, hurdle) if enabled else None,
        pending=pending,
        last_error=last_error,
        overdue=due and now >= day.opens + OVERDUE_AFTER,
        cannot_write=cannot_write,
        excess_rights=excess,
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
