"""The routes of the page, its numbers as JSON and CSV, the badge and the feed.

A cached answer is sent at once, without a thread and without the database.
"""

import asyncio
import csv
import io
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.collector import badge, exports, rendering
from app.collector.answers import (
    LAST_DAY,
    YEAR,
    Answer,
    Answers,
    NotShownError,
    Query,
    Render,
    State,
    parse,
)
from app.collector.caching import HEADERS, IMMUTABLE, NO_STORE, PRIVATE, PUBLIC, respond
from app.collector.reading import Readers
from app.collector.rendering import Templates
from app.collector.stats import Stats

RENDERING_AT_ONCE = 1
"""At most so many threads read and render answers. The other threads of the pool stay free for
requests that read what is stored under an id."""
MOST_A_SECOND = 1_000
"""One process sends at most this many of these answers a second; a request beyond that waits. The
rest of the process's time is for heartbeats."""
BURST_SECONDS = 0.02
"""Answers that were not requested within this time may be sent at once."""

_SVG = "image/svg+xml"


@dataclass(frozen=True)
class _Format:
    """A form of an answer: how it is rendered, and how an error is answered in this form."""

    media_type: str
    render: Render
    refuse: Callable[[NotShownError], Response]
    query: Query | None = None
    """What it shows, if the query string does not decide that."""


def routes(readers: Readers, templates: Templates, *, private: bool = False) -> list[Route]:
    """Return the routes of the page, its two other forms, the badge, the feed, and the style.

    If they are ``private``, no shared cache may store an answer.
    """
    endpoints = _Endpoints(Answers(readers), PRIVATE if private else PUBLIC)

    def page(stats: Stats, query: Query, state: State) -> str:
        return templates.page(
            stats,
            days=query.days,
            query=query.shortest,
            counting_stopped=state.counting_stopped,
            requests=state.requests,
        )

    def refused(error: NotShownError) -> Response:
        return HTMLResponse(templates.refusal(error.sentence), error.status, NO_STORE)

    def picture(stats: Stats, _: Query, state: State) -> str:
        return templates.picture(badge.of(stats, counting_stopped=state.counting_stopped))

    def refused_picture(error: NotShownError) -> Response:
        drawn = templates.picture(badge.unavailable(error.sentence))
        return Response(drawn, error.status, NO_STORE, _SVG)

    def feed(stats: Stats, _: Query, state: State) -> str:
        return templates.feed(stats, counting_stopped=state.counting_stopped)

    formats: dict[str, _Format] = {
        "/": _Format("text/html", page, refused),
        "/v1/stats.json": _Format("application/json", _document, _refused_document),
        "/v1/stats.csv": _Format("text/csv", _lines, _refused_lines),
        "/badge.svg": _Format(_SVG, picture, refused_picture, LAST_DAY),
        "/v1/badge.json": _Format("application/json", _badge, _refused_document, LAST_DAY),
        "/feed.atom": _Format("application/atom+xml", feed, _refused_lines, YEAR),
    }
    style_path, style = rendering.style()

    def as_style(_: Request) -> Response:
        return Response(style, headers=IMMUTABLE, media_type="text/css")

    return [
        *(Route(path, endpoints.of(each)) for path, each in formats.items()),
        Route(style_path, as_style),
    ]


def _document(stats: Stats, _: Query, __: State) -> str:
    return json.dumps(exports.document(stats), separators=(",", ":"))


def _badge(stats: Stats, _: Query, state: State) -> str:
    shown = badge.of(stats, counting_stopped=state.counting_stopped)
    return json.dumps(badge.document(shown), separators=(",", ":"))


def _refused_document(error: NotShownError) -> Response:
    return JSONResponse({"error": error.sentence}, error.status, NO_STORE)


def _lines(stats: Stats, _: Query, __: State) -> str:
    found = io.StringIO()
    csv.writer(found).writerows(exports.rows(stats))
    return found.getvalue()


def _refused_lines(error: NotShownError) -> Response:
    return PlainTextResponse(f"{error.sentence}\n", error.status, NO_STORE)


class _Pace:
    """Lets requests through one after the other, at most ``MOST_A_SECOND`` of them.

    In each turn of the event loop, at most one request gets through; heartbeats are not limited.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._next = 0.0

    async def wait(self) -> None:
        async with self._lock:
            now = asyncio.get_running_loop().time()
            self._next = max(self._next, now - BURST_SECONDS) + 1 / MOST_A_SECOND
            await asyncio.sleep(max(self._next - now, 0.0))


class _Endpoints:
    """Makes the endpoints, which share the cache and the limits."""

    def __init__(self, answers: Answers, caching: Mapping[str, str]) -> None:
        self._answers = answers
        self._caching = caching
        self._rendering = asyncio.Semaphore(RENDERING_AT_ONCE)
        self._pace = _Pace()

    def of(self, form: _Format) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint that answers in a form."""

        async def answer(request: Request) -> Response:
            try:
                query = form.query or parse(request.query_params)
                found = await self._find(form, query)
            except NotShownError as error:
                return form.refuse(error)
            headers = {**HEADERS, **self._caching, "ETag": found.etag}
            return respond(request, found.body, headers, form.media_type)

        return answer

    async def _find(self, form: _Format, query: Query) -> Answer:
        await self._pace.wait()
        if cached := self._answers.cached(form.render, query):
            return cached
        async with self._rendering:
            return await run_in_threadpool(self._answers.get, form.render, query)
