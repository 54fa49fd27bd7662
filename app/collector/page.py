"""What the collector shows: a page without a script, its numbers as JSON and CSV, badge and feed.

An answer is rendered once, and kept until what it was rendered from changes: whether it has is
looked at once a second at most, however many ask.
"""

import asyncio
import csv
import hashlib
import io
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from threading import Lock
from typing import Literal
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.collector import (
    badge,
    daily,
    events,
    exports,
    outcomes,
    periods,
    phrases,
    recount,
    rounding,
    stats,
    store,
    view,
)
from app.collector.adoption import Release
from app.collector.reading import Readers
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
LOOK_SECONDS = 1.0
"""How long what an answer was rendered from is taken to be the same, before it is looked at again;
and how long nobody looks after that has failed."""
MAKING = 1
"""So many threads look and render at most, so that who sends a heartbeat or asks what is held of an
id does not wait for all of them."""
AT_MOST_A_SECOND = 1_000
"""So many pages one process answers at most, so that those who send heartbeats have the rest of its
time; who asks for more waits."""
BURST_SECONDS = 0.02
"""What was not asked for within this time may be asked for at once."""

_SVG = "image/svg+xml"

log = logging.getLogger("app.collector")


class _Asked(BaseModel):
    """What the query may say; what it does not name or leaves empty is the default."""

    model_config = ConfigDict(frozen=True)

    days: Literal["30", "90", "365"] = "90"
    version: Version | None = None
    edition: Edition | None = None
    live: bool = True
    """Whether the numbers of this moment are shown too; no query changes that."""

    @property
    def filter(self) -> daily.Filter:
        """Which installs it is about."""
        return daily.Filter(self.version, self.edition)

    @property
    def query(self) -> str:
        """The shortest query that asks for the same."""
        return urlencode(self.model_dump(exclude_defaults=True))


_LAST_DAY = _Asked(days="30", live=False)
"""What the badge shows, whatever the query says."""
_YEAR = _Asked(days="365", live=False)
"""What the feed is made from, whatever the query says."""

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


def _unavailable() -> _RefusalError:
    return _RefusalError(503, "The database is not available.")


class Templates:
    """The HTML, SVG and XML of what is shown, and of why nothing is."""

    def __init__(self, style: str, *, established_days: int, private: bool = False) -> None:
        """Have every page be styled by what is at the path ``style``.

        An install is established that was heard of on ``established_days`` days. If the pages are
        ``private``, they ask not to be indexed.
        """
        self._established_days = established_days
        self._templates = Environment(
            loader=PackageLoader("app.collector"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            style=style, long_date=phrases.long_date, moment=phrases.moment, private=private
        )

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
            requests=view.requests(requests),
        )

    def picture(self, shown: badge.Badge) -> str:
        """Return the picture of a badge."""
        return self._templates.get_template("badge.svg").render(
            badge=shown, label=badge.LABEL, padding=badge.PADDING
        )

    def feed(self, told: stats.Stats, *, stands_still: bool) -> str:
        """Return the Atom feed of what was notable, of all installs and a year."""
        found = events.of(told, stands_still=stands_still)
        return self._templates.get_template("feed.xml").render(
            id=events.FEED, updated=events.updated(told, found), events=found
        )

    def heartbeat(
        self, purposes: Mapping[str, Sequence[str]], *, retention_days: int, schema: str
    ) -> str:
        """Return the page of what a heartbeat contains: the purpose of each field, by its name.

        Every other part of a purpose is code. A heartbeat's JSON Schema is at the path ``schema``;
        it is stored for ``retention_days``, 0 for good.
        """
        return self._templates.get_template("heartbeat.html").render(
            purposes=purposes, retention_days=retention_days, schema=schema
        )

    def refusal(self, sentence: str, *, title: str = "Nothing to show") -> str:
        """Return a page that says why there is nothing to show."""
        return self._templates.get_template("refusal.html").render(title=title, sentence=sentence)


def _style() -> tuple[str, bytes]:
    """Return the style's path, which changes with its content, and its content."""
    style = files("app.collector").joinpath("static", "style.css").read_bytes()
    return f"/static/style-{hashlib.sha256(style).hexdigest()[:12]}.css", style


def templates(
    *, established_days: int = store.ESTABLISHED_DAYS, private: bool = False
) -> Templates:
    """Return the templates, in the style that ``routes`` serves."""
    return Templates(_style()[0], established_days=established_days, private=private)


@dataclass(frozen=True)
class _State:
    """What an answer is rendered from: while it is the same, so is the answer."""

    span: daily.Span | None
    recount: recount.Progress | None
    stands_still: bool
    live: daily.Live | None
    """None for an answer that does not show it."""
    requests: Mapping[str, int] | None
    """How many requests to keep a heartbeat ended in which way on the day before; None where that
    cannot be known yet, or is not shown."""
    behind: datetime | None
    """As of when it was read, where that is not now."""

    def of(self, asked: _Asked) -> "_State":
        """Return what the answer to a choice depends on."""
        if not asked.live:
            return replace(self, live=None, requests=None)
        return self if asked.filter == daily.Filter() else replace(self, live=None)


@dataclass(frozen=True)
class _Live:
    """What is counted at the moment, by what can be behind."""

    installs: daily.Live
    requests: Mapping[str, int] | None
    behind: datetime | None
    now: datetime


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
    asked: _Asked | None = None
    """What it shows, where the query does not decide that."""


class _Answers:
    """The answers that are kept, and the making of one that is not.

    What is not kept is read in one transaction that cannot write: the days that were counted, and
    of the installs no more than how many there are now, once in ``LIVE_SECONDS``.
    """

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._lock = Lock()
        self._kept: OrderedDict[tuple[_Render, _Asked], _Answer] = OrderedDict()
        self._state: _State | None = None
        self._state_until = 0.0
        self._failed_until = 0.0
        self._live_lock = Lock()
        self._live: _Live | None = None
        self._live_until = 0.0

    def kept(self, render: _Render, asked: _Asked) -> _Answer | None:
        """Return the answer if it is kept, and was looked at within ``LOOK_SECONDS``."""
        state = self._state
        if state is None or time.monotonic() >= self._state_until:
            return None
        found = self._find(render, asked)
        return found if found and found.state == state.of(asked) else None

    def get(self, render: _Render, asked: _Asked) -> _Answer:
        """Return the answer in the form that ``render`` gives it."""
        if kept := self.kept(render, asked):  # another one has asked meanwhile
            return kept
        if time.monotonic() < self._failed_until:
            raise _unavailable()
        try:
            return self._readers.read(
                lambda connection, behind: self._make(connection, behind, render, asked)
            )
        except SQLAlchemyError as error:
            self._failed_until = time.monotonic() + LOOK_SECONDS
            # No traceback: its words may be anybody's.
            log.error("collector.failed stage=page error=%s", store.cause(error))  # noqa: TRY400 - see above
            raise _unavailable() from None

    def _make(
        self, connection: Connection, behind: datetime | None, render: _Render, asked: _Asked
    ) -> _Answer:
        began = time.monotonic()
        whole = self._look(connection, behind)
        self._state, self._state_until = whole, began + LOOK_SECONDS
        state = whole.of(asked)
        kept = self._find(render, asked)
        if kept and kept.state == state:
            return kept
        told = _read(connection, state, asked)
        body = render(told, asked, state).encode()
        answer = _Answer(state, body, etag(body))
        # There are more versions that do not exist than can be kept.
        if told.days or asked.filter == daily.Filter():
            self._keep(render, asked, answer)
        return answer

    def _look(self, connection: Connection, behind: datetime | None) -> _State:
        span, live = daily.span(connection), self._live_now(connection, behind)
        return _State(
            span=span,
            recount=recount.progress(connection),
            stands_still=span is not None and stats.stands_still(span.last, live.now),
            live=live.installs,
            requests=live.requests,
            behind=live.behind,
        )

    def _live_now(self, connection: Connection, behind: datetime | None) -> _Live:
        with self._live_lock:
            known = self._live
            moved = known is None or (known.behind is None) != (behind is None)
            if known is None or moved or time.monotonic() >= self._live_until:
                known = self._live = _live(connection, behind)
                self._live_until = time.monotonic() + LIVE_SECONDS
            return known

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


def _live(connection: Connection, behind: datetime | None) -> _Live:
    installs = daily.live(connection, behind)
    if behind:
        return _Live(installs, None, behind, recount.clock(connection))
    yesterday = installs.as_of.astimezone(UTC).date() - timedelta(days=1)
    requests = outcomes.of_day(connection, yesterday)
    return _Live(installs, requests, None, installs.as_of)


def _read(connection: Connection, state: _State, asked: _Asked) -> stats.Stats:
    """Return what is shown of what was asked for."""
    chosen, span = asked.filter, state.span
    live = state.live and stats.LiveStats(
        state.live.as_of.astimezone(UTC),
        rounding.fold(state.live.active),
        rounding.fold(state.live.not_established),
    )
    nothing = stats.nothing(
        chosen,
        live=live,
        recount=state.recount and stats.Recount(*state.recount),
        standby_as_of=state.behind and state.behind.astimezone(UTC),
    )
    if span is None:
        return nothing
    days, last, everyone = int(asked.days), span.last, daily.Filter()
    of_last = daily.versions(connection, last, last, chosen)
    # Anybody can make up filters: what is not shown is not read.
    is_shown = stats.may_look(chosen, sum(of_last.get(last, {}).values()))
    numbers = stats.Numbers(
        versions_of_all=daily.versions(connection, last, last, everyone).get(last, {}),
        editions_of_all=daily.values(connection, last, everyone)["edition"],
        releases=[Release(*each) for each in daily.released(connection, last)],
        versions=of_last,
    )
    if is_shown:
        history = last - periods.HISTORY
        month = last - max(timedelta(days=days - 1), daily.MONTH)
        numbers = replace(
            numbers,
            stocks=daily.stocks(connection, month, last, chosen),
            flows=daily.flows(connection, history, last, chosen),
            versions=daily.versions(connection, last - stats.YEAR, last, chosen),
            values=daily.values(connection, last, chosen),
            counted=daily.counted(connection, history, last),
        )
    at = span.as_of.astimezone(UTC)
    return stats.show(nothing, numbers, replace(span, as_of=at), days=days)


def routes(
    readers: Readers, *, established_days: int = store.ESTABLISHED_DAYS, private: bool = False
) -> list[Route]:
    """Return the routes of the page, its two other forms, the badge, the feed, and the style.

    If they are ``private``, no cache between here and the reader may keep an answer.
    """
    style_path, style = _style()
    found = templates(established_days=established_days, private=private)
    desk = _Desk(_Answers(readers), PRIVATE if private else PUBLIC)

    def page(told: stats.Stats, asked: _Asked, state: _State) -> str:
        return found.page(
            told,
            days=asked.days,
            query=asked.query,
            stands_still=state.stands_still,
            requests=state.requests,
        )

    def refused(refusal: _RefusalError) -> Response:
        return HTMLResponse(found.refusal(refusal.sentence), refusal.status, NEVER)

    def picture(told: stats.Stats, _: _Asked, state: _State) -> str:
        return found.picture(badge.of(told, stands_still=state.stands_still))

    def no_picture(refusal: _RefusalError) -> Response:
        drawn = found.picture(badge.unavailable(refusal.sentence))
        return Response(drawn, refusal.status, NEVER, _SVG)

    def feed(told: stats.Stats, _: _Asked, state: _State) -> str:
        return found.feed(told, stands_still=state.stands_still)

    forms: dict[str, _Form] = {
        "/": _Form("text/html", page, refused),
        "/v1/stats.json": _Form("application/json", _document, _refused_document),
        "/v1/stats.csv": _Form("text/csv", _lines, _refused_lines),
        "/badge.svg": _Form(_SVG, picture, no_picture, _LAST_DAY),
        "/v1/badge.json": _Form("application/json", _badge, _refused_document, _LAST_DAY),
        "/feed.atom": _Form("application/atom+xml", feed, _refused_lines, _YEAR),
    }

    def as_style(_: Request) -> Response:
        return Response(style, headers=FOR_EVER, media_type="text/css")

    return [
        *(Route(path, desk.endpoint(form)) for path, form in forms.items()),
        Route(style_path, as_style),
    ]


def _document(told: stats.Stats, _: _Asked, __: _State) -> str:
    return json.dumps(exports.document(told), separators=(",", ":"))


def _badge(told: stats.Stats, _: _Asked, state: _State) -> str:
    shown = badge.of(told, stands_still=state.stands_still)
    return json.dumps(badge.document(shown), separators=(",", ":"))


def _refused_document(refusal: _RefusalError) -> Response:
    return JSONResponse({"error": refusal.sentence}, refusal.status, NEVER)


def _lines(told: stats.Stats, _: _Asked, __: _State) -> str:
    found = io.StringIO()
    csv.writer(found).writerows(exports.rows(told))
    return found.getvalue()


def _refused_lines(refusal: _RefusalError) -> Response:
    return PlainTextResponse(f"{refusal.sentence}\n", refusal.status, NEVER)


class _Turns:
    """Lets pages through one after the other, and ``AT_MOST_A_SECOND`` of them.

    In each turn of the event loop there is one page at most, and whatever heartbeats there are.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._next = 0.0

    async def take(self) -> None:
        async with self._lock:
            now = asyncio.get_running_loop().time()
            self._next = max(self._next, now - BURST_SECONDS) + 1 / AT_MOST_A_SECOND
            await asyncio.sleep(max(self._next - now, 0.0))


class _Desk:
    """Hands out answers: one that is kept at once, without a thread or the database."""

    def __init__(self, answers: _Answers, caching: Mapping[str, str]) -> None:
        self._answers = answers
        self._caching = caching
        self._making = asyncio.Semaphore(MAKING)
        self._turns = _Turns()

    def endpoint(self, form: _Form) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers a request in a form."""

        async def answer(request: Request) -> Response:
            try:
                asked = form.asked or _asked(request.query_params)
                found = await self._find(form, asked)
            except _RefusalError as refusal:
                return form.refuse(refusal)
            headers = {**HEADERS, **self._caching, "ETag": found.etag}
            return respond(request, found.body, headers, form.media_type)

        return answer

    async def _find(self, form: _Form, asked: _Asked) -> _Answer:
        await self._turns.take()
        if kept := self._answers.kept(form.render, asked):
            return kept
        async with self._making:
            return await run_in_threadpool(self._answers.get, form.render, asked)


def _asked(query: Mapping[str, str]) -> _Asked:
    given = {name: query[name] for name in _WRONG if query.get(name)}
    try:
        return _Asked.model_validate(given)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise _RefusalError(400, _WRONG[wrong]) from None


def etag(body: bytes) -> str:
    """Return the ETag of an answer."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def respond(request: Request, body: bytes, headers: Mapping[str, str], media_type: str) -> Response:
    """Return an answer, or 304 where the request says that it has the one with this ``ETag``."""
    if _has(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


def _has(etags: str, etag: str) -> bool:
    """Return whether an ETag is among those of If-None-Match, by the weak comparison."""
    return any(each.strip().removeprefix("W/") in {etag, "*"} for each in etags.split(","))
