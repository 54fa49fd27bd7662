"""What senders ask for: to keep a heartbeat, to read what is held of an install, to forget it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import payload
from app.collector.holdings import Holdings
from app.collector.inbox import Inbox, UnavailableError
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
NOBODYS = {UUID(int=0), UUID(int=2**128 - 1)}
"""The nil and the max UUID: what an id is where none was made."""

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


def routes(
    inbox: Inbox,
    holdings: Holdings,
    outcomes: Outcomes,
    limiter: Limiter | None,
    daily: DailyInstalls | None,
    body_seconds: float,
) -> list[Route]:
    """Return the routes of a sender, which ``limiter`` guards together.

    ``daily`` limits what one client may send. A body that takes longer than ``body_seconds`` to
    arrive is refused. How a heartbeat fares is counted in ``outcomes``.
    """
    refused = Tally("collector.too_many_ids")

    def admit(request: Request, instance_id: UUID) -> None:
        if daily and (seconds := daily.admit(caller(request.scope), instance_id, time.time())):
            refused.add(time.monotonic())
            raise TooManyIdsError(seconds)

    async def keep(request: Request) -> bool:
        # First of all: who is refused while it still speaks may be cut off before it has heard why.
        body = await _read(request, body_seconds)
        _take_token(request, limiter)
        _check(request.headers)
        found = parse(body)
        admit(request, UUID(found.instance_id))
        return await inbox.keep(found)

    async def heartbeat(request: Request) -> Response:
        outcomes.came_from(caller(request.scope))
        try:
            new = await keep(request)
        except NewerSchemaError as error:
            outcomes.newer_schema(error.version)
            raise
        except Exception as error:
            outcomes.count(_outcome(error))
            raise
        outcomes.count("accepted" if new else "duplicate")
        return Response(status_code=202)

    # One route, since of two with the same path the first would answer for every other method.
    async def install(request: Request) -> Response:
        _take_token(request, limiter)
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
        Route("/v1/heartbeat", heartbeat, methods=["POST"]),
        Route("/v1/installs/{instance_id}", install, methods=["GET", "DELETE"]),
    ]


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


def _take_token(request: Request, limiter: Limiter | None) -> None:
    if limiter is None:
        return
    if seconds := limiter.take(caller(request.scope), time.monotonic()):
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
            400, "after has to look like 2026-05-02T02:30:00+00:00, with its + written as %2B."
        ) from None


def _check(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise HTTPException(415, "Content-Type must be application/json.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "Content-Encoding must be identity.")


def _too_large() -> HTTPException:
    return HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")


async def _read(request: Request, seconds: float) -> bytes:
    if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > MAX_BODY_BYTES:
                    raise _too_large()
                body += chunk
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise NotAHeartbeat("The body ended early.") from None
    return bytes(body)


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
    if UUID(found.instance_id) in NOBODYS:
        problem = "is the nil or the max UUID, and nobody's"
        raise NotAHeartbeat(
            "This is no install's id.", [{"field": "instance_id", "problem": problem}]
        )
    return found
