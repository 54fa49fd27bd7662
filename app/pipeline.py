"""The pipeline: what the actors and the operator's commands do, and the owner of transactions.

No transaction is open while a heartbeat is on the wire, and nothing here swallows an exception:
that is done at the edge of an actor.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from threading import Event
from uuid import UUID

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError

from app import database, facts, instance, log, notice, outbox, payload, sender
from app.instance import Identity
from app.outbox import Begun, Claim, Record
from app.payload import Facts
from app.retry import Delivered, RetryAt, judge
from app.schedule import OPENS_AT, OVERDUE_AFTER, Day, Obstacle, obstacle, offset, running_day
from app.settings import Disabled, Enabled, Settings

LEASE_BEYOND_TIMEOUT = timedelta(seconds=30)
WAIT_FOR_SECOND = timedelta(minutes=1)
"""How long a drain may wait for its row's second, which is also how often the sweep looks."""

FIRST_WRITE_BACKOFF = 60.0
LAST_WRITE_BACKOFF = 3600.0

OFF_SWITCH = "TELEMETRY_ENABLED=false"


class CollectError(Exception):
    """ConsentOS's tables could not be counted; ``orig`` is the database's own error."""

    stage = "collect"

    def __init__(self, orig: BaseException | None) -> None:
        """Keep the database's error, so that the log can name what is missing."""
        super().__init__("ConsentOS's tables cannot be counted")
        self.orig = orig


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


@dataclass(frozen=True)
class Sent:
    """How an operator's explicit send ended: the day's row, or what kept it from being written."""

    day: date
    row: Record | None
    obstacle: Obstacle | None
    sent_before: bool


Ended = tuple[str, dict[str, object]]
"""An event that is true once its transaction has committed: its name and its fields."""


def _discarded(rows: Sequence[Row[UUID, date]], reason: str) -> list[Ended]:
    return [("discarded", {"id": row.id, "day": row.day, "reason": reason}) for row in rows]


def _log_all(ended: list[Ended]) -> None:
    for name, fields in ended:
        log.event(name, level=logging.WARNING, **fields)


class Pipeline:
    """One process's pipeline, on its settings and the database that they name.

    ``stopping`` is set when the process shuts down: waits end, and no further attempt begins.
    """

    def __init__(self, settings: Settings, stopping: Event | None = None) -> None:
        """Take the settings; nothing is connected before it is needed."""
        self._settings = settings
        self._stopping = stopping or Event()
        self._gate = settings.gate
        self._lease = timedelta(seconds=settings.telemetry_timeout_seconds) + LEASE_BEYOND_TIMEOUT
        self._write_failures = 0
        self._write_not_before = 0.0
        self._told_of_other_sender: Day | None = None

    @cached_property
    def _engine(self) -> Engine:
        return database.engine(self._settings.require("database_url"))

    def _transaction(self, *, read_only: bool = False) -> AbstractContextManager[Connection]:
        return database.transaction(self._engine, read_only=read_only)

    # Writing

    def write_heartbeat(self) -> bool:
        """Write the running day's heartbeat if the rule allows; return whether it was written.

        After a failure it does nothing for a minute, doubling to an hour.

        Raises:
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: anything else that the database refused.
        """
        if isinstance(self._gate, Disabled) or time.monotonic() < self._write_not_before:
            return False
        try:
            day, hurdle = self._write(waive_notice=False)
        except Exception:
            wait = min(FIRST_WRITE_BACKOFF * 2.0**self._write_failures, LAST_WRITE_BACKOFF)
            self._write_not_before = time.monotonic() + wait
            self._write_failures = min(self._write_failures + 1, 6)
            raise
        self._write_failures = 0
        if hurdle == "sent elsewhere" and self._told_of_other_sender != day:
            self._told_of_other_sender = day
            log.event(
                "warning",
                level=logging.WARNING,
                reason="something else has sent this day's heartbeat already: is ConsentOS's own"
                " telemetry task still on?",
                day=day.date,
            )
        return hurdle is None

    def _write(self, *, waive_notice: bool) -> tuple[Day, Obstacle | None]:
        """Facts, instance where it is new, and heartbeat: one transaction, all or nothing."""
        with self._transaction() as connection:
            now = database.clock(connection)
            day = running_day(now)
            known = instance.find(connection)
            hurdle = obstacle(
                day,
                written=outbox.has_day(connection, day.date),
                last_telemetry_at=known.last_telemetry_at if known else None,
                noticed_at=notice.given_at(connection, payload.SCHEMA_VERSION),
                waive_notice=waive_notice,
            )
            if hurdle:
                return day, hurdle
            instance_id = instance.ensure(connection)
            heartbeat = payload.compose(self._facts(connection), instance_id=instance_id, at=now)
            second = day.opens + offset(instance_id, self._settings.telemetry_spread_seconds)
            written = outbox.write(
                connection,
                day=day.date,
                instance_id=instance_id,
                body=heartbeat.canonical(),
                next_attempt_at=max(second, now),
                expires_at=day.closes,
            )
        if written is None:
            return day, "written"
        log.event("queued", id=written, day=day.date)
        return day, None

    def _facts(self, connection: Connection) -> Facts:
        try:
            census = facts.census(connection)
        except DBAPIError as error:
            raise CollectError(error.orig) from error
        settings = self._settings
        return Facts(
            census=census,
            version=settings.app_version,
            edition=settings.edition,
            deployment=settings.consentos_deployment,
            python=sys.version_info[:3],
            platform=sys.platform,
            geoip_header_configured=bool(settings.geoip_country_header),
            geoip_maxmind_configured=bool(settings.geoip_maxmind_db_path),
            rate_limit_enabled=settings.rate_limit_enabled,
        )

    # Keeping order

    def sweep(self) -> bool:
        """Give the notice, end what is over, take back what was lost; return whether to drain.

        When telemetry is off it only discards what was pending, and prunes.
        """
        wait = None
        with self._transaction() as connection:
            if isinstance(self._gate, Enabled):
                self._give_notice(connection)
            ended = self._tidy(connection)
            if days := self._settings.telemetry_retention_days:
                outbox.prune(connection, timedelta(days=days))
            if isinstance(self._gate, Enabled):
                wait = outbox.until_due(connection)
        _log_all(ended)
        return wait is not None and wait <= WAIT_FOR_SECOND

    def _give_notice(self, connection: Connection) -> None:
        """Log the notice, then commit its record: it may be told twice, never not at all."""
        schema = payload.SCHEMA_VERSION
        if notice.given_at(connection, schema) or not notice.record(connection, schema):
            return
        log.event(
            "notice",
            schema=schema,
            sends=",".join(name for name, _ in payload.fields()),
            to=self._settings.endpoint_without_query,
            daily=f"{OPENS_AT:%H:%M} UTC",
            first=running_day(database.clock(connection)).closes,
            off=f"{OFF_SWITCH} and a restart",
        )

    def _tidy(self, connection: Connection) -> list[Ended]:
        """Take back lapsed leases and end what may not leave; return what is to be logged."""
        died = "the process that held it ended without a word"
        lapsed = outbox.reclaim(connection, random.random())  # noqa: S311 - jitter
        ended: list[Ended] = [
            ("failed", {"stage": "drain", "id": row, "error": died}) for row in lapsed
        ]
        if isinstance(self._gate, Disabled):
            return ended + _discarded(outbox.discard_all(connection), "off")
        expired = outbox.expire(connection)
        ended += [("expired", {"id": row.id, "day": row.day}) for row in expired]
        return ended + _discarded(outbox.discard_foreign(connection), "instance id rotated")

    # Sending

    def drain(self) -> None:
        """Send what is due, waiting up to a minute for a row whose second is near."""
        while isinstance(self._gate, Enabled) and not self._stopping.is_set():
            with self._transaction() as connection:
                wait = outbox.until_due(connection)
                due = wait is not None and wait <= timedelta()
                claim = outbox.claim(connection, self._lease) if due else None
            if claim:
                self._deliver(claim)
            elif due or wait is None or wait > WAIT_FOR_SECOND:
                return
            else:
                self._stopping.wait(wait.total_seconds())

    def _deliver(self, claim: Claim) -> None:
        """Make the tries of one drain, and settle the row unless its lease is lost meanwhile."""
        attempt: Begun | None = None

        def begin() -> datetime | None:
            nonlocal attempt
            if self._stopping.is_set():
                return None
            with self._transaction() as connection:
                endpoint = self._settings.endpoint_without_query
                attempt = outbox.begin(connection, claim, self._lease, endpoint=endpoint)
            return attempt.at if attempt else None

        tries = sender.deliver(
            self._settings.telemetry_endpoint,
            claim.body.encode("ascii"),
            begin,
            schema=json.loads(claim.body)["telemetry_schema"],
            timeout=self._settings.telemetry_timeout_seconds,
            pause=self._pause,
        )
        for each in tries:
            assert attempt is not None  # noqa: S101 - a try has begun
            self._conclude(claim, attempt, each)
            if each.last:
                return
        with self._transaction() as connection:
            held = outbox.release(connection, claim)
        if not held:
            log.event("lease_lost", level=logging.WARNING, id=claim.id)

    def _pause(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _conclude(self, claim: Claim, attempt: Begun, each: sender.Try) -> None:
        """Log and record a try's outcome; settle the row where it was the last of its drain."""
        outcome = each.outcome
        error = outcome.error or (None if outcome.result == "sent" else f"HTTP {outcome.status}")
        if outcome.result == "sent":
            log.payload(claim.body)
        next_attempt_at, held, verdict = None, True, None
        try:
            with self._transaction() as connection:
                now = outbox.record(connection, attempt, outcome)
                if each.last:
                    jitter = random.random()  # noqa: S311 - jitter
                    verdict = judge(outcome, claim.drains, now, jitter)
                    held = outbox.settle(connection, claim, verdict, error)
                    if held and isinstance(verdict, Delivered):
                        instance.stamp(connection, claim.instance_id)
            if held and isinstance(verdict, RetryAt):
                next_attempt_at = verdict.at
        finally:
            log.event(
                "attempt",
                level=logging.INFO if outcome.result == "sent" else logging.WARNING,
                id=claim.id,
                n=attempt.n,
                outcome=outcome.result,
                status=outcome.status,
                duration_ms=outcome.duration_ms,
                error=outcome.error,
                next_attempt_at=next_attempt_at,
            )
        if not held:
            log.event("lease_lost", level=logging.WARNING, id=claim.id)
        elif outcome.result == "rejected":
            log.event("rejected", level=logging.WARNING, id=claim.id, status=outcome.status)

    # Asked by the operator

    def send(self) -> Sent:
        """Write the running day's heartbeat if it is missing and send it now.

        It waives the notice, the install's offset and an earlier backoff; never a Retry-After,
        and never the switch: the caller has to look at the gate.

        Raises:
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: anything else that the database refused.
        """
        if isinstance(self._gate, Disabled):
            raise PermissionError(self._gate.reason)
        with self._transaction() as connection:
            ended = self._tidy(connection)
        _log_all(ended)
        day, hurdle = self._write(waive_notice=True)
        with self._transaction() as connection:
            claim = outbox.claim(connection, self._lease, day=day.date)
        if claim:
            self._deliver(claim)
        with self._transaction(read_only=True) as connection:
            row = outbox.of_day(connection, day.date)
        return Sent(day.date, row, hurdle, sent_before=hurdle is not None and claim is None)

    def preview(self) -> tuple[str, bool]:
        """Return the body that would be written now, and whether its instance exists yet.

        It stores nothing and sends nothing, and reads whether telemetry is on or off.
        """
        with self._transaction(read_only=True) as connection:
            now = database.clock(connection)
            known = instance.find(connection)
            body = payload.compose(
                self._facts(connection),
                instance_id=known.id if known else payload.NIL_INSTANCE,
                at=now,
            )
        return body.canonical(), known is not None

    def audit(self) -> list[Record]:
        """Return the whole outbox, the newest day first, each row with its attempts."""
        with self._transaction(read_only=True) as connection:
            attempts = outbox.attempts(connection)
            rows = outbox.rows(connection)
        for row in rows:
            row["tries"] = [each for each in attempts if each["outbox_id"] == row["id"]]
        return rows

    def status(self) -> Status:
        """Return the state of things, as of one moment."""
        settings, gate = self._settings, self._gate
        with self._transaction(read_only=True) as connection:
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
        enabled = isinstance(gate, Enabled)
        return Status(
            enabled=enabled,
            reason=gate.reason if isinstance(gate, Disabled) else None,
            warnings=settings.warnings,
            endpoint=settings.endpoint_without_query,
            schedule=f"daily at {OPENS_AT:%H:%M} UTC",
            instance_id=known.id if known else None,
            noticed_at=noticed_at,
            last_success=known.last_telemetry_at if known else None,
            next_send=self._next_send(now, known, pending, hurdle) if enabled else None,
            pending=pending,
            last_error=last_error,
            overdue=enabled and hurdle is None and now >= day.opens + OVERDUE_AFTER,
        )

    def _next_send(
        self,
        now: datetime,
        known: Identity | None,
        pending: list[Record],
        hurdle: Obstacle | None,
    ) -> datetime:
        """Return when a heartbeat leaves next: now if one is due and merely not written yet."""
        waiting: list[datetime] = [
            row["next_attempt_at"] for row in pending if row["expires_at"] > now
        ]
        if waiting:
            return max(min(waiting), now)
        spread = self._settings.telemetry_spread_seconds
        second = offset(known.id, spread) if known else timedelta()
        day = running_day(now)
        return max(now, day.opens + second) if hurdle is None else day.closes + second
