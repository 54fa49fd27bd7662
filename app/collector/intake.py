"""What senders ask for: to keep a heartbeat, to read what is held of an install, to forget it."""

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
"""So often a heartbeat of a schema that is not known yet is sent again: it is kept where it comes
from until its day ends, and the collector may be upgraded by then."""
MAX_VERSION = 999_999_999
NOT_STORED = {"Cache-Control": "no-store"}
NOBODYS = {str(UUID(int=0)), str(UUID(int=2**128 - 1))}
"""The nil and the max UUID: what an id is where none was made."""
ACCEPTED = Response(status_code=202)
EXPLAINED = (HTTPException, UnavailableError, RefusedError)
"""What a request may fail with; anything else is a fault, and logged."""

_SENT_AT: TypeAdapter[str] = TypeAdapter(payload.SentAt)


class NotAHeartbeat(HTTPException):
    """The body is refused with 400."""

    def __init__(self, sentence: str, details: Sequence[Mapping[str, str]] = ()) -> None:
        """Say so in ``sentence``; ``details`` name what is wrong where, and repeat no value."""
        super().__init__(400, sentence)
        self.details = list(details)


class TooManyIdsError(HTTPException):
    """The client has brought as many different installs as it may in a day."""

    def __init__(self, seconds: int) -> None:
        """Say that the day ends in so many ``seconds``."""
        super().__init__(429, "Too many installs.", {"Retry-After": str(seconds)})


class NewerSchemaError(UnavailableError):
    """The body is of a ``telemetry_schema`` that only a newer collector knows."""

    def __init__(self, version: int | None) -> None:
        """Name the ``version`` unless its number is longer than any could be."""
        self.version = version if version is not None and version <= MAX_VERSION else None
        words = ["telemetry_schema"] if self.version is None else ["telemetry_schema", self.version]
        super().__init__(
            f"This collector does not know {' '.join(map(str, words))} yet; try again later.",
            seconds=NEWER_SCHEMA_SECONDS,
        )


class Heartbeats:
    """Takes heartbeats: an ASGI application, so that the server may call it before any router."""

    path = "/v1/heartbeat"

    def __init__(
        self,
        inbox: Inbox,
        outcomes: Outcomes,
        limiter: Limiter | None,
        daily: DailyInstalls | None,
        body_seconds: float,
    ) -> None:
        """Bring them to ``inbox``, and count in ``outcomes`` how each fares.

        ``daily`` limits what one client may send. A body that takes longer than ``body_seconds`` to
        arrive is refused.
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
        headers = dict(reversed(scope["headers"]))  # of several with one name, the first
        # First of all: who is refused while it still speaks may be cut off before it has heard why.
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
    """Return the routes of a sender, which ``limiter`` guards together."""

    # One route, since of two with the same path the first would answer for every other method.
    async def install(request: Request) -> Response:
        _take_token(request.scope, limiter)
        instance_id = _instance_id(request.path_params["instance_id"])
        if request.method == "DELETE":
            await inbox.forget(instance_id)
            # There may be a body, which is not worth reading.
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
    # The rest of a refused body is not worth reading: without this the server reads it to its end.
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
        NewerSchemaError: it is of a schema that this collector does not know yet.
        NotAHeartbeat: it is not of a schema, or its id is nobody's.
    """
    try:
        found = payload.parse(body)
    except payload.NewerSchemaError as error:
        raise NewerSchemaError(error.version) from None
    except payload.NotAHeartbeatError as error:
        details = [{"field": flaw.field, "problem": flaw.problem} for flaw in error.flaws]
        raise NotAHeartbeat(str(error), details[:MAX_DETAILS]) from None
    if found.instance_id in NOBODYS:
        problem = "is the nil or the max UUID, and nobody's"
        raise NotAHeartbeat(
            "This is no install's id.", [{"field": "instance_id", "problem": problem}]
        )
    return found
