"""One drain of one claimed row: its tries, each on record before it starts, and its settling."""

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Event

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app import database, instance, log, outbox, sender
from app.advice import advise_on_rights
from app.outbox import Begun, Claim, Refusal
from app.retry import Delivered, Outcome, RetryAt, judge
from app.settings import Settings

LEASE_BEYOND_TIMEOUT = timedelta(seconds=30)

PATIENCE_WITH_DATABASE = (0.5, 1.0, 2.0)
"""Seconds to wait between tries to commit an outcome; with 6 for each answer, 27.5 in all."""

SENT_ELSEWHERE = (
    "this day's heartbeat has already been sent, and not from this outbox: either ConsentOS's own"
    " telemetry task is on, or the database has lost a row (a failover, a restored backup)"
)
RECORD_LOST = (
    "this process has sent this day's heartbeat, and the database has lost the record of it (a"
    " failover, a restored backup)"
)

Transaction = Callable[[], AbstractContextManager[Connection]]


def lease(settings: Settings) -> timedelta:
    """Return how long a row is held from its claim, and from each attempt's beginning."""
    return timedelta(seconds=settings.telemetry_timeout_seconds) + LEASE_BEYOND_TIMEOUT


def sent_elsewhere(last_telemetry_at: datetime | None, stamped_at: datetime | None) -> str:
    """Say who has sent a day's heartbeat that the outbox does not have as sent."""
    ours = stamped_at is not None and last_telemetry_at == stamped_at
    return RECORD_LOST if ours else SENT_ELSEWHERE


@dataclass(frozen=True)
class Ended:
    """Whether a claim was still held at its end, and when its row is tried again, if it is."""

    held: bool
    next_attempt_at: datetime | None = None


class Delivery:
    """The tries of one drain. No transaction is open while one is on the wire."""

    def __init__(
        self,
        claim: Claim,
        settings: Settings,
        transaction: Transaction,
        *,
        stopping: Event,
        let_go: Callable[[], None],
        stamped_at: datetime | None = None,
    ) -> None:
        """Take a claim to deliver; ``stopping`` ends the waits, and lets no attempt begin.

        ``let_go`` is called before each POST: no connection is to be held through it.
        ``stamped_at`` is what this process stamped the instance with last, if it did.
        """
        self._claim = claim
        self._settings = settings
        self._transaction = transaction
        self._stopping = stopping
        self._let_go = let_go
        self.stamped_at = stamped_at
        self._attempt: Begun
        self._refusal: Refusal | None = None
        self._recorded: Outcome | None = None
        self._unstamped: DBAPIError | None = None

    def run(self) -> None:
        """Make the tries, and settle the row unless its lease is lost meanwhile."""
        settings, body = self._settings, self._claim.body
        target = sender.Target(
            endpoint=settings.telemetry_endpoint,
            schema=json.loads(body)["telemetry_schema"],
            timeout=settings.telemetry_timeout_seconds,
            proxy=settings.proxy,
        )
        outcome = sender.deliver(
            target,
            body.encode("ascii"),
            begin=self._begin,
            record=self._record,
            stopping=self._stopping,
        )
        if outcome:
            self._settle(outcome)
        elif self._refusal == "sent elsewhere":
            self._discard()
        elif not self._end(self._give_back).held:
            self._log_lost_lease()

    def _begin(self) -> datetime | None:
        if self._stopping.is_set():
            return None
        with self._transaction() as connection:
            begun = outbox.begin(
                connection,
                self._claim,
                lease(self._settings),
                endpoint=self._settings.endpoint_without_query,
            )
        if not isinstance(begun, Begun):
            self._refusal = begun
            return None
        self._let_go()
        self._attempt = begun
        return begun.at

    def _record(self, outcome: Outcome) -> None:
        """Record and log the outcome of a try that another is to follow."""
        self._recorded = outcome
        try:
            self._commit(lambda connection: outbox.record(connection, self._attempt, outcome))
        finally:
            self._log_attempt(outcome, None)

    def _settle(self, outcome: Outcome) -> None:
        """Record and log the outcome of the last try, and end the claim with its verdict."""
        if outcome.result == "sent":
            log.payload(self._claim.body)
        ended = Ended(held=False)
        try:
            ended = self._end(lambda connection: self._conclude(connection, outcome))
        finally:
            self._log_attempt(outcome, ended.next_attempt_at)
        if self._unstamped:
            error = log.cause(self._unstamped)
            log.event("failed", level=logging.WARNING, stage="stamp", error=error)
        if not ended.held:
            self._log_lost_lease()
        elif outcome.result == "rejected":
            log.event("rejected", level=logging.WARNING, id=self._claim.id, status=outcome.status)

    def _end(self, way: Callable[[Connection], Ended]) -> Ended:
        """End the claim in one of its two ways.

        Where only the reply to a COMMIT was lost, the next try finds the lease gone: what the
        earlier one found is what happened.
        """
        found: list[Ended] = []
        self._commit(lambda connection: found.append(way(connection)))
        return next((ended for ended in found if ended.held), found[-1])

    def _conclude(self, connection: Connection, outcome: Outcome) -> Ended:
        """Judge the row by the last try and record it: the row first, as everywhere."""
        ended = self._judge(connection, outcome)
        outbox.record(connection, self._attempt, outcome)
        if outcome.result == "sent":
            self._stamp(connection)
        return ended

    def _stamp(self, connection: Connection) -> None:
        """Stamp the instance; a row that cannot be stamped does not undo the settling."""
        self._unstamped = None
        try:
            with connection.begin_nested():
                instance.stamp(connection, self._claim.instance_id, self._attempt.at)
            self.stamped_at = self._attempt.at
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            advise_on_rights(error.orig)
            self._unstamped = error

    def _judge(self, connection: Connection, outcome: Outcome) -> Ended:
        jitter = random.random()  # noqa: S311 - jitter
        verdict = judge(outcome, self._claim.drains, database.clock(connection), jitter)
        error = outcome.error or f"HTTP {outcome.status}"
        held = outbox.settle(connection, self._claim, verdict, error)
        return Ended(held, verdict.at if held and isinstance(verdict, RetryAt) else None)

    def _discard(self) -> None:
        """End the row unsent: another program has sent the day's heartbeat."""
        stamps: list[datetime | None] = []

        def end(connection: Connection) -> Ended:
            known = instance.find(connection)
            stamps.append(known.last_telemetry_at if known else None)
            return Ended(outbox.discard(connection, self._claim, "sent elsewhere"))

        if not self._end(end).held:
            self._log_lost_lease()
            return
        id_, day = self._claim.id, self._claim.day
        log.event("discarded", id=id_, day=day, reason="sent elsewhere")
        reason = sent_elsewhere(stamps[-1], self.stamped_at)
        log.event("warning", level=logging.WARNING, reason=reason, day=day)

    def _give_back(self, connection: Connection) -> Ended:
        """Leave the row to another drain: the next try was not to begin.

        What a receiver has answered before still holds: its success under a lease that was lost
        since, its Retry-After, and the backoff.
        """
        if self._refusal == "sent before":
            return Ended(outbox.settle(connection, self._claim, Delivered(), None))
        if self._recorded is None:
            return Ended(outbox.release(connection, self._claim))
        return self._judge(connection, self._recorded)

    def _commit(self, work: Callable[[Connection], None]) -> None:
        """Do ``work`` in a transaction, again for a while where the database fails it.

        What has happened on the wire is worth more patience than what can be done again, and a
        process that is told to stop has it too, until its time to stop is over.
        """
        for wait in PATIENCE_WITH_DATABASE:
            try:
                with self._transaction() as connection:
                    work(connection)
            except DBAPIError:
                time.sleep(wait)
            else:
                return
        with self._transaction() as connection:
            work(connection)

    def _log_attempt(self, outcome: Outcome, next_attempt_at: datetime | None) -> None:
        log.event(
            "attempt",
            level=logging.INFO if outcome.result == "sent" else logging.WARNING,
            id=self._claim.id,
            n=self._attempt.n,
            outcome=outcome.result,
            status=outcome.status,
            duration_ms=outcome.duration_ms,
            error=outcome.error,
            next_attempt_at=next_attempt_at,
        )

    def _log_lost_lease(self) -> None:
        log.event("lease_lost", level=logging.WARNING, id=self._claim.id)
