"""The only HTTP, and the only tenacity: bytes go out to an endpoint, outcomes come back.

It knows no database. ``begin`` is called before every POST, and only where it allows the POST does
a byte leave.
"""

import asyncio
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Thread

import httpx
from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_exponential, wait_random

from app.retry import Outcome, result_of

TRIES = 3
PATIENCE = timedelta(seconds=3)
"""The longest Retry-After that is waited out inside a drain."""

Begin = Callable[[], datetime | None]
"""Allow the next POST by returning the database's time, or forbid it by returning None."""

_backoff = wait_exponential(multiplier=0.5, max=2) + wait_random(0, 0.5)


@dataclass(frozen=True)
class Try:
    """One POST's outcome, and whether it is the last of its drain."""

    outcome: Outcome
    last: bool


def deliver(
    endpoint: str,
    body: bytes,
    begin: Begin,
    *,
    schema: int,
    timeout: float,
    pause: Callable[[float], None],
) -> Iterator[Try]:
    """POST ``body`` up to 3 times, yielding each outcome before the wait that follows it.

    ``timeout`` is the total deadline of one POST in seconds; ``pause`` waits a number of seconds.
    The tries end early when ``begin`` forbids one.
    """
    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        retry=lambda state: _worth_another(_outcome(state)),
        wait=lambda state: max(_backoff(state), _asked(state)),
        sleep=pause,
        retry_error_callback=lambda _: None,
    )
    for attempt in tries:
        begun = begin()
        if begun is None:
            return
        outcome = post(endpoint, body, schema=schema, timeout=timeout, at=begun)
        attempt.retry_state.set_result(outcome)
        exhausted = attempt.retry_state.attempt_number == TRIES
        yield Try(outcome, last=exhausted or not _worth_another(outcome))


def _outcome(state: RetryCallState) -> Outcome:
    assert state.outcome is not None  # noqa: S101 - tells the type checker what tenacity promises
    outcome: Outcome = state.outcome.result()
    return outcome


def _asked(state: RetryCallState) -> float:
    return (_outcome(state).retry_after or timedelta()).total_seconds()


def _worth_another(outcome: Outcome) -> bool:
    return outcome.result == "retryable" and (outcome.retry_after or timedelta()) <= PATIENCE


def post(endpoint: str, body: bytes, *, schema: int, timeout: float, at: datetime) -> Outcome:
    """POST once, within ``timeout`` seconds in all: name look-up, connection, TLS, response head.

    The response's body is never read. ``at`` is the time now, against which a Retry-After that is
    a date is read.
    """
    started = time.monotonic()
    status, retry_after, error = None, None, None
    try:
        request = asyncio.run_coroutine_threadsafe(
            _exchange(endpoint, body, schema, timeout), _loop()
        )
        # The loop keeps the deadline; the second bound is for a loop that is itself held up.
        status, asked = request.result(timeout + 5)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as failure:
        error = _kind(failure)
    elapsed = time.monotonic() - started
    if status is not None:
        retry_after = parse_retry_after(asked, at + timedelta(seconds=elapsed))
    return Outcome(
        result="retryable" if status is None else result_of(status),
        duration_ms=round(elapsed * 1000),
        status=status,
        error=error,
        retry_after=retry_after,
    )


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Run one event loop for the life of the process.

    ``asyncio.run`` would wait for a slow resolver's thread each time it ends.
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="telemetry-http", daemon=True).start()
    return loop


async def _exchange(
    endpoint: str, body: bytes, schema: int, deadline: float
) -> tuple[int, str | None]:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"consentos-telemetry/{schema}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    # A client for each POST keeps no cookie, and no connection.
    async with (
        asyncio.timeout(deadline),
        httpx.AsyncClient(timeout=None, follow_redirects=False) as client,  # noqa: S113 - see above
        client.stream("POST", endpoint, content=body, headers=headers) as response,
    ):
        return response.status_code, response.headers.get("Retry-After")


def _kind(failure: BaseException) -> str:
    """Name a failure in one word; its own text may hold the endpoint's query."""
    causes: list[BaseException] = []
    cause: BaseException | None = failure
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, word in _KINDS:
        if any(isinstance(each, kind) for each in causes):
            return word
    return "connection"


_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "dns"),
    (UnicodeError, "dns"),
    (ssl.SSLError, "tls"),
    (TimeoutError, "deadline"),
    (httpx.ProxyError, "proxy"),
    (ConnectionRefusedError, "refused"),
    (ConnectionResetError, "reset"),
    (httpx.ProtocolError, "protocol"),
    # The endpoint is a URL that httpx takes; a proxy from the environment may be none.
    (httpx.InvalidURL, "proxy"),
    (ValueError, "proxy"),
    (ImportError, "proxy"),
)


def parse_retry_after(value: str | None, now: datetime) -> timedelta | None:
    """Return how long a Retry-After asks to wait (RFC 9110, section 10.2.3).

    None where there is no header, where it cannot be understood, or where it asks for no wait.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        # Nine digits are 31 years: enough to be too long, never too long for an integer.
        asked = timedelta(seconds=int(text.lstrip("0")[:9] or "0"))
    else:
        try:
            date = parsedate_to_datetime(text)
            asked = (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
        except (ValueError, OverflowError):
            return None
    return asked if asked > timedelta() else None
