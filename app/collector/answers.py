"""The answers of the page and its other forms: each is rendered once, and cached.

An answer stays in the cache until the numbers from which it was rendered change. Whether they have
changed is checked at most once a second, however many requests arrive.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from app.collector import daily, outcomes, periods, recount, rounding, stats, store
from app.collector.adoption import Release
from app.collector.caching import etag
from app.collector.reading import Readers
from app.payload import Edition, Version

CACHED = 200
"""The cache has at most so many answers: those that were requested last."""
LIVE_SECONDS = 60.0
"""How long the live numbers are reused before they are read again."""
CHECK_SECONDS = 1.0
"""After a check of what changed, how long no request checks again; also after a failed check."""

log = logging.getLogger("app.collector")


class Query(BaseModel):
    """The parameters of a request; one that is missing or empty has its default."""

    model_config = ConfigDict(frozen=True)

    days: Literal["30", "90", "365"] = "90"
    version: Version | None = None
    edition: Edition | None = None
    live: bool = True
    """Whether the live numbers are shown too; no request can change this."""

    @property
    def filter(self) -> daily.Filter:
        """Which installs it selects."""
        return daily.Filter(self.version, self.edition)

    @property
    def shortest(self) -> str:
        """The shortest query string with the same meaning."""
        return urlencode(self.model_dump(exclude_defaults=True))


LAST_DAY = Query(days="30", live=False)
"""What the badge shows, for every query string."""
YEAR = Query(days="365", live=False)
"""What the feed is made from, for every query string."""

_INVALID = {
    "days": "The number of days must be 30, 90 or 365.",
    "version": "A version must look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1.",
    "edition": "The edition must be ce or ee.",
}


@dataclass(frozen=True)
class NotShownError(Exception):
    """Nothing can be shown; ``sentence`` says why."""

    status: int
    sentence: str


def parse(parameters: Mapping[str, str]) -> Query:
    """Return the query that a request's parameters make.

    Raises:
        NotShownError: a parameter is invalid.
    """
    given = {name: parameters[name] for name in _INVALID if parameters.get(name)}
    try:
        return Query.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise NotShownError(400, _INVALID[name]) from None


@dataclass(frozen=True)
class State:
    """What an answer is rendered from: while the state is the same, the answer is the same."""

    span: daily.Span | None
    recount: recount.Progress | None
    counting_stopped: bool
    live: daily.Live | None
    """None for an answer that does not show it."""
    requests: Mapping[str, int] | None
    """How many requests to store a heartbeat had which outcome on the day before; None if that is
    not known yet, or is not shown."""
    behind: datetime | None
    """The time as of which it was read, if a standby that is behind was read; else None."""

    def of(self, query: Query) -> "State":
        """Return the part on which the answer to a query depends."""
        if not query.live:
            return replace(self, live=None, requests=None)
        return self if query.filter == daily.Filter() else replace(self, live=None)


@dataclass(frozen=True)
class _Live:
    """What is counted at this moment, and the time as of which it was read."""

    installs: daily.Live
    requests: Mapping[str, int] | None
    behind: datetime | None
    now: datetime


@dataclass(frozen=True)
class Answer:
    """The body of an answer, and the state from which it was rendered."""

    state: State
    body: bytes
    etag: str


Render = Callable[[stats.Stats, Query, State], str]


class Answers:
    """The cache of answers; what is missing in it is read and rendered.

    An answer is read in one transaction that cannot write. It reads the counted days, and of the
    installs only how many there are now, once in ``LIVE_SECONDS``.
    """

    def __init__(self, readers: Readers) -> None:
        """Read by ``readers``."""
        self._readers = readers
        self._lock = Lock()
        self._cache: OrderedDict[tuple[Render, Query], Answer] = OrderedDict()
        self._state: State | None = None
        self._state_until = 0.0
        self._failed_until = 0.0
        self._live_lock = Lock()
        self._live: _Live | None = None
        self._live_until = 0.0

    @property
    def queries(self) -> list[Query]:
        """The queries whose answers are cached; the one that was requested last is the last."""
        return [query for _, query in self._cache]

    def cached(self, render: Render, query: Query) -> Answer | None:
        """Return the answer if it is cached and was checked within ``CHECK_SECONDS``."""
        state = self._state
        if state is None or time.monotonic() >= self._state_until:
            return None
        found = self._find(render, query)
        return found if found and found.state == state.of(query) else None

    def get(self, render: Render, query: Query) -> Answer:
        """Return the answer in the form that ``render`` gives it.

        Raises:
            NotShownError: the database is not available.
        """
        if cached := self.cached(render, query):  # another request has just made it
            return cached
        if time.monotonic() < self._failed_until:
            raise _unavailable()
        try:
            return self._readers.read(
                lambda connection, behind: self._make(connection, behind, render, query)
            )
        except SQLAlchemyError as error:
            self._failed_until = time.monotonic() + CHECK_SECONDS
            # No traceback: it may contain what a stranger sent.
            log.error("collector.failed stage=page error=%s", store.cause(error))  # noqa: TRY400 - see above
            raise _unavailable() from None

    def _make(
        self, connection: Connection, behind: datetime | None, render: Render, query: Query
    ) -> Answer:
        began = time.monotonic()
        whole = self._read_state(connection, behind)
        self._state, self._state_until = whole, began + CHECK_SECONDS
        state = whole.of(query)
        cached = self._find(render, query)
        if cached and cached.state == state:
            return cached
        shown = read(connection, state, query)
        body = render(shown, query, state).encode()
        answer = Answer(state, body, etag(body))
        # A stranger can request more versions than fit in the cache: cache only those that exist.
        if shown.days or query.filter == daily.Filter():
            self._add(render, query, answer)
        return answer

    def _read_state(self, connection: Connection, behind: datetime | None) -> State:
        span, live = daily.span(connection), self._live_now(connection, behind)
        return State(
            span=span,
            recount=recount.progress(connection),
            counting_stopped=span is not None and stats.counting_stopped(span.last, live.now),
            live=live.installs,
            requests=live.requests,
            behind=live.behind,
        )

    def _live_now(self, connection: Connection, behind: datetime | None) -> _Live:
        with self._live_lock:
            known = self._live
            moved = known is None or (known.behind is None) != (behind is None)
            if known is None or moved or time.monotonic() >= self._live_until:
                known = self._live = _read_live(connection, behind)
                self._live_until = time.monotonic() + LIVE_SECONDS
            return known

    def _find(self, render: Render, query: Query) -> Answer | None:
        with self._lock:
            if (render, query) in self._cache:
                self._cache.move_to_end((render, query))
            return self._cache.get((render, query))

    def _add(self, render: Render, query: Query, answer: Answer) -> None:
        with self._lock:
            self._cache[render, query] = answer
            self._cache.move_to_end((render, query))
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)


def _unavailable() -> NotShownError:
    return NotShownError(503, "The database is not available.")


def _read_live(connection: Connection, behind: datetime | None) -> _Live:
    installs = daily.live(connection, behind)
    if behind:
        return _Live(installs, None, behind, recount.clock(connection))
    yesterday = installs.as_of.astimezone(UTC).date() - timedelta(days=1)
    requests = outcomes.of_day(connection, yesterday)
    return _Live(installs, requests, None, installs.as_of)


def read(connection: Connection, state: State, query: Query) -> stats.Stats:
    """Return what is shown for a query."""
    chosen, span = query.filter, state.span
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
    days, last, everyone = int(query.days), span.last, daily.Filter()
    of_last = daily.versions(connection, last, last, chosen)
    # Anybody can invent filters: what is not shown is not read.
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
