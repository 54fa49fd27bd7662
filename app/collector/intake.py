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
from app.collector.inbox import Inbox
from app.collector.limit import Limiter

MAX_BODY_BYTES = 16 * 1024
MAX_DETAILS = 10
NOT_STORED = {"Cache-Control": "no-store"}

_SENT_AT: TypeAdapter[str] = TypeAdapter(payload.SentAt)


class NotAHeartbeat(HTTPException):
    """The body is refused with 400."""

    def __init__(self, sentence: str, details: Sequence[Mapping[str, str]] = ()) -> None:
        """Say so in ``sentence``; ``details`` name what is wrong where, and repeat no value."""
        super().__init__(400, sentence)
        self.details = list(details)


def routes(
    inbox: Inbox, holdings: Holdings, limiter: Limiter | None, body_seconds: float
) -> list[Route]:
    """Return the routes of a sender, which ``limiter`` guards together.

    A body that takes longer than ``body_seconds`` to arrive is refused.
    """

    async def heartbeat(request: Request) -> Response:
        # First of all: who is refused while it still speaks may be cut off before it has heard why.
        body = await _read(request, body_seconds)
        _take_token(request, limiter)
        _check(request.headers)
        await inbox.keep(parse(body))
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


def _take_token(request: Request, limiter: Limiter | None) -> None:
    if limiter is None:
        return
    address = request.client.host if request.client else ""
    if seconds := limiter.take(address, time.monotonic()):
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
        payload.NewerSchemaError: it is of a schema that this collector does not know yet.
        NotAHeartbeat: it is not of a schema.
    """
    try:
        return payload.parse(body)
    except payload.NewerSchemaError:
        raise
    except payload.NotAHeartbeatError as error:
        details = [{"field": flaw.field, "problem": flaw.problem} for flaw in error.flaws]
        raise NotAHeartbeat(str(error), details[:MAX_DETAILS]) from None
