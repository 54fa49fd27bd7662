"""The delivery of one claimed heartbeat: attempts, their records, and the end of the claim.

Read ``Delivery.run`` first. It begins an attempt and commits that, closes the connection, makes
the POST, and settles the row in another transaction.
"""

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from threading import Event

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app import database, instance, log, outbox, sender
from app.advice import advise_on_rights
from app.database import Link
from app.outbox import Begun, Claim, Refusal
from app.retry import Delivered, Outcome, RetryAt, judge
from app.settings import Settings

LEASE_BEYOND_TIMEOUT = timedelta(seconds=30)

PATIENCE_WITH_DATABASE = (0.5, 1.0, 2.0)
"""Seconds between the tries to commit an outcome. All four take 27.5 seconds if the database gives
no answer for 6 seconds each time; a URL with several silent hosts takes longer."""

SENT_ELSEWHERE = (
    "this day's heartbeat has already been sent, and not from this outbox: either ConsentOS's own"
    " telemetry task is on, or the database has lost a row (a failover, a restored backup)"
)
RECORD_LOST = (
    "this process has sent this day's heartbeat, and the database has lost the record of it (a"
    " failover, a restored backup)"
)


def lease(settings: Settings) -> timedelta:
    """Return how long a claim, or the beginning of an attempt, reserves a row."""
    return timedelta(seconds=settings.telemetry_timeout_seconds) + LEASE_BEYOND_TIMEOUT


@dataclass
class OwnStamp:
    """The time with which this process last stamped the instance; None before the first time."""

    at: datetime | None = None

    def explain(self, last_telemetry_at: datetime | None) -> str:
        """Explain why a day counts as sent although the outbox has no sent row for it."""
        ours = self.at is not None and last_telemetry_at == self.at
        return RECORD_LOST if ours else SENT_ELSEWHERE


@dataclass(frozen=True)
class ClaimEnd:
    """How a claim ended.

    ``held`` is whether the lease was still this claim's. ``next_attempt_at`` is set if the row
    will be tried again, ``unstamped`` if the instance could not be stamped.
    """

    held: bool
    next_attempt_at: datetime | None = None
    unstamped: DBAPIError | None = None


@dataclass(frozen=True)
class Delivery:
    """The delivery of one claimed heartbeat.

    ``link`` is the connection that the claim was made on. It is closed during each POST and each
    wait. ``stopping`` ends the waits, and no attempt begins after it.
    """

    claim: Claim
    settings: Settings
    link: Link
    stopping: Event
    own_stamp: OwnStamp

    def run(self) -> None:
        """Make up to three attempts, each on record before it starts, and end the claim."""
        target, body = self._target(), self.claim.body.encode("ascii")
        earlier: Outcome | None = None
        for each in sender.tries(self.stopping):
            attempt = self._begin()
            if not isinstance(attempt, Begun):
                self._end_without_attempt(attempt, earlier)
                return
            self.link.close()
            outcome = sender.post(target, body, at=attempt.at, stopping=self.stopping)
            if each.another_follows(outcome):
                self._record(attempt, outcome)
                earlier = outcome
            else:
                self._settle(attempt, outcome)

    def _target(self) -> sender.Target:
        return sender.Target(
            endpoint=self.settings.telemetry_endpoint,
            schema=json.loads(self.claim.body)["telemetry_schema"],
            timeout=self.settings.telemetry_timeout_seconds,
            proxy=self.settings.proxy,
        )

    # Each of these is one transaction, and what is logged after it

    def _begin(self) -> Begun | Refusal | None:
        """Commit the record of an attempt, and return it; None if the process must stop."""
        if self.stopping.is_set():
            return None
        with self.link.transaction() as connection:
            return outbox.begin(
                connection,
                self.claim,
                lease(self.settings),
                endpoint=self.settings.endpoint_without_query,
            )

    def _record(self, attempt: Begun, outcome: Outcome) -> None:
        """Record and log the outcome of an attempt that another one follows."""
        try:
            self._commit(lambda connection: outbox.record(connection, attempt, outcome))
        finally:
            self._log_attempt(attempt, outcome, None)

    def _settle(self, attempt: Begun, outcome: Outcome) -> None:
        """Record and log the outcome of the last attempt, and end the claim with its verdict."""
        if outcome.result == "sent":
            log.payload(self.claim.body)
        end = ClaimEnd(held=False)
        try:
            end = self._end(lambda connection: self._write_settled(connection, attempt, outcome))
        finally:
            self._log_attempt(attempt, outcome, end.next_attempt_at)
        if end.unstamped:
            error = log.cause(end.unstamped)
            log.event("failed", level=logging.WARNING, stage="stamp", error=error)
        if not end.held:
            self._log_lost_lease()
        elif outcome.result == "rejected":
            log.event("rejected", level=logging.WARNING, id=self.claim.id, status=outcome.status)

    def _end_without_attempt(self, refusal: Refusal | None, earlier: Outcome | None) -> None:
        """End the claim because no further attempt may begin."""
        if refusal == "sent elsewhere":
            self._discard()
        elif not self._end(
            lambda connection: self._write_given_back(connection, refusal, earlier)
        ).held:
            self._log_lost_lease()

    def _discard(self) -> None:
        """End the row unsent, because another program has sent the day's heartbeat."""
        last_telemetry_at: datetime | None = None

        def write(connection: Connection) -> ClaimEnd:
            nonlocal last_telemetry_at
            known = instance.find(connection)
            last_telemetry_at = known.last_telemetry_at if known else None
            return ClaimEnd(outbox.discard(connection, self.claim, "sent elsewhere"))

        if not self._end(write).held:
            self._log_lost_lease()
            return
        day = self.claim.day
        log.event("discarded", id=self.claim.id, day=day, reason="sent elsewhere")
        reason = self.own_stamp.explain(last_telemetry_at)
        log.event("warning", level=logging.WARNING, reason=reason, day=day)

    # What these transactions write

    def _write_settled(self, connection: Connection, attempt: Begun, outcome: Outcome) -> ClaimEnd:
        """Write the verdict and the outcome: the row before its attempt, as everywhere."""
        end = self._write_verdict(connection, outcome)
        outbox.record(connection, attempt, outcome)
        if outcome.result == "sent":
            return replace(end, unstamped=self._stamp(connection, attempt))
        return end

    def _write_verdict(self, connection: Connection, outcome: Outcome) -> ClaimEnd:
        """End the claim with the verdict on an outcome."""
        jitter = random.random()  # noqa: S311 - spreads retries
        verdict = judge(outcome, self.claim.drains, database.clock(connection), jitter)
        error = outcome.error or f"HTTP {outcome.status}"
        held = outbox.settle(connection, self.claim, verdict, error)
        return ClaimEnd(held, verdict.at if held and isinstance(verdict, RetryAt) else None)

    def _stamp(self, connection: Connection, attempt: Begun) -> DBAPIError | None:
        """Stamp the instance; return the error if that fails, which does not undo the settling."""
        try:
            with connection.begin_nested():
                instance.stamp(connection, self.claim.instance_id, attempt.at)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            advise_on_rights(error.orig)
            return error
        self.own_stamp.at = attempt.at
        return None

    def _write_given_back(
        self, connection: Connection, refusal: Refusal | None, earlier: Outcome | None
    ) -> ClaimEnd:
        """Leave the row to another drain.

        What the receiver has answered before still counts: a success under a lease that was lost
        since, or, from this drain, a Retry-After and the backoff.
        """
        if refusal == "sent before":
            return ClaimEnd(outbox.settle(connection, self.claim, Delivered(), None))
        if earlier is None:
            return ClaimEnd(outbox.release(connection, self.claim))
        return self._write_verdict(connection, earlier)

    # Committing

    def _end(self, write: Callable[[Connection], ClaimEnd]) -> ClaimEnd:
        """End the claim in a transaction, and return how it ended.

        If only the reply to a COMMIT was lost, the next try finds the lease gone. Then the earlier
        try's finding counts, because that is what was committed.
        """
        ends: list[ClaimEnd] = []
        self._commit(lambda connection: ends.append(write(connection)))
        end = next((each for each in ends if each.held), ends[-1])
        return replace(end, unstamped=ends[-1].unstamped)

    def _commit(self, write: Callable[[Connection], None]) -> None:
        """Write in a transaction, and try again for a while if the database fails.

        An outcome is worth this patience, because it cannot be found out again. A process that is
        asked to stop also tries, until its time is over. No connection is open at the end.
        """
        for wait in PATIENCE_WITH_DATABASE:
            try:
                with closing(self.link), self.link.transaction() as connection:
                    write(connection)
            except DBAPIError:
                time.sleep(wait)
            else:
                return
        with closing(self.link), self.link.transaction() as connection:
            write(connection)

    # Logging

    def _log_attempt(
        self, attempt: Begun, outcome: Outcome, next_attempt_at: datetime | None
    ) -> None:
        log.event(
            "attempt",
            level=logging.INFO if outcome.result == "sent" else logging.WARNING,
            id=self.claim.id,
            n=attempt.n,
            outcome=outcome.result,
            status=outcome.status,
            duration_ms=outcome.duration_ms,
            error=outcome.error,
            next_attempt_at=next_attempt_at,
        )

    def _log_lost_lease(self) -> None:
        log.event("lease_lost", level=logging.WARNING, id=self.claim.id)
