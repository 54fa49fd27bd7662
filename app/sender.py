"""The only module that uses HTTP and tenacity: it sends bytes and returns outcomes.

It uses no database. Of the answers, only those to ``held`` are read, up to a limit.
"""

import asyncio
import re
import socket
import ssl
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import CancelledError, wait
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Event, Thread
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit
from uuid import UUID

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)
from tenacity.nap import sleep_using_event

from app.retry import Outcome, result_of

# httpx._main is httpx's command line, with 5 MB of click, pygments and rich: httpx can do without.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # None makes its import fail

import httpx  # noqa: E402 - after the line above
from socksio.exceptions import SOCKSError  # noqa: E402 - as above

TRIES = 3
PATIENCE = timedelta(seconds=3)
"""The longest Retry-After for which a drain waits; a longer one ends the drain."""

GRACE = 0.5
"""The least number of seconds that a running POST still has when the process is asked to stop."""

LONGEST_ANSWER = 8 * 1024 * 1024
"""The most bytes of an answer to read. A full page of heartbeats has 1 to 2 million."""

BETWEEN_TRIES = wait_exponential(multiplier=0.5, max=2) + wait_random(0, 0.5)
"""Seconds between the tries of one drain. The random part is added here, because tenacity's own is
zero at the longest wait."""


@dataclass(frozen=True)
class Target:
    """Where to send a body, and how. ``timeout`` is the total deadline of one POST in seconds.

    ``proxy`` is the URL of the proxy to use, which may contain a password, or None for no proxy.
    """

    endpoint: str
    schema: int
    timeout: float
    proxy: str | None = field(default=None, repr=False)


def _outcome(state: RetryCallState) -> Outcome:
    assert state.outcome is not None  # noqa: S101 - tenacity asks only after an outcome is set
    outcome: Outcome = state.outcome.result()
    return outcome


def _asked(outcome: Outcome) -> float:
    return (outcome.retry_after or timedelta()).total_seconds()


def _worth_another(outcome: Outcome) -> bool:
    return outcome.result == "retryable" and _asked(outcome) <= PATIENCE.total_seconds()


_RETRY = retry_if_result(_worth_another)
_STOP = stop_after_attempt(TRIES)


@dataclass(frozen=True)
class Try:
    """One of the tries of a drain."""

    _state: RetryCallState

    def another_follows(self, outcome: Outcome) -> bool:
        """Take the outcome of this try, and return whether another try follows after a wait."""
        self._state.set_result(outcome)
        return _RETRY(self._state) and not _STOP(self._state)


def tries(stopping: Event) -> Iterator[Try]:
    """Yield the tries of one drain, at most 3, and wait between them.

    Give each one's outcome to its ``another_follows`` before the next. ``stopping`` ends a wait.
    """
    for each in Retrying(
        stop=_STOP,
        retry=_RETRY,
        wait=lambda state: max(BETWEEN_TRIES(state), _asked(_outcome(state))),
        sleep=sleep_using_event(stopping),
        retry_error_callback=_outcome,
    ):
        yield Try(each.retry_state)


def post(target: Target, body: bytes, *, at: datetime, stopping: Event) -> Outcome:
    """POST once. The deadline covers name look-up, connection, TLS and the head of the response.

    The response's body is never read. ``at`` is the time now, which turns a Retry-After with a date
    into a wait. A POST that is still running is given up within a second after ``stopping`` is set.
    """
    return _once("POST", target, body, at=at, stopping=stopping).outcome


def erase(target: Target, instance_id: UUID) -> Outcome:
    """Ask the receiver at ``target`` once to delete everything under an id.

    The request is ``DELETE …/installs/{instance_id}``, next to the endpoint for heartbeats.
    """
    install = _install(target, instance_id)
    return _once("DELETE", install, b"", at=datetime.now(UTC), stopping=Event()).outcome


@dataclass(frozen=True)
class Answer:
    """An outcome, and the bytes of the answer if they were read. Do not trust them."""

    outcome: Outcome
    body: bytes = b""


def held(target: Target, instance_id: UUID, after: str | None = None) -> Answer:
    """Ask the receiver at ``target`` once for the heartbeats that it stores under an id.

    The request is ``GET …/installs/{instance_id}``, next to the endpoint for heartbeats. ``after``,
    a ``sent_at``, limits it to later heartbeats. The answer is read if the status is 200 or 404. An
    answer longer than ``LONGEST_ANSWER`` is a failure.
    """
    install = _install(target, instance_id, {"after": after} if after else {})
    return _once("GET", install, b"", at=datetime.now(UTC), stopping=Event(), read=_ANSWERED)


_ANSWERED = frozenset({200, 404})
"""The statuses with which a receiver answers what it stores."""


def _install(target: Target, instance_id: UUID, query: Mapping[str, str] | None = None) -> Target:
    """Return where the receiver answers for one id. The query of the endpoint is kept."""
    url = urlsplit(target.endpoint)
    path = f"{url.path.rpartition('/')[0]}/installs/{instance_id}"
    asked = "&".join(part for part in (url.query, urlencode(query or {})) if part)
    return replace(target, endpoint=urlunsplit(url._replace(path=path, query=asked)))


def _once(
    method: str,
    target: Target,
    body: bytes,
    *,
    at: datetime,
    stopping: Event,
    read: Collection[int] = (),
) -> Answer:
    """Make one request; the answer's body is read if its status is in ``read``."""
    started = time.monotonic()
    status, retry_after, error, answer = None, None, None, b""
    request = asyncio.run_coroutine_threadsafe(_exchange(method, target, body, read), _loop())
    # The event loop keeps the deadline. This loop ends the wait on a stop, or if the event loop
    # hangs.
    while not (request.done() or wait([request], timeout=GRACE).done):
        if stopping.is_set() or time.monotonic() - started > target.timeout + GRACE:
            wait([request], timeout=GRACE)
            request.cancel()
    try:
        status, asked, answer = request.result()
    except CancelledError:
        error = "stopped" if stopping.is_set() else "deadline"
    except Exception as failure:  # noqa: BLE001 - httpx and asyncio raise exceptions of many types
        error = _kind(failure)
    elapsed = time.monotonic() - started
    if status is not None:
        retry_after = parse_retry_after(asked, at + timedelta(seconds=elapsed))
    outcome = Outcome(
        result="retryable" if status is None else result_of(status),
        duration_ms=round(elapsed * 1000),
        status=status,
        error=error,
        retry_after=retry_after,
    )
    return Answer(outcome, answer)


_opened: ContextVar[list[asyncio.WriteTransport]] = ContextVar("opened")
"""The connections that the current exchange has opened."""


class _Loop(asyncio.SelectorEventLoop):
    """A loop that does not use its executor for name look-ups, because exit waits for executors."""

    async def create_connection(self, *arguments: Any, **options: Any) -> Any:
        """Connect, and note the connection so that it is closed after the exchange."""
        transport, protocol = await super().create_connection(*arguments, **options)
        _opened.get().append(transport)
        return transport, protocol

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> Any:
        """Resolve in a thread of its own, for which the process does not wait at its end."""
        answer = self.create_future()

        def finish(result: Any, failure: Exception | None) -> None:
            if not answer.done():
                answer.set_exception(failure) if failure else answer.set_result(result)

        def ask() -> None:
            try:
                self.call_soon_threadsafe(finish, socket.getaddrinfo(host, port, **hints), None)
            except (OSError, UnicodeError) as failure:
                self.call_soon_threadsafe(finish, None, failure)

        Thread(target=ask, name="telemetry-resolver", daemon=True).start()
        return await answer


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Run one event loop in a daemon thread until the process ends."""
    loop = _Loop()
    Thread(target=loop.run_forever, name="telemetry-http", daemon=True).start()
    return loop


class UnreadableCertificatesError(Exception):
    """The file that SSL_CERT_FILE names is missing, unreadable, or contains no certificate."""


@cache
def tls_context() -> ssl.SSLContext:
    """Read the trusted certificates once, because that takes longer than the rest of a POST.

    Raises:
        UnreadableCertificatesError: they cannot be read; the next call tries again.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise UnreadableCertificatesError from error


def _context_for(target: Target) -> ssl.SSLContext:
    """Return the TLS context for a POST. Without TLS no certificate is read."""
    if target.endpoint.lower().startswith("https:"):
        return tls_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and trusts no certificate


_Exchanged = tuple[int, str | None, bytes]
"""A status, a Retry-After, and the body if it was read."""


async def _exchange(method: str, target: Target, body: bytes, read: Collection[int]) -> _Exchanged:
    """Make one request; every connection is closed after the answer."""
    _opened.set([])
    try:
        return await _ask(method, target, body, read)
    finally:
        # httpx leaves a connection open if a SOCKS proxy refuses it or does not answer in time.
        for transport in _opened.get():
            transport.abort()


async def _ask(method: str, target: Target, body: bytes, read: Collection[int]) -> _Exchanged:
    headers = {
        **({"Content-Type": "application/json"} if body else {}),
        "User-Agent": f"consentos-telemetry/{target.schema}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    # The settings have chosen the proxy, because httpx cannot read every entry of NO_PROXY.
    proxy = target.proxy and httpx.Proxy(
        target.proxy, ssl_context=tls_context() if target.proxy.startswith("https:") else None
    )
    # A new client for each POST keeps no cookie and no connection. httpx's own time-outs are off,
    # because they start again with each byte.
    async with (
        asyncio.timeout(target.timeout),
        httpx.AsyncClient(
            verify=_context_for(target),
            proxy=proxy or None,
            trust_env=False,
            timeout=None,  # noqa: S113 - asyncio.timeout above is the deadline
            follow_redirects=False,
        ) as client,
        client.stream(method, target.endpoint, content=body, headers=headers) as response,
    ):
        asked = set(response.headers.get_list("Retry-After"))  # a header may come twice
        answer = await _read(response) if response.status_code in read else b""
        return response.status_code, ", ".join(asked) or None, answer


class _TooLongError(Exception):
    """An answer is longer than ``LONGEST_ANSWER``."""


async def _read(response: httpx.Response) -> bytes:
    """Read an answer without unpacking it, because a small answer could unpack to any size."""
    answer = bytearray()
    async for piece in response.aiter_raw():
        answer += piece
        if len(answer) > LONGEST_ANSWER:
            raise _TooLongError
    return bytes(answer)


def _kind(failure: BaseException) -> str:
    """Name a failure in fixed words, because its own text may contain the endpoint's query."""
    causes: list[BaseException] = []
    to_see: list[BaseException | None] = [failure]
    while to_see:
        cause = to_see.pop()
        if cause is None or cause in causes:
            continue
        causes.append(cause)
        to_see.append(cause.__cause__ or cause.__context__)
        # A host with several addresses can fail in several ways at once.
        if isinstance(cause, BaseExceptionGroup):
            to_see.extend(cause.exceptions)
    for kind, word in _KINDS:
        for each in causes:
            if isinstance(each, kind):
                return _why_no_tls(each) if isinstance(each, ssl.SSLError) else word
    return "connection"


def _why_no_tls(error: ssl.SSLError) -> str:
    """Name what OpenSSL found wrong, if those words are known to contain no value."""
    if isinstance(error, ssl.SSLCertVerificationError):
        found = str(error.verify_message)
        # Python adds the host's name to these two.
        known = next((each for each in _MISMATCHES if found.startswith(each)), found)
        return f"tls: {known}" if known in _MISMATCHES + _VERIFY_MESSAGES else "tls"
    reason = _HANDSHAKES.get(str(error.reason))
    return f"tls: {reason}" if reason else "tls"


_MISMATCHES = ("Hostname mismatch", "IP address mismatch")

_VERIFY_MESSAGES = (
    "certificate has expired",
    "certificate is not yet valid",
    "self-signed certificate",
    "self-signed certificate in certificate chain",
    "unable to get issuer certificate",
    "unable to get local issuer certificate",
    "unable to verify the first certificate",
    "certificate signature failure",
    "invalid CA certificate",
    "path length constraint exceeded",
    "unsuitable certificate purpose",
    "certificate revoked",
    "EE certificate key too weak",
    "CA certificate key too weak",
    "CA signature digest algorithm too weak",
    "CA cert does not include key usage extension",
    "Basic Constraints of CA cert not marked critical",
    "Missing Authority Key Identifier",
    "Missing Subject Key Identifier",
)
"""OpenSSL's own words for what is wrong with a certificate."""

_NOT_TLS, _NO_VERSION = "the receiver does not speak TLS", "no TLS version in common"
_HANDSHAKES = {
    "WRONG_VERSION_NUMBER": _NOT_TLS,
    "RECORD_LAYER_FAILURE": _NOT_TLS,
    "HTTP_REQUEST": _NOT_TLS,
    "UNSUPPORTED_PROTOCOL": _NO_VERSION,
    "TLSV1_ALERT_PROTOCOL_VERSION": _NO_VERSION,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the receiver refuses the handshake",
    "TLSV1_UNRECOGNIZED_NAME": "the receiver does not know the host's name",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the receiver asks for a client certificate",
    "UNEXPECTED_EOF_WHILE_READING": "the connection ended in the handshake",
}
"""OpenSSL's reasons, by name, in plain words."""


# The deadline comes first, because a read over TLS that it ends also raises an SSLWantReadError.
_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, "deadline"),
    (_TooLongError, "its answer is too long"),
    (UnreadableCertificatesError, "tls: SSL_CERT_FILE cannot be read"),
    (socket.gaierror, "dns"),
    (UnicodeError, "dns"),
    (ssl.SSLError, "tls"),
    (httpx.ProxyError, "proxy"),
    (ConnectionRefusedError, "refused"),
    (ConnectionResetError, "reset"),
    (httpx.ProtocolError, "protocol"),
    (SOCKSError, "proxy"),
)


def parse_retry_after(value: str | None, now: datetime) -> timedelta | None:
    """Return how long a Retry-After asks to wait (RFC 9110, section 10.2.3).

    The result is ``None`` without the header, if it cannot be parsed, or if it asks for no wait.
    """
    text = (value or "").strip()
    same = set(re.split(r"\s*,\s*", text))  # a proxy may join two headers
    text = same.pop() if len(same) == 1 else text
    if re.fullmatch(r"[0-9]+", text):
        # Nine digits are 31 years: longer than any wait, and short enough for an integer.
        asked = timedelta(seconds=int(text.lstrip("0")[:9] or "0"))
    else:
        try:
            date = parsedate_to_datetime(text)
            asked = (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
        except (ValueError, OverflowError):
            return None
    return asked if asked > timedelta() else None
