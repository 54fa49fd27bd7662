"""What an attempt's outcome means for its row. Everything here is pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

FIRST_BACKOFF = timedelta(minutes=1)
LAST_BACKOFF = timedelta(minutes=48)
JITTER = 0.25
"""The share of a backoff that jitter may add. The longest one, 48 minutes, becomes an hour."""

LONGEST_RETRY_AFTER = timedelta(hours=6)

RETRYABLE_STATUS = frozenset({408, 425, 429})

Result = Literal["sent", "retryable", "rejected"]
FAILURES: tuple[Result, ...] = ("retryable", "rejected")


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended: an HTTP status, or the kind of failure if there was no answer."""

    result: Result
    duration_ms: int
    status: int | None = None
    error: str | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True)
class Delivered:
    """The receiver has accepted the heartbeat."""


@dataclass(frozen=True)
class RetryAt:
    """Try again at ``at``. The receiver has asked for no attempt before ``not_before``, if set."""

    at: datetime
    not_before: datetime | None


@dataclass(frozen=True)
class Rejected:
    """The receiver has refused this heartbeat: there is no further attempt."""


Verdict = Delivered | RetryAt | Rejected


def result_of(status: int) -> Result:
    """Return what an HTTP status means. A redirect is not followed: it counts as a refusal."""
    if 200 <= status < 300:  # noqa: PLR2004 - HTTP defines these numbers
        return "sent"
    return "retryable" if status in RETRYABLE_STATUS or status >= 500 else "rejected"  # noqa: PLR2004 - as above


def backoff(drains: int, jitter: float) -> timedelta:
    """Return the wait after the ``drains``-th drain (from 1): 1 minute doubling to 1 hour.

    ``jitter`` is in [0, 1).
    """
    doublings = min(max(drains - 1, 0), 6)
    return min(FIRST_BACKOFF * 2.0**doublings, LAST_BACKOFF) * (1 + JITTER * jitter)


def judge(outcome: Outcome, drains: int, now: datetime, jitter: float) -> Verdict:
    """Decide what happens to a row whose drain ended with ``outcome`` at ``now``.

    A Retry-After is respected up to 6 hours. It never makes the next try earlier than the backoff.
    """
    match outcome.result:
        case "sent":
            return Delivered()
        case "rejected":
            return Rejected()
    asked = outcome.retry_after
    not_before = now + min(asked, LONGEST_RETRY_AFTER) if asked else None
    at = now + backoff(drains, jitter)
    return RetryAt(max(at, not_before) if not_before else at, not_before)
