"""What the collector shows: a page without a script, and the same numbers as JSON and as CSV.

An answer is rendered once, and kept until what it was rendered from changes. Who asks costs a look
at whether it has.
"""

import csv
import hashlib
import io
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from importlib.resources import files
from threading import Lock
from typing import Literal
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.collector import daily, outcomes, recount, stats, store, view
from app.payload import Edition, Version

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PUBLIC = {"Cache-Control": "public, max-age=60"}
PRIVATE = {"Cache-Control": "private, max-age=60", "Vary": "Authorization"}
FOR_EVER = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
NEVER = {**HEADERS, "Cache-Control": "no-store"}

KEPT = 200
"""So many answers are kept at most, those that were asked for last."""
LIVE_SECONDS = 60.0
"""How long the live numbers are kept."""

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUND = text("SELECT set_config('statement_timeout', '5s', true)")

log = logging.getLogger("app.collector")


class _Asked(BaseModel):
    """What the query may say; what it does not name or leaves empty is the default."""

    model_config = ConfigDict(frozen=True)

    days: Literal["30", "90", "365"] = "90"
    version: Version | None = None
    edition: Edition | None = None

    @property
    def filter(self) -> daily.Filter:
        """Which installs it is about."""
        return daily.Filter(self.version, self.edition)

    @property
    def query(self) -> str:
        """The shortest query that asks for the same."""
        return urlencode(self.model_dump(exclude_defaults=True))


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
    """The HTML of what is shown, and of why nothing is."""

    def __init__(self, style: str, *, established_days: int) -> None:
        """Have every page be styled by what is at the path ``style``.

        An install is established that was heard of on ``established_days`` days.
        """
        self._established_days = established_days
        self._templates = Environment(
            loader=PackageLoader("app.collector"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(style=style, long_date=view.long_date)

    def page(
        self,
        told: stats.Stats,
        *,
        days: str = "90",
        query: str = "",
        stands_still: bool = False,
        requests: Mapping[str, int] | None = None,
    ) -> str:
        """Return the page for a choice of ``days``, whose other forms have the same ``query``.

        ``requests`` is how many of the day before ended in which way.
        """
        shown = view.of(told, stands_still=stands_still, established_days=self._established_days)
        return self._templates.get_template("page.html").render(
            stats=told,
            view=shown,
            days=days,
            query=query,
            ranges=view.RANGES,
            requests=view.requests(requests or {}),
        )

    def refusal(self, sentence: str) -> str:
        """Return a page that says why there is nothing to show."""
        return self._templates.get_template("refusal.html").render(sentence=sentence)


@dataclass(frozen=True)
class _State:
    """What an answer is rendered from: while it is the same, so is the answer."""

    span: daily.Span | None
    recount: recount.Progress | None
    stands_still: bool
    live: daily.Live | None
    """None for an answer under a filter."""
    requests: Mapping[str, int]
    """How many requests to keep a heartbeat ended in which way on the day before."""


@dataclass(frozen=True)
class _Answer:
    state: _State
    body: bytes
    etag: str


_Render = Callable[[stats.Stats, _Asked, _State], str]


@dataclass(frozen=True)
class _Form:
    """A form of an answer: how it is rendered, and how it says that there is none."""

    media_type: str
    render: _Render
    refuse: Callable[[_RefusalError], Response]


class _Answers:
    """The answers that are kept, and the making of one that is not.

    Each request reads in one transaction that cannot write: the days that were counted, and of the
    installs no more than how many there are now, once in ``LIVE_SECONDS``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = Lock()
        self._kept: OrderedDict[tuple[_Render, _Asked], _Answer] = OrderedDict()
        self._live_lock = Lock()
        self._live: tuple[daily.Live, Mapping[str, int]] | None = None
        self._live_until = 0.0

    def get(self, render: _Render, asked: _Asked) -> _Answer:
        """Return the answer in the form that ``render`` gives it."""
        try:
            return self._get(render, asked)
        except SQLAlchemyError as error:
            # No traceback: its words may be anybody's.
            log.error("collector.failed stage=page error=%s", store.cause(error))  # noqa: TRY400 - see above
            raise _RefusalError(503, "The database is not available.") from None

    def _get(self, render: _Render, asked: _Asked) -> _Answer:
        with self._engine.connect() as connection:
            connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            connection.execute(_BOUND)
            state = self._state(connection, asked)
            kept = self._find(render, asked)
            if kept and kept.state == state:
                return kept
            told = _read(connection, state, asked)
        body = render(told, asked, state).encode()
        answer = _Answer(state, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        # There are more versions that do not exist than can be kept.
        if told.days or asked.filter == daily.Filter():
            self._keep(render, asked, answer)
        return answer

    def _state(self, connection: Connection, asked: _Asked) -> _State:
        span, (live, requests) = daily.span(connection), self._live_now(connection)
        return _State(
            span=span,
            recount=recount.progress(connection),
            stands_still=span is not None and stats.stands_still(span.last, live.as_of),
            live=live if asked.filter == daily.Filter() else None,
            requests=requests,
        )

    def _live_now(self, connection: Connection) -> tuple[daily.Live, Mapping[str, int]]:
        with self._live_lock:
            if self._live is None or time.monotonic() >= self._live_until:
                live = daily.live(connection)
                yesterday = live.as_of.astimezone(UTC).date() - timedelta(days=1)
                self._live = live, outcomes.of_day(connection, yesterday)
                self._live_until = time.monotonic() + LIVE_SECONDS
            return self._live

    def _find(self, render: _Render, asked: _Asked) -> _Answer | None:
        with self._lock:
            if (render, asked) in self._kept:
                self._kept.move_to_end((render, asked))
            return self._kept.get((render, asked))

    def _keep(self, render: _Render, asked: _Asked, answer: _Answer) -> None:
        with self._lock:
            self._kept[render, asked] = answer
            self._kept.move_to_end((render, asked))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _read(connection: Connection, state: _State, asked: _Asked) -> stats.Stats:
    """Return what is shown of what was asked for."""
    chosen, span = asked.filter, state.span
    live = state.live and stats.LiveStats(
        state.live.as_of.astimezone(UTC),
        stats.fold(state.live.active),
        stats.fold(state.live.not_established),
    )
    again = state.recount and stats.Recount(*state.recount)
    if span is None:
        return stats.nothing(chosen, live=live, recount=again)
    until = span.last
    since = max(span.first, until - timedelta(days=int(asked.days) - 1))
    everyone = daily.Filter()
    numbers = stats.Numbers(
        movements=daily.movements(connection, since, until, chosen),
        versions=daily.versions(connection, since, until, chosen),
        values=daily.values(connection, until, chosen),
        versions_of_all=daily.versions(connection, until, until, everyone).get(until, {}),
        editions_of_all=daily.values(connection, until, everyone)["edition"],
    )
    return stats.tell(
        numbers,
        as_of=span.as_of.astimezone(UTC),
        since=since,
        until=until,
        chosen=chosen,
        live=live,
        recount=again,
    )


def routes(
    engine: Engine, *, established_days: int = store.ESTABLISHED_DAYS, private: bool = False
) -> list[Route]:
    """Return the routes of the page, of its two other forms and of its style.

    If they are ``private``, no cache between here and the reader may keep an answer.
    """
    style = files("app.collector").joinpath("static", "style.css").read_bytes()
    style_path = f"/static/style-{hashlib.sha256(style).hexdigest()[:12]}.css"
    templates = Templates(style_path, established_days=established_days)
    answers = _Answers(engine)

    def page(told: stats.Stats, asked: _Asked, state: _State) -> str:
        return templates.page(
            told,
            days=asked.days,
            query=asked.query,
            stands_still=state.stands_still,
            requests=state.requests,
        )

    def refused(refusal: _RefusalError) -> Response:
        return HTMLResponse(templates.refusal(refusal.sentence), refusal.status, NEVER)

    forms: dict[str, _Form] = {
        "/": _Form("text/html", page, refused),
        "/v1/stats.json": _Form("application/json", _document, _refused_document),
        "/v1/stats.csv": _Form("text/csv", _lines, _refused_lines),
    }
    caching = PRIVATE if private else PUBLIC

    def endpoint(form: _Form) -> Callable[[Request], Response]:
        return lambda request: _answer(request, answers, form, caching)

    def as_style(_: Request) -> Response:
        return Response(style, headers=FOR_EVER, media_type="text/css")

    # Starlette runs what is not async in its pool of threads.
    return [
        *(Route(path, endpoint(form)) for path, form in forms.items()),
        Route(style_path, as_style),
    ]


def _document(told: stats.Stats, _: _Asked, __: _State) -> str:
    return json.dumps(stats.document(told), separators=(",", ":"))


def _refused_document(refusal: _RefusalError) -> Response:
    return JSONResponse({"error": refusal.sentence}, refusal.status, NEVER)


def _lines(told: stats.Stats, _: _Asked, __: _State) -> str:
    found = io.StringIO()
    csv.writer(found).writerows(stats.rows(told))
    return found.getvalue()


def _refused_lines(refusal: _RefusalError) -> Response:
    return PlainTextResponse(f"{refusal.sentence}\n", refusal.status, NEVER)


def _answer(
    request: Request, answers: _Answers, form: _Form, caching: Mapping[str, str]
) -> Response:
    try:
        found = answers.get(form.render, _asked(request.query_params))
    except _RefusalError as refusal:
        return form.refuse(refusal)
    headers = {**HEADERS, **caching, "ETag": found.etag}
    if _has(request.headers.get("if-none-match", ""), found.etag):
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=form.media_type)


def _asked(query: Mapping[str, str]) -> _Asked:
    given = {name: query[name] for name in _WRONG if query.get(name)}
    try:
        return _Asked.model_validate(given)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise _RefusalError(400, _WRONG[wrong]) from None


def _has(etags: str, etag: str) -> bool:
    """Return whether an ETag is among those of If-None-Match, by the weak comparison."""
    return any(each.strip().removeprefix("W/") in {etag, "*"} for each in etags.split(","))
