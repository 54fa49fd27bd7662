"""The routes for senders: store a heartbeat, read what is held of an install, delete it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app import payload
from app.collector.holdings import Holdings
from app.collector.inbox import Inbox, RefusedError, UnavailableError
from app.collector.limit import DailyInstalls, Limiter, caller
from app.collector.lines import Tally
from app.collector.outcomes import Outcome, Outcomes

MAX_BODY_BYTES = 16 * 1024
MAX_DETAILS = 10
NEWER_SCHEMA_SECONDS = 6 * 60 * 60
"""Retry-After for a schema that this collector does not support yet: the sender stores the
heartbeat until its day ends, and the collector may be upgraded by then."""
MAX_VERSION = 999_999_999
NOT_STORED = {"Cache-Control": "no-store"}
PLACEHOLDERS = {str(UUID(int=0)), str(UUID(int=2**128 - 1))}
"""The nil and the max UUID: placeholders that belong to no install."""
ACCEPTED = Response(status_code=202)
EXPLAINED = (HTTPException, UnavailableError, RefusedError)
"""The errors that are explained to the client; any other is a bug, and is logged."""

_SENT_AT: TypeAdapter[str] = TypeAdapter(payload.SentAt)


class NotAHeartbeat(HTTPException):
    """The body is refused with 400."""

    def __init__(self, sentence: str, details: Sequence[Mapping[str, str]] = ()) -> None:
        """Take a sentence, and details that name what is wrong where, without any value."""
        super().__init__(400, sentence)
        self.details = list(details)


class TooManyIdsError(HTTPException):
    """The client has sent heartbeats of as many different installs as it may in a day."""

    def __init__(self, seconds: int) -> None:
        """Take the seconds until the day ends."""
        super().__init__(429, "Too many installs.", {"Retry-After": str(seconds)})


class NewerSchemaError(UnavailableError):
    """The body has a ``telemetry_schema`` that only a newer collector supports."""

    def __init__(self, version: int | None) -> None:
        """Name the ``version``, unless its number is absurdly long."""
        self.version = version if version is not None and version <= MAX_VERSION else None
        words = ["telemetry_schema"] if self.version is None else ["telemetry_schema", self.version]
        super().__init__(
            f"This collector does not support {' '.join(map(str, words))} yet; try again later.",
            seconds=NEWER_SCHEMA_SECONDS,
        )


class Heartbeats:
    """Accepts heartbeats: an ASGI application, so that it can be called without a router."""

    path = "/v1/heartbeat"

    def __init__(
        self,
        inbox: Inbox,
        outcomes: Outcomes,
        limiter: Limiter | None,
        daily: DailyInstalls | None,
        body_seconds: float,
    ) -> None:
        """Store them through ``inbox``, and count the outcome of each in ``outcomes``.

        ``daily`` limits how many installs one client may send for. A body that takes longer than
        ``body_seconds`` to arrive is refused.
        """
        self._inbox = inbox
        self._outcomes = outcomes
        self._limiter = limiter
        self._daily = daily
        self._body_seconds = body_seconds
        self._refused = Tally("collector.too_many_ids")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 202 once the heartbeat is committed."""
        self._outcomes.count_client(caller(scope))
        try:
            new = await self._store(scope, receive)
        except Exception as error:
            if isinstance(error, NewerSchemaError):
                self._outcomes.newer_schema(error.version)
            else:
                self._outcomes.count(_outcome(error))
            await explain(error)(scope, receive, send)
            if not isinstance(error, EXPLAINED):
                raise  # for the server to log
        else:
            self._outcomes.count("accepted" if new else "duplicate")
            await ACCEPTED(scope, receive, send)

    async def _store(self, scope: Scope, receive: Receive) -> bool:
        headers = dict(reversed(scope["headers"]))  # of several with the same name, the first
        # Read the body first: a client that is refused while sending may see a reset instead of the
        # answer.
        body = await _read(headers, receive, self._body_seconds)
        _take_token(scope, self._limiter)
        _check(headers)
        found = parse(body)
        if self._daily:
            self._admit(self._daily, caller(scope), found)
        return await self._inbox.store(found)

    def _admit(self, daily: DailyInstalls, client: str, found: payload.Heartbeat) -> None:
        if seconds := daily.admit(client, UUID(found.instance_id), time.time()):
            self._refused.add(time.monotonic())
            raise TooManyIdsError(seconds)


def routes(
    heartbeats: Heartbeats, inbox: Inbox, holdings: Holdings, limiter: Limiter | None
) -> list[Route]:
    """Return the routes for senders; ``limiter`` limits all of them together."""

    # One route for both methods: of two routes with one path, Starlette calls only the first.
    async def install(request: Request) -> Response:
        _take_token(request.scope, limiter)
        instance_id = _instance_id(request.path_params["instance_id"])
        if request.method == "DELETE":
            await inbox.forget(instance_id)
            # Close the connection: a body, if there is one, is not read.
            return Response(status_code=204, headers={**NOT_STORED, "Connection": "close"})
        after = _after(request.query_params)
        held = await run_in_threadpool(holdings.of, instance_id, after=after)
        if held is None:
            nothing = {
                "error": "Nothing is held under this id.",
                "retention_days": holdings.retention_days,
            }
            return JSONResponse(nothing, 404, NOT_STORED)
        return JSONResponse(held, headers=NOT_STORED)

    return [
        Route(heartbeats.path, heartbeats, methods=["POST"]),
        Route("/v1/installs/{instance_id}", install, methods=["GET", "DELETE"]),
    ]


def explain(error: Exception) -> Response:
    """Return the answer to a request that has failed."""
    match error:
        case NotAHeartbeat():
            return _answer(400, {"error": error.detail, "details": error.details})
        case HTTPException():
            return _answer(error.status_code, {"error": error.detail}, error.headers)
        case UnavailableError():
            return _answer(503, {"error": str(error)}, {"Retry-After": str(error.seconds)})
        case RefusedError():
            return _answer(500, {"error": str(error)})
    return _answer(500, {"error": "The collector failed."})


def _answer(
    status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None
) -> Response:
    # Without this header the server would read a refused body to its end.
    refused = {**(headers or {}), **NOT_STORED, "Connection": "close"}
    return JSONResponse(body, status, refused)


def _outcome(error: Exception) -> Outcome:
    match error:
        case HTTPException(status_code=413):
            return "too large"
        case TooManyIdsError():
            return "too many ids"
        case HTTPException(status_code=429):
            return "rate-limited"
        case HTTPException():
            return "invalid"
    return "unavailable"


def _take_token(scope: Scope, limiter: Limiter | None) -> None:
    if limiter is None:
        return
    if seconds := limiter.take(caller(scope), time.monotonic()):
        raise HTTPException(429, "Too many requests.", {"Retry-After": str(seconds)})


def _instance_id(name: str) -> UUID:
    try:
        instance_id = UUID(name)
    except ValueError:
        instance_id = None
    if str(instance_id) != name:
        raise HTTPException(400, "An instance id is a UUID in lower case, with its hyphens.")
    return UUID(name)


def _after(query: Mapping[str, str]) -> str | None:
    if "after" not in query:
        return None
    try:
        return _SENT_AT.validate_python(query["after"])
    except ValidationError:
        raise HTTPException(
            400, "after must look like 2026-05-02T02:30:00+00:00, with its + written as %2B."
        ) from None


def _check(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0]
    if kind.strip().lower() != b"application/json":
        raise HTTPException(415, "Content-Type must be application/json.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise HTTPException(415, "Content-Encoding must be identity.")


def _too_large() -> HTTPException:
    return HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")


async def _read(headers: Mapping[bytes, bytes], receive: Receive, seconds: float) -> bytes:
    if int(headers.get(b"content-length", 0)) > MAX_BODY_BYTES:
        raise _too_large()
    body = b""
    more = True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise NotAHeartbeat("The body ended early.")
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                more = message.get("more_body", False)
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {seconds:g} seconds.") from None
    return body


def parse(body: bytes) -> payload.Heartbeat:
    """Return the heartbeat in ``body``.

    Raises:
        NewerSchemaError: its schema is newer than those that this collector supports.
        NotAHeartbeat: it fits no schema, or its id is a placeholder.
    """
    try:
        found = payload.parse(body)
    except payload.NewerSchemaError as error:
        raise NewerSchemaError(error.version) from None
    except payload.NotAHeartbeatError as error:
        details = [{"field": flaw.field, "problem": flaw.problem} for flaw in error.flaws]
        raise NotAHeartbeat(str(error), details[:MAX_DETAILS]) from None
    if found.instance_id in PLACEHOLDERS:
        problem = "is the nil or the max UUID"
        raise NotAHeartbeat(
            "This id belongs to no install.", [{"field": "instance_id", "problem": problem}]
        )
    return found
