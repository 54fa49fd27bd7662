"""The collector's web application: the routes for senders, the page, and their description."""

import base64
import binascii
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hmac import compare_digest

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.collector import contents, health, intake, metrics, openapi, page, refusal, store
from app.collector.health import Health
from app.collector.holdings import Holdings
from app.collector.housekeeping import housekeeping
from app.collector.inbox import Inbox
from app.collector.limit import Busiest, DailyInstalls, Limiter, caller
from app.collector.lines import Tally
from app.collector.outcomes import Outcomes
from app.collector.reading import Readers
from app.collector.rendering import Templates
from app.settings.collector import CollectorSettings

BODY_SECONDS = 10.0
GUESSES = 10
"""How many wrong tokens one client may try in a minute."""
ASK = {"WWW-Authenticate": 'Basic realm="ConsentOS telemetry", charset="UTF-8"'}

log = logging.getLogger(__package__)


def create_app(
    engine: Engine,
    settings: CollectorSettings,
    *,
    body_seconds: float = BODY_SECONDS,
    registry: CollectorRegistry | None = None,
) -> Starlette:
    """Return the application, which disposes of ``engine`` when it shuts down.

    It reads through ``engine``; the page is read from the standby, if there is one. It writes
    through separate connections to the same database, so that readers never delay a write. Its
    metrics are added to ``registry``.
    """
    writing = store.connect(engine.url)
    inbox = Inbox(
        writing,
        established_days=settings.collector_established_days,
        timed=metrics.commits(registry).observe,
    )
    # Without limits it does not matter how many clients share one address.
    limited = settings.collector_client_rate or settings.collector_client_installs
    outcomes = Outcomes(Busiest() if limited else None)
    state = Health(engine.url, inbox)
    if registry:
        metrics.register(registry, outcomes=outcomes, inbox=inbox, health=state)
    readers = Readers(engine, settings.standby)
    holdings = Holdings(engine, settings.collector_retention_days)
    limiter = Limiter(settings.collector_client_rate) if settings.collector_client_rate else None
    most = settings.collector_client_installs
    daily = DailyInstalls(most) if most else None
    heartbeats = intake.Heartbeats(inbox, outcomes, limiter, daily, body_seconds)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        work = housekeeping(writing, settings.collector_retention_days, outcomes)
        with work, inbox, state.watching(), readers.watching():
            yield
        for each in (engine, writing):
            each.dispose()

    templates = Templates(
        established_days=settings.collector_established_days,
        private=settings.collector_token is not None,
    )
    app = _Application(
        routes=[
            *intake.routes(heartbeats, inbox, holdings, limiter),
            Route("/v1/openapi.json", _describe),
            *health.routes(state),
            *contents.routes(templates, settings.collector_retention_days),
            *_page(readers, templates, settings),
        ],
        lifespan=lifespan,
        exception_handlers=dict.fromkeys((*intake.EXPLAINED, Exception), _explain(templates)),
    )
    app.router.redirect_slashes = False
    app.heartbeats = heartbeats
    return app


class _Application(Starlette):
    """Calls ``heartbeats`` for a heartbeat, and the routes for everything else.

    Starlette's middleware and router would take a seventh of the time of a heartbeat.
    """

    heartbeats: intake.Heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        post = scope["type"] == "http" and scope["method"] == "POST"
        if post and scope["path"] == self.heartbeats.path:
            await self.heartbeats(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


async def _describe(_: Request) -> Response:
    return JSONResponse(openapi.document())


def _page(readers: Readers, templates: Templates, settings: CollectorSettings) -> list[BaseRoute]:
    """Return the page's routes; if a token is set, all except the static files require it."""
    found = page.routes(readers, templates, private=settings.collector_token is not None)
    if settings.collector_token is not None:
        guard = _Guard(settings.collector_token.get_secret_value())
        for route in found:
            if not route.path.startswith("/static/"):
                route.app = _Gate(route.app, guard)
    return [*found]


class _Guard:
    """Compares tokens, and limits how many wrong ones a client may try."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._guesses = Limiter(GUESSES)
        self._wrong = Tally("collector.wrong_token")

    def check(self, scope: Scope) -> None:
        """Raise HTTPException unless the token is right and its client has not guessed too often.

        A request without a token is not a guess: the first one of a browser has none.
        """
        headers, client, now = Headers(scope=scope), caller(scope), time.monotonic()
        if "authorization" in headers:
            # Check this first: otherwise a client that goes on guessing would see the right token.
            if seconds := self._guesses.wait(client, now):
                raise HTTPException(429, "Too many wrong tokens.", {"Retry-After": str(seconds)})
            if compare_digest(_given(headers), self._token):
                return
            self._guesses.take(client, now)
            self._wrong.add(now)
        raise HTTPException(401, "This needs the token of this collector.", ASK)


class _Gate:
    """Calls ``app`` only for requests with the token."""

    def __init__(self, app: ASGIApp, guard: _Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard.check(scope)
        await self._app(scope, receive, send)


def _given(headers: Headers) -> bytes:
    """Return the token of a request: a Bearer's, or the password of any user."""
    scheme, _, words = headers.get("authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return words.strip().encode("latin-1")
        case "basic":
            try:
                return base64.b64decode(words.strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return b""
    return b""


def _explain(templates: Templates) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def explain(request: Request, error: Exception) -> Response:
        # Starlette raises an error that is not EXPLAINED again after this answer, and the server
        # logs it.
        return refusal.of(request, error, templates)

    return explain
