"""What an attempt's outcome means for its row: pure, so that every rule can be tested as one."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

FIRST_BACKOFF = timedelta(minutes=1)
LAST_BACKOFF = timedelta(minutes=48)
JITTER = 0.25
"""Share of a backoff that jitter may add, the longest included: 48 minutes become an hour."""

LONGEST_RETRY_AFTER = timedelta(hours=6)

RETRYABLE_STATUS = frozenset({408, 425, 429})

Result = Literal["sent", "retryable", "rejected"]
FAILURES: tuple[Result, ...] = ("retryable", "rejected")


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended: an HTTP status, or the kind of failure that kept it from one."""

    result: Result
    duration_ms: int
    status: int | None = None
    error: str | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True)
class Delivered:
    """The receiver has the heartbeat."""


@dataclass(frozen=True)
class RetryAt:
    """Try again at ``at``; before ``not_before`` the receiver does not want to be asked."""

    at: datetime
    not_before: datetime | None


@dataclass(frozen=True)
class Rejected:
    """The receiver will not take this heartbeat: no further attempt."""


Verdict = Delivered | RetryAt | Rejected


def result_of(status: int) -> Result:
    """Return what an HTTP status means; a redirect is not followed, so it is a refusal."""
    if 200 <= status < 300:  # noqa: PLR2004 - HTTP's success class
        return "sent"
    return "retryable" if status in RETRYABLE_STATUS or status >= 500 else "rejected"  # noqa: PLR2004 - HTTP's own number


def backoff(drains: int, jitter: float) -> timedelta:
    """Return the wait after the ``drains``-th drain (from 1): 1 minute doubling to 1 hour.

    ``jitter`` is in [0, 1).
    """
    doublings = min(max(drains - 1, 0), 6)
    return min(FIRST_BACKOFF * 2.0**doublings, LAST_BACKOFF) * (1 + JITTER * jitter)


def judge(outcome: Outcome, drains: int, now: datetime, jitter: float) -> Verdict:
    """Decide what becomes of a row whose drain ended with ``outcome`` at ``now``.

    A Retry-After is kept, up to 6 hours; it never makes a try come sooner than the backoff.
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
