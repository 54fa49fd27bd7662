"""What the actors and the operator's commands do; ``app.delivery`` has the sending of one row.

No transaction is open during a POST. Nothing here swallows an exception: the actors do that.
"""

import logging
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from functools import cached_property
from threading import Event
from uuid import UUID

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError

from app import change, database, facts, instance, log, notice, outbox, payload
from app.advice import advise_on_rights
from app.database import Link
from app.delivery import Delivery, OwnStamp, lease
from app.facts import NotConsentOSError
from app.instance import Identity
from app.outbox import Claim, Record, Wanted
from app.payload import Facts
from app.schedule import OPENS_AT, Day, Obstacle, believed, obstacle, offset, running_day
from app.settings import Disabled, Enabled, Settings

WAIT_FOR_SECOND = timedelta(seconds=59)
"""How long a drain may wait until a row is due. It is shorter than the first backoff (a minute), so
that a drain never waits to try again what it has just tried. A later row is left to the sweep."""

FIRST_WRITE_BACKOFF = 60.0
LAST_WRITE_BACKOFF = 3600.0

OFF_SWITCH = "TELEMETRY_ENABLED=false"


class CollectError(Exception):
    """ConsentOS's tables could not be counted; ``orig`` says why."""

    stage = "collect"

    def __init__(self, orig: BaseException | None) -> None:
        """Keep the error, so that the log can name what is missing."""
        super().__init__("ConsentOS's tables cannot be counted")
        self.orig = orig


@contextmanager
def _counting() -> Iterator[None]:
    """Turn every error of reading ConsentOS's tables into a CollectError."""
    try:
        yield
    except DBAPIError as error:
        advise_on_rights(error.orig)
        raise CollectError(error.orig) from error
    except NotConsentOSError as error:
        raise CollectError(error) from error


def host_revision(connection: Connection) -> str | None:
    """Return the revision of ConsentOS's database, after a check that the tables are ConsentOS's.

    Raises:
        CollectError: they are not, or the revision cannot be read.
    """
    with _counting():
        return facts.host_revision(connection)


def collect(connection: Connection, settings: Settings) -> Facts:
    """Count ConsentOS's tables, and add the facts from the settings and this process.

    Raises:
        CollectError: they cannot be counted.
    """
    with _counting():
        census = facts.census(connection)
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


@dataclass(frozen=True)
class Sent:
    """How an operator's explicit send ended: the day's row, or why it was not written."""

    day: date
    row: Record | None
    obstacle: Obstacle | None
    sent_before: bool


@dataclass(frozen=True)
class Carried:
    """The body that an operator may carry by hand, or None; and the day's row, if there is one."""

    day: date
    body: str | None
    row: Record | None
    obstacle: Obstacle | None


LogEvent = tuple[int, str, dict[str, object]]
"""An event to log once its transaction has committed: its level, name and fields."""


def _discarded(rows: Sequence[Row[UUID, date]], reason: str) -> list[LogEvent]:
    return [
        (logging.INFO, "discarded", {"id": row.id, "day": row.day, "reason": reason})
        for row in rows
    ]


def _log_all(events: list[LogEvent]) -> None:
    for level, name, fields in events:
        log.event(name, level=level, **fields)


@dataclass(frozen=True)
class Outlook:
    """The install's identity, and why the running day's heartbeat may not be written, if so."""

    now: datetime
    day: Day
    known: Identity | None
    noticed_at: datetime | None
    obstacle: Obstacle | None

    @property
    def last_telemetry_at(self) -> datetime | None:
        """When any program last sent a heartbeat of this install, as stored."""
        return self.known.last_telemetry_at if self.known else None

    @property
    def ahead(self) -> tuple[str, ...]:
        """Warnings about the stored times that lie in the future."""
        stored = {
            "instance.last_telemetry_at": self.last_telemetry_at,
            "telemetry_notice.noticed_at": self.noticed_at,
        }
        return tuple(
            _in_the_future(name, at)
            for name, at in stored.items()
            if at and not believed(at, self.now)
        )


def _in_the_future(name: str, at: datetime) -> str:
    return (
        f"{name} is {at:%Y-%m-%d %H:%M} UTC, which is in the future, and is ignored: a clock was"
        " ahead once, or a snapshot was restored"
    )


def look(connection: Connection, *, waive_notice: bool = False) -> Outlook:
    """Apply the rule that decides a write to the stored times."""
    now = database.clock(connection)
    day = running_day(now)
    known = instance.find(connection)
    noticed_at = notice.given_at(connection, payload.SCHEMA_VERSION)
    found = obstacle(
        now,
        written=outbox.has_day(connection, day.date),
        last_telemetry_at=known.last_telemetry_at if known else None,
        noticed_at=noticed_at,
        waive_notice=waive_notice,
    )
    return Outlook(now, day, known, noticed_at, found)


def stale_version(connection: Connection, settings: Settings, revision: str | None) -> str | None:
    """Return a warning if ConsentOS was upgraded and APP_VERSION was not, or None.

    ``revision`` is that of ConsentOS's database. A version has one revision: if the latest row of
    another revision has the same version, one of the two versions is wrong.
    """
    former = outbox.of_another_host_revision(connection, revision) if revision else None
    if former is None or payload.flat(former["payload"]).get("version") != settings.app_version:
        return None
    return (
        f"ConsentOS's database has changed from revision {former['host_revision']} to {revision},"
        f" and APP_VERSION is still {settings.app_version}: set it to ConsentOS's version"
    )


class Pipeline:
    """The pipeline of one process, for its settings and the database that they name.

    ``stopping`` is set when the process shuts down. Then waits end, and no attempt begins.
    """

    def __init__(self, settings: Settings, stopping: Event | None = None) -> None:
        """Take the settings. Nothing connects yet."""
        self.settings = settings
        self._stopping = stopping or Event()
        self._gate = settings.gate
        self._write_failures = 0
        self._write_not_before = 0.0
        self._warned: dict[str, Day] = {}
        self._own_stamp = OwnStamp()

    @cached_property
    def _engine(self) -> Engine:
        return database.engine(self.settings.require("database_url"))

    def connect(self) -> Link:
        """Open a connection for transactions that follow one another.

        Raises:
            SettingsError: the settings name no database.
            sqlalchemy.exc.DBAPIError: the database cannot be reached.
        """
        return Link(self._engine)

    @contextmanager
    def transaction(
        self, link: Link | None = None, *, read_only: bool = False
    ) -> Iterator[Connection]:
        """Open a transaction on ``link``, or on a connection of its own.

        Raises:
            SettingsError: the settings name no database.
        """
        connecting = nullcontext(link) if link else self.connect()
        with connecting as used, used.transaction(read_only=read_only) as connection:
            yield connection

    # Writing

    def write_heartbeat(self, link: Link | None = None) -> bool:
        """Write the running day's heartbeat if the rule allows it; return whether it was written.

        After a failure it does nothing for a minute, doubling to an hour.

        Raises:
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: any other error of the database.
        """
        if isinstance(self._gate, Disabled) or time.monotonic() < self._write_not_before:
            return False
        try:
            seen = self._write(link, waive_notice=False)
        except Exception:
            wait = min(FIRST_WRITE_BACKOFF * 2.0**self._write_failures, LAST_WRITE_BACKOFF)
            self._write_not_before = time.monotonic() + wait
            self._write_failures = min(self._write_failures + 1, 6)
            raise
        self._write_failures = 0
        for reason in seen.ahead:
            self._warn_daily(seen.day, reason)
        if seen.obstacle == "sent elsewhere":
            self._warn_daily(seen.day, self._own_stamp.explain(seen.last_telemetry_at))
        return seen.obstacle is None

    def _warn_daily(self, day: Day, reason: str) -> None:
        """Log a warning once a day in each process."""
        if self._warned.get(reason) != day:
            self._warned[reason] = day
            log.event("warning", level=logging.WARNING, reason=reason, day=day.date)

    def _write(self, link: Link | None, *, waive_notice: bool) -> Outlook:
        """Write the heartbeat, and the instance if it is missing, in one transaction."""
        with self.transaction(link) as connection:
            seen = look(connection, waive_notice=waive_notice)
            if not seen.obstacle:
                # Look again under the lock: from here on, no rotate and no forget can interfere.
                outbox.lock_shared(connection)
                seen = look(connection, waive_notice=waive_notice)
            if seen.obstacle:
                return seen
            revision = host_revision(connection)
            collected = collect(connection, self.settings)
            now, day = seen.now, seen.day
            instance_id = seen.known.id if seen.known else instance.ensure(connection)
            heartbeat = payload.compose(collected, instance_id=instance_id, at=now)
            second = day.opens + offset(instance_id, self.settings.telemetry_spread_seconds)
            written = outbox.write(
                connection,
                day=day,
                instance_id=instance_id,
                body=heartbeat.canonical(),
                next_attempt_at=max(second, now),
                host_revision=revision,
            )
            stale = stale_version(connection, self.settings, revision)
        if written is None:
            return replace(seen, obstacle="written")
        log.event("queued", id=written, day=day.date)
        if stale:
            self._warn_daily(day, stale)
        return seen

    # Sweeping

    def sweep(self, link: Link | None = None) -> bool:
        """Give the notice, end overdue rows, take back lapsed leases; return whether to drain.

        If telemetry is off, it only takes back lapsed leases and discards pending rows.
        """
        wait = None
        with self.transaction(link) as connection:
            if isinstance(self._gate, Enabled):
                self._give_notice(connection)
            events = self._tidy(connection)
            if isinstance(self._gate, Enabled):
                wait = outbox.until_due(connection)
        _log_all(events)
        return wait is not None and wait <= WAIT_FOR_SECOND

    def prune(self, link: Link | None = None) -> None:
        """Delete the finished rows that are older than the retention.

        This is not part of ``sweep``, which then works even if the role may not delete.
        """
        if days := self.settings.telemetry_retention_days:
            with self.transaction(link) as connection:
                outbox.prune(connection, timedelta(days=days))

    def _give_notice(self, connection: Connection) -> None:
        """Log the notice, then commit its record. A crash in between only logs it twice."""
        schema, now = payload.SCHEMA_VERSION, database.clock(connection)
        given_at = notice.given_at(connection, schema)
        if believed(given_at, now) or not notice.record(connection, schema):
            return
        if given_at:
            reason = _in_the_future("telemetry_notice.noticed_at", given_at)
            self._warn_daily(running_day(now), f"{reason}: the notice is given again")
        log.event(
            "notice",
            schema=schema,
            sends=",".join(name for name, _ in payload.fields()),
            new=self._new_fields(connection),
            version=self.settings.app_version,
            edition=self.settings.edition,
            to=self.settings.endpoint_without_query,
            daily=f"{OPENS_AT:%H:%M} UTC",
            first=running_day(now).closes,
            off=f"{OFF_SWITCH} and a restart",
        )

    def _new_fields(self, connection: Connection) -> str | None:
        """Name the fields that the last sent heartbeat did not have; ``all`` before the first."""
        last = outbox.last_sent(connection)
        return ",".join(change.new_fields(last["payload"])) or None if last else "all"

    def _tidy(self, connection: Connection) -> list[LogEvent]:
        """Take back lapsed leases, end rows that may not be sent; return the events to log."""
        lapsed = outbox.reclaim(connection, random.random())  # noqa: S311 - spreads retries
        error = "its lease lapsed: the process died, or could not record the outcome"
        events: list[LogEvent] = [
            (logging.WARNING, "failed", {"stage": "drain", "id": row, "error": error})
            for row in lapsed
        ]
        if isinstance(self._gate, Disabled):
            return events + _discarded(outbox.discard_all(connection), "off")
        expired = outbox.expire(connection)
        events += [(logging.WARNING, "expired", {"id": row.id, "day": row.day}) for row in expired]
        events += _discarded(outbox.discard_future(connection), "its day is in the future")
        return events + _discarded(outbox.discard_foreign(connection), "instance id rotated")

    # Sending

    def drain(self) -> None:
        """Send every due row, and wait up to a minute for a row that is nearly due."""
        while isinstance(self._gate, Enabled) and not self._stopping.is_set():
            with self.connect() as link:
                with link.transaction() as connection:
                    claim = outbox.claim(connection, lease(self.settings))
                    wait = None if claim else outbox.until_due(connection)
                if claim:
                    self._deliver(claim, link)
            if wait and timedelta() < wait <= WAIT_FOR_SECOND:
                self._stopping.wait(wait.total_seconds())
            elif not claim:
                return

    def _deliver(self, claim: Claim, link: Link) -> None:
        Delivery(claim, self.settings, link, self._stopping, self._own_stamp).run()

    def send(self) -> Sent:
        """Write the running day's heartbeat if it is missing and send it now.

        It ignores a missing notice, the install's offset and an earlier backoff, but it respects a
        Retry-After.

        Raises:
            PermissionError: telemetry is off, for the reason in the message.
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: anything else that the database refused.
        """
        seen = self._write_by_request()
        day = seen.day.date
        with self.connect() as link:
            with link.transaction() as connection:
                claim = outbox.claim(connection, lease(self.settings), day=day)
            if claim:
                self._deliver(claim, link)
            with link.transaction(read_only=True) as connection:
                row = outbox.of_day(connection, day)
        return Sent(day, row, seen.obstacle, sent_before=bool(seen.obstacle) and claim is None)

    def carry(self) -> Carried:
        """Write the running day's heartbeat if it is missing, and end it to be carried by hand.

        It ignores what ``send`` ignores, and a Retry-After too, because nothing is sent. A second
        call on the same day returns the same body.

        Raises:
            PermissionError: telemetry is off, for the reason in the message.
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: anything else that the database refused.
        """
        seen = self._write_by_request()
        day = seen.day.date
        with self.transaction() as connection:
            carried = outbox.carry(connection, day)
            row = next(iter(outbox.rows(connection, Wanted(day=day))), None)
        body, ended = carried or (None, None)
        if ended:
            log.event("discarded", id=ended, day=day, reason=outbox.CARRIED)
        return Carried(day, body, row, seen.obstacle)

    def _write_by_request(self) -> Outlook:
        """Write the running day's heartbeat if an operator may request it now."""
        if isinstance(self._gate, Disabled):
            raise PermissionError(self._gate.reason)
        with self.transaction() as connection:
            events = self._tidy(connection)
        _log_all(events)
        return self._write(None, waive_notice=True)
