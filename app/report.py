"""The answers to an operator's questions: each is read in one read-only transaction."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from app import (
    __version__,
    database,
    grants,
    instance,
    log,
    logfile,
    outbox,
    payload,
    receiver,
    verification,
    wakeups,
)
from app.outbox import Record, Wanted
from app.pipeline import (
    CollectError,
    Outlook,
    Pipeline,
    collect,
    host_revision,
    look,
    stale_version,
)
from app.schedule import OPENS_AT, OVERDUE_AFTER, Day, believed, offset
from app.settings import Disabled, Enabled
from app.verification import Confirmed, Here, Problem, There


@dataclass(frozen=True)
class Status:
    """What an operator asks first: is it on, what happened last, and what comes next."""

    release: str
    """This program's release; `version` is ConsentOS's."""
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
    lacking_rights: list[str]
    excess_rights: list[str]
    redis_trouble: str | None
    last_sweep_seconds_ago: int | None


@dataclass(frozen=True)
class Preview:
    """The body that would be written now, and the last one sent, to compare it with."""

    body: str
    instance_known: bool
    last_sent: Record | None = None


@dataclass(frozen=True)
class Listed:
    """The rows that were asked for, and how many more there are beyond the limit."""

    rows: list[Record]
    more: int


@dataclass(frozen=True)
class Verification:
    """How much was checked, and the problems found."""

    rows: int
    attempts: int
    logged: int | None
    too_long: list[int]
    problems: list[Problem]
    remote: Confirmed | None


def preview(pipeline: Pipeline, *, with_last_sent: bool = False) -> Preview:
    """Return the body that would be written now, and on request the last row sent.

    Stores nothing and sends nothing. Works whether telemetry is on or off.

    Raises:
        CollectError: ConsentOS's tables cannot be counted.
    """
    with pipeline.transaction(read_only=True) as connection:
        known = instance.find(connection)
        host_revision(connection)
        heartbeat = payload.compose(
            collect(connection, pipeline.settings),
            instance_id=known.id if known else payload.NIL_INSTANCE,
            at=database.clock(connection),
        )
        last = outbox.last_sent(connection) if with_last_sent else None
    return Preview(heartbeat.canonical(), instance_known=known is not None, last_sent=last)


def audit(pipeline: Pipeline, wanted: Wanted = outbox.ALL) -> Listed:
    """Return the wanted rows, the newest day first, each with its attempts."""
    with pipeline.transaction(read_only=True) as connection:
        rows = outbox.rows(connection, wanted)
        return Listed(rows, outbox.count(connection, wanted) - len(rows))


def ids(pipeline: Pipeline) -> list[UUID]:
    """Return every stored id: the instance's, and those of all heartbeats."""
    with pipeline.transaction(read_only=True) as connection:
        return sorted({*instance.ids(connection), *outbox.instance_ids(connection)})


def ask(
    pipeline: Pipeline,
    instance_ids: list[UUID],
    *,
    since: date | None,
    show: Callable[[str], object],
) -> There:
    """Ask the receiver what it holds under each id, of ``since`` and later.

    ``show`` receives a sentence if the receiver makes the operator wait.

    Raises:
        SettingsError: the endpoint is invalid, so no receiver was asked.
        receiver.ReceiverError: the receiver did not answer what it holds.
    """
    with pipeline.transaction(read_only=True) as connection:
        rows = outbox.rows(connection, Wanted(since=since))
    # A row that is sent after this moment may be missing in the answer.
    sent = {row["id"] for row in rows if verification.was_sent(row)}
    settings = pipeline.settings
    after = (Day(since).opens - timedelta(seconds=1)).isoformat() if since else None
    holdings = receiver.ask(settings, instance_ids, after, show)
    return There(settings.endpoint_without_query, holdings, sent)


def verify(
    pipeline: Pipeline,
    log_file: logfile.Stream | None,
    *,
    since: date | None,
    there: There | None = None,
) -> Verification:
    """Check the rows of ``since`` and later.

    With ``log_file``, compares the log with them; with ``there``, what the receiver holds.
    """
    with pipeline.transaction(read_only=True) as connection:
        rows = outbox.rows(connection, Wanted(since=since))
        frozen = outbox.frozen(connection)
        now = database.clock(connection)
    problems = [] if frozen else [Problem(verification.NOT_FROZEN)]
    problems += verification.of_rows(rows)
    logged, remote = None, None
    if log_file is not None:
        held = there.bodies if there else None
        logged = verification.of_log(rows, logfile.read(log_file), since=since, held=held)
        problems += logged.problems
    if there is not None:
        days = pipeline.settings.telemetry_retention_days
        here = Here(
            now,
            retention=timedelta(days=days) if days else None,
            since=since,
            logged=logged.bodies if logged else None,
        )
        remote, found = verification.of_receiver(rows, there, here)
        problems += found
    return Verification(
        rows=len(rows),
        attempts=sum(len(row["tries"]) for row in rows),
        logged=logged.logged if logged else None,
        too_long=logged.too_long if logged else [],
        problems=problems,
        remote=remote,
    )


def status(pipeline: Pipeline) -> Status:
    """Return the current status, read at one moment."""
    settings, gate = pipeline.settings, pipeline.settings.gate
    enabled = isinstance(gate, Enabled)
    with pipeline.transaction(read_only=True) as connection:
        seen = look(connection)
        pending = outbox.unfinished(connection)
        last_error = outbox.last_failure(connection)
        last_sent = outbox.last_sent(connection)
        excess = grants.excess(connection)
        lacking = grants.lacking(connection)
        read_only = bool(connection.scalar(_READ_ONLY))
        due = enabled and seen.obstacle is None
        # Last, because a failure ends the transaction.
        stale, cannot_write = _as_it_would_be_written(connection, pipeline, due=due)
    if due and not cannot_write:
        cannot_write = _why_not_stored(lacking, read_only=read_only)
    waking = wakeups.look(settings)
    # A restart of the process does not help if the database or Redis is the cause.
    elsewhere = cannot_write or (settings.redis_url and waking.trouble)
    sent_at = last_sent["finished_at"] if last_sent else None
    return Status(
        release=__version__,
        enabled=enabled,
        reason=gate.reason if isinstance(gate, Disabled) else None,
        warnings=(*settings.warnings, *seen.ahead, *stale),
        endpoint=settings.endpoint_without_query,
        version=settings.app_version,
        edition=settings.edition,
        schedule=f"daily at {OPENS_AT:%H:%M} UTC",
        instance_id=seen.known.id if seen.known else None,
        noticed_at=believed(seen.noticed_at, seen.now),
        last_success=believed(seen.last_telemetry_at, seen.now) or believed(sent_at, seen.now),
        next_send=_next_send(pipeline, seen, pending) if enabled else None,
        pending=pending,
        last_error=last_error,
        overdue=due and not elsewhere and seen.now >= seen.day.opens + OVERDUE_AFTER,
        cannot_write=cannot_write,
        lacking_rights=lacking,
        excess_rights=excess,
        redis_trouble=waking.trouble,
        last_sweep_seconds_ago=(
            int(waking.swept_ago.total_seconds()) if waking.swept_ago is not None else None
        ),
    )


_READ_ONLY = text(
    "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean"
)


def _why_not_stored(lacking: list[str], *, read_only: bool) -> str | None:
    """Return why a heartbeat could be counted but not stored, or None."""
    if read_only:
        return "the database is read-only"
    return f"the role lacks rights on {', '.join(lacking)}" if lacking else None


def _as_it_would_be_written(
    connection: Connection, pipeline: Pipeline, *, due: bool
) -> tuple[tuple[str, ...], str | None]:
    """Return warnings about ConsentOS's version, and why its tables cannot be counted.

    Counts the tables only if a heartbeat is due, and reads none while telemetry is off.
    """
    stale = None
    if isinstance(pipeline.settings.gate, Disabled):
        return (), None
    try:
        stale = stale_version(connection, pipeline.settings, host_revision(connection))
        if due:
            collect(connection, pipeline.settings)
    except CollectError as error:
        return (stale,) if stale else (), log.cause(error)
    return (stale,) if stale else (), None


def _next_send(pipeline: Pipeline, seen: Outlook, pending: list[Record]) -> datetime:
    """Return when the next heartbeat is sent: now if one is due and not written yet."""
    now, day = seen.now, seen.day
    waiting: list[datetime] = [row["next_attempt_at"] for row in pending if row["expires_at"] > now]
    if waiting:
        return max(min(waiting), now)
    spread = pipeline.settings.telemetry_spread_seconds
    second = offset(seen.known.id, spread) if seen.known else timedelta()
    return max(now, day.opens + second) if seen.obstacle is None else day.closes + second
