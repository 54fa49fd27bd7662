"""What the collector shows: a page without a script, and the same numbers as JSON and as CSV."""

import csv
import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.collector import daily, stats, store, view
from app.payload import Edition, Version

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, max-age=60",
}
FOR_EVER = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
NEVER = {**HEADERS, "Cache-Control": "no-store"}

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUND = text("SELECT set_config('statement_timeout', '5s', true)")

log = logging.getLogger("app.collector")


class _Asked(BaseModel):
    """What the query may say; what it does not name or leaves empty is the default."""

    model_config = ConfigDict(frozen=True)

    days: Literal["30", "90", "365"] = "90"
    version: Version | None = None
    edition: Edition | None = None


_WRONG = {
    "days": "The number of days has to be 30, 90 or 365.",
    "version": "A version has to look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1.",
    "edition": "The edition has to be ce or ee.",
}


@dataclass(frozen=True)
class _RefusalError(Exception):
    """Nothing can be shown, and a sentence says why."""

    status: int
    sentence: str


class Templates:
    """The HTML of what is told, and of why nothing is."""

    def __init__(self, style: str) -> None:
        """Have every page be styled by what is at the path ``style``."""
        self._templates = Environment(
            loader=PackageLoader("app.collector"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(style=style, long_date=view.long_date)

    def page(self, told: stats.Stats, *, days: str, query: str) -> str:
        """Return the page for a choice of ``days`` and the ``query`` that it came with."""
        return self._templates.get_template("page.html").render(
            stats=told, view=view.of(told), days=days, query=query, ranges=view.RANGES
        )

    def refusal(self, sentence: str) -> str:
        """Return a page that says why there is nothing to show."""
        return self._templates.get_template("refusal.html").render(sentence=sentence)


def routes(engine: Engine) -> list[Route]:
    """Return the routes of the page, of its two other forms and of its style.

    Each request reads the daily numbers, and no install, in one transaction that cannot write.
    """
    style = files("app.collector").joinpath("static", "style.css").read_bytes()
    style_path = f"/static/style-{hashlib.sha256(style).hexdigest()[:12]}.css"
    templates = Templates(style_path)

    def show(request: Request) -> Response:
        try:
            asked = _asked(request.query_params)
            told = read(engine, asked)
        except _RefusalError as refusal:
            html = templates.refusal(refusal.sentence)
            return HTMLResponse(html, refusal.status, NEVER)
        html = templates.page(told, days=asked.days, query=request.url.query)
        return HTMLResponse(html, headers=HEADERS)

    def as_json(request: Request) -> Response:
        try:
            told = read(engine, _asked(request.query_params))
        except _RefusalError as refusal:
            return JSONResponse({"error": refusal.sentence}, refusal.status, NEVER)
        return JSONResponse(stats.document(told), headers=HEADERS)

    def as_csv(request: Request) -> Response:
        try:
            told = read(engine, _asked(request.query_params))
        except _RefusalError as refusal:
            return PlainTextResponse(f"{refusal.sentence}\n", refusal.status, NEVER)
        lines = io.StringIO()
        csv.writer(lines).writerows(stats.rows(told))
        return Response(lines.getvalue(), headers=HEADERS, media_type="text/csv")

    def as_style(_: Request) -> Response:
        return Response(style, headers=FOR_EVER, media_type="text/css")

    # Starlette runs what is not async in its pool of threads.
    return [
        Route("/", show),
        Route("/v1/stats.json", as_json),
        Route("/v1/stats.csv", as_csv),
        Route(style_path, as_style),
    ]


def _asked(query: Mapping[str, str]) -> _Asked:
    given = {name: query[name] for name in _WRONG if query.get(name)}
    try:
        return _Asked.model_validate(given)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise _RefusalError(400, _WRONG[wrong]) from None


def read(engine: Engine, asked: _Asked) -> stats.Stats:
    """Return what may be told of what was asked for."""
    chosen = daily.Filter(asked.version, asked.edition)
    try:
        with engine.connect() as connection:
            connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            connection.execute(_BOUND)
            span = daily.span(connection)
            if span is None:
                return stats.nothing(chosen)
            until = span.last
            since = max(span.first, until - timedelta(days=int(asked.days) - 1))
            numbers = stats.Numbers(
                movements=daily.movements(connection, since, until, chosen),
                versions=daily.versions(connection, since, until, chosen),
                values=daily.values(connection, until, chosen),
            )
    except SQLAlchemyError as error:
        # No traceback: its words may be anybody's.
        log.error("collector.failed stage=page error=%s", store.cause(error))  # noqa: TRY400 - see above
        raise _RefusalError(503, "The database is not available.") from None
    return stats.tell(numbers, as_of=span.as_of, since=since, until=until, chosen=chosen)
