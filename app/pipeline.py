"""The pipeline: what the actors and the operator's commands do, and the owner of transactions.

No transaction is open while a heartbeat is on the wire, and nothing here swallows an exception:
that is done at the edge of an actor.
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
"""How long a drain may wait for its row's second: until the sweep looks again, and never so long
as to wait out the first backoff, a minute, of what it has just tried."""

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
    """Turn what keeps ConsentOS's tables from being read into one error."""
    try:
        yield
    except DBAPIError as error:
        advise_on_rights(error.orig)
        raise CollectError(error.orig) from error
    except NotConsentOSError as error:
        raise CollectError(error) from error


def host_revision(connection: Connection) -> str | None:
    """Return the revision of ConsentOS's database, after a look at whether it is ConsentOS's.

    Raises:
        CollectError: it is not, or its revision cannot be read.
    """
    with _counting():
        return facts.host_revision(connection)


def collect(connection: Connection, settings: Settings) -> Facts:
    """Count ConsentOS's tables, and add what the settings and this process know.

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
    """How an operator's explicit send ended: the day's row, or what kept it from being written."""

    day: date
    row: Record | None
    obstacle: Obstacle | None
    sent_before: bool


@dataclass(frozen=True)
class Carried:
    """The body that an operator is to carry, or None; and the day's row as it is now, if any."""

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
    """Who this install is, and what keeps the running day's heartbeat from being written."""

    now: datetime
    day: Day
    known: Identity | None
    noticed_at: datetime | None
    obstacle: Obstacle | None

    @property
    def last_telemetry_at(self) -> datetime | None:
        """When the install last sent, by whatever program, as it is stored."""
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
    """Apply the rule that decides a write to what is stored."""
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

    ``revision`` is that of ConsentOS's database. A version has one revision: where the latest row
    of another revision has the same version, one of the two is wrong.
    """
    former = outbox.of_another_host_revision(connection, revision) if revision else None
    if former is None or payload.flat(former["payload"]).get("version") != settings.app_version:
        return None
    return (
        f"ConsentOS's database has changed from revision {former['host_revision']} to {revision},"
        f" and APP_VERSION is still {settings.app_version}: set it to ConsentOS's version"
    )


class Pipeline:
    """One process's pipeline, on its settings and the database that they name.

    ``stopping`` is set when the process shuts down: waits end, and no further attempt begins.
    """

    def __init__(self, settings: Settings, stopping: Event | None = None) -> None:
        """Take the settings; nothing is connected before it is needed."""
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
        """Write the running day's heartbeat if the rule allows; return whether it was written.

        After a failure it does nothing for a minute, doubling to an hour.

        Raises:
            CollectError: ConsentOS's tables cannot be counted.
            sqlalchemy.exc.DBAPIError: anything else that the database refused.
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
        """Log a warning, once a day and process."""
        if self._warned.get(reason) != day:
            self._warned[reason] = day
            log.event("warning", level=logging.WARNING, reason=reason, day=day.date)

    def _write(self, link: Link | None, *, waive_notice: bool) -> Outlook:
        """Facts, instance where it is new, and heartbeat: one transaction, all or nothing."""
        with self.transaction(link) as connection:
            seen = look(connection, waive_notice=waive_notice)
            if not seen.obstacle:
                # What was seen holds from here on: nobody rotates or forgets in between.
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

    # Keeping order

    def sweep(self, link: Link | None = None) -> bool:
        """Give the notice, end what is over, take back what was lost; return whether to drain.

        When telemetry is off it only discards what was pending.
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

        Apart from the sweep, so that a role without the right to delete loses nothing else.
        """
        if days := self.settings.telemetry_retention_days:
            with self.transaction(link) as connection:
                outbox.prune(connection, timedelta(days=days))

    def _give_notice(self, connection: Connection) -> None:
        """Log the notice, then commit its record: it may be told twice, never not at all."""
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
        """Name the fields that the last heartbeat sent did not have; ``all`` before the first."""
        last = outbox.last_sent(connection)
        return ",".join(change.new_fields(last["payload"])) or None if last else "all"

    def _tidy(self, connection: Connection) -> list[LogEvent]:
        """Take back lapsed leases and end what may not leave; return what is to be logged."""
        lapsed = outbox.reclaim(connection, random.random())  # noqa: S311 - jitter
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
        """Send what is due, waiting up to a minute for a row whose second is near."""
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

        It waives the notice, the install's offset and an earlier backoff; never a Retry-After.

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
        """Write the running day's heartbeat if it is missing and end it, to be carried by hand.

        It waives what ``send`` waives, and a Retry-After too: nothing is sent. Asked again on the
        same day, it returns the same body.

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
        """Write the running day's heartbeat if an operator's request allows it."""
        if isinstance(self._gate, Disabled):
            raise PermissionError(self._gate.reason)
        with self.transaction() as connection:
            events = self._tidy(connection)
        _log_all(events)
        return self._write(None, waive_notice=True)
