"""The collector's web application: one route, closed in what it takes and in what it tells."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.collector import store
from app.payload import SCHEMA_VERSION, Heartbeat

MAX_BODY_BYTES = 16 * 1024
BODY_SECONDS = 10.0
MAX_DETAILS = 10
RETRY = {"Retry-After": "60"}

log = logging.getLogger("app.collector")


class NotAHeartbeat(HTTPException):
    """The body is refused with 400."""

    def __init__(self, sentence: str, details: Sequence[Mapping[str, str]] = ()) -> None:
        """Say so in ``sentence``; ``details`` name what is wrong where, and repeat no value."""
        super().__init__(400, sentence)
        self.details = list(details)


def create_app(engine: Engine, *, body_seconds: float = BODY_SECONDS) -> Starlette:
    """Return the application, which disposes of ``engine`` when it shuts down.

    A body that takes longer than ``body_seconds`` to arrive is refused.
    """

    async def heartbeat(request: Request) -> Response:
        _check(request.headers)
        body = await _read(request, body_seconds)
        await run_in_threadpool(_keep, engine, parse(body))
        return Response(status_code=202)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        engine.dispose()

    app = Starlette(
        routes=[Route("/v1/heartbeat", heartbeat, methods=["POST"])],
        lifespan=lifespan,
        exception_handlers={HTTPException: _explain, Exception: _explain},
    )
    app.router.redirect_slashes = False
    return app


def _check(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise HTTPException(415, "Content-Type must be application/json.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "Content-Encoding must be identity.")
    if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise _too_large()


def _too_large() -> HTTPException:
    return HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")


async def _read(request: Request, seconds: float) -> bytes:
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


def parse(body: bytes) -> Heartbeat:
    """Return the heartbeat in ``body``.

    Raises:
        NotAHeartbeat: it is not UTF-8, not JSON, names a field twice, or does not fit the schema.
    """
    try:
        text = body.decode()
        heartbeat = Heartbeat.model_validate_json(text)
    except UnicodeDecodeError:
        raise NotAHeartbeat("The body is not UTF-8.") from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise NotAHeartbeat(
            f"This collector takes heartbeats of telemetry_schema {SCHEMA_VERSION} only, "
            "and this is not one.",
            [_detail(each) for each in found[:MAX_DETAILS]],
        ) from None
    # Only now: pydantic has bounded the depth, and takes the last of two values without a word.
    json.loads(text, object_pairs_hook=_refuse_twins)
    return heartbeat


def _refuse_twins(pairs: Iterable[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        raise NotAHeartbeat("The body names a field twice.")


def _detail(error: ErrorDetails) -> dict[str, str]:
    # Field names come from outside as well; and the words of a ValueError may hold the value.
    names = (re.sub(r"[^A-Za-z0-9_]", "?", str(name))[:64] for name in error["loc"])
    problem = "Value is not possible" if error["type"] == "value_error" else error["msg"]
    return {"field": ".".join(names), "problem": problem[:200]}


def _keep(engine: Engine, heartbeat: Heartbeat) -> None:
    try:
        store.insert(engine, heartbeat)
    except SQLAlchemyError as error:
        log.error("collector.failed error=%s", store.cause(error))  # noqa: TRY400
        raise HTTPException(503, "The database is not available.", RETRY) from None


async def _explain(_: Request, error: Exception) -> Response:
    match error:
        case NotAHeartbeat():
            return _answer(400, {"error": error.detail, "details": error.details})
        case HTTPException():
            return _answer(error.status_code, {"error": error.detail}, error.headers)
    # Starlette raises the error once more after this answer, and the server logs it.
    return _answer(500, {"error": "The collector failed."})


def _answer(
    status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None
) -> Response:
    # The rest of a refused body is not worth reading: without this the server reads it to its end.
    return JSONResponse(body, status, {**(headers or {}), "Connection": "close"})
