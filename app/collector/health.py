"""Whether the collector can do its work: over HTTP, and in the log.

A separate thread checks the database every few seconds, through its own connection. Requests get
the result of the last check, so any number of them costs the database nothing. No sentence contains
a host, a user, a password or anything that a client sent.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from threading import Event, Thread
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine, text
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import migrations
from app.collector import bounded, daily, recount, stats
from app.collector.bounded import WITHIN_SECONDS
from app.collector.inbox import Inbox

EVERY_SECONDS = 5.0
"""The time between two checks."""
LOG_SECONDS = 60.0
FAILED_SECONDS = 60.0
"""How long a failed commit counts. Without this limit, a collector that gets no requests because it
is not ready would never become ready again."""
END_SECONDS = 0.5

NOT_STORED = {"Cache-Control": "no-store"}

SILENT = "the database does not answer"

log = logging.getLogger(__package__)


@dataclass(frozen=True)
class Look:
    """The result of one check of the database."""

    trouble: str | None = None
    """Why it cannot be used: a sentence, or None."""
    not_counted: str | None = None
    """Why its numbers are old: a sentence, or None."""
    now: datetime | None = None
    """The database's time; None if there is trouble."""
    counted_until: datetime | None = None
    """The end of the last day that is counted, if one is."""


def look(engine: Engine) -> Look:
    """Check the database; every error becomes a sentence."""
    try:
        with engine.connect() as connection:
            return look_by(connection)
    except Exception as error:  # noqa: BLE001 - any failure is a reason, and the next check follows
        return Look(trouble=cause(error))


_STATE = text(
    "SELECT pg_is_in_recovery() AS standby, CAST(current_setting('transaction_read_only') AS"
    " boolean) AS read_only, clock_timestamp() AS now,"
    f" set_config('statement_timeout', '{WITHIN_SECONDS:g}s', true)"
)
_FIRST_HEARD = text("SELECT CAST(min(first_seen) AT TIME ZONE 'UTC' AS date) FROM install")


def look_by(connection: Connection, *, now: datetime | None = None) -> Look:
    """Check the database through a connection, in one short transaction.

    ``now`` is the database's time by default.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: ``cause`` puts it in words.
    """
    with connection.begin():
        state = connection.execute(_STATE).one()
        trouble = _outdated(connection)
        if trouble is None and state.read_only:
            trouble = "the database is read-only" + (": it is a standby" if state.standby else "")
        if trouble:
            return Look(trouble=trouble)
        return _counted(connection, now or state.now)


def _outdated(connection: Connection) -> str | None:
    """Return a sentence if the tables are not those of this release."""
    found, known = migrations.revision(connection, "collector"), migrations.known("collector")
    if found == known[0]:
        return None
    if found == migrations.SEVERAL:
        return "collector_alembic_version has more than one row: restore the database once"
    if found in {*known, migrations.BASE}:
        at = "missing" if found == migrations.BASE else f"at revision {found}"
        return (
            f"the tables are {at} and this release needs {known[0]}:"
            " run `python -m app.collector migrate`"
        )
    shown = re.sub(r"\W", "?", found, flags=re.ASCII)
    return f"the tables are at revision {shown}, of a newer release: run that release"


def _counted(connection: Connection, now: datetime) -> Look:
    span, again = daily.span(connection), recount.progress(connection)
    until = daily.begins(span.last + daily.DAY) if span else None
    last = span.last if span else _before_the_first(connection, again)
    if last is None or not stats.counting_stopped(last, now):
        return Look(now=now, counted_until=until)
    why = under_way(again) if again else f"the last day that is counted is {last}"
    sentence = f"{daily.finished(now)} is not counted: {why}"
    return Look(now=now, counted_until=until, not_counted=sentence)


def under_way(again: recount.Progress) -> str:
    """Return the progress of a recount as a sentence."""
    return f"the days since {again.since} are being counted again, {again.share:.0%} done"


def _before_the_first(connection: Connection, again: recount.Progress | None) -> date | None:
    """Return the day before the first day to count; None if there is no install."""
    first: date | None = again.since if again else connection.scalar(_FIRST_HEARD)
    return first - daily.DAY if first else None


_REFUSED = "COLLECTOR_DATABASE_URL: the database refuses the password"
_NOT_THERE = "COLLECTOR_DATABASE_URL: the database or its role does not exist"
_CROWDED = "the database has no connection left"

_ANSWERS: Mapping[str, str] = {
    "25006": "the database is read-only",
    "28000": "COLLECTOR_DATABASE_URL: the database refuses the role",
    "28P01": _REFUSED,
    "3D000": _NOT_THERE,
    "42501": "the role of COLLECTOR_DATABASE_URL may not read the collector's tables",
    "42P01": "a table is missing: run `python -m app.collector migrate`",
    "53300": _CROWDED,
    "55P03": SILENT,
    "57014": SILENT,
}

# libpq gives no SQLSTATE for a connection that fails, so the server's message is searched. It is
# English on most servers; elsewhere the last, general sentence is used.
_WORDS = (
    (r"no password supplied", "COLLECTOR_DATABASE_URL: the database asks for a password"),
    (r"timeout expired|timed? ?out", SILENT),
    (r"password authentication failed", _REFUSED),
    (r'FATAL: +(database|role) ".*" does not exist', _NOT_THERE),
    (r"FATAL: .*(too many|connection slots)", _CROWDED),
    (r"root certificate|certificate verify", "the database's certificate cannot be verified"),
    (r"failed: [^\s:]+:  ", "COLLECTOR_DATABASE_URL: the database refuses the connection"),
)


def cause(error: Exception) -> str:
    """Return what an operator can do about the error of a check, without any value in it."""
    origin: Any = getattr(error, "orig", None) or error
    state = getattr(origin, "sqlstate", None)
    if state is not None:
        return _ANSWERS.get(state, f"the database failed with SQLSTATE {state}")
    if not isinstance(origin, psycopg.OperationalError):
        return f"the check of the database failed with {type(origin).__name__}"
    for words, sentence in _WORDS:
        if re.search(words, str(origin)):
            return sentence
    return "the database cannot be reached"


class Health:
    """Checks the database, and says whether the collector is ready."""

    def __init__(self, url: str | URL, inbox: Inbox) -> None:
        """Check the database of ``url``, and the state of ``inbox``."""
        self._engine = bounded.connect(url)
        self._inbox = inbox
        self._found = Look(trouble=SILENT)
        self._looked_at = float("-inf")
        self._log = _ReasonLog()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Check now and every ``EVERY_SECONDS``, in a separate thread, until the block ends.

        The block begins after the first check, or when the database does not answer in time.
        """
        looked, ended = Event(), Event()
        # A daemon: the end of the process does not wait for a check.
        thread = Thread(target=self._watch, args=(looked, ended), name="health", daemon=True)
        thread.start()
        looked.wait(WITHIN_SECONDS)
        try:
            yield
        finally:
            ended.set()
            thread.join(END_SECONDS)

    def _watch(self, looked: Event, ended: Event) -> None:
        while not ended.is_set():
            began = time.monotonic()
            found = look(self._engine)
            late = time.monotonic() > began + WITHIN_SECONDS
            self._found = Look(trouble=SILENT) if late and not found.trouble else found
            self._looked_at = time.monotonic()
            self._log.write(self.reasons(), self._looked_at)
            looked.set()
            ended.wait(EVERY_SECONDS)

    def reasons(self) -> list[str]:
        """Return why the collector is not ready, in sentences; an empty list if it is."""
        found = self._found
        if time.monotonic() > self._looked_at + EVERY_SECONDS + WITHIN_SECONDS:
            return [SILENT]
        if found.trouble:
            return [found.trouble]
        return [each for each in (self._of_ingest(), found.not_counted) if each]

    def _of_ingest(self) -> str | None:
        if self._inbox.full:
            return "the inbox is full: more heartbeats arrive than the database stores"
        if self._inbox.failed_within(FAILED_SECONDS):
            return "the last heartbeat could not be stored: see collector.failed in the log"
        return None

    @property
    def counted_for(self) -> float | None:
        """How many seconds ago the last counted day ended; None if that is not known."""
        found = self._found
        if found.now is None or found.counted_until is None:
            return None
        since_look = time.monotonic() - self._looked_at
        return (found.now - found.counted_until).total_seconds() + since_look


class _ReasonLog:
    """Logs why the collector is not ready: when that changes, and at most once a minute."""

    def __init__(self) -> None:
        self._logged: Sequence[str] = ()
        self._not_before = float("-inf")

    def write(self, reasons: Sequence[str], now: float) -> None:
        if not reasons:
            if self._logged:
                log.info("collector.recovered")
            self._logged = ()
        elif reasons != self._logged and now >= self._not_before:
            log.error('collector.not_ready reason="%s"', "; ".join(reasons))
            self._logged, self._not_before = reasons, now + LOG_SECONDS


def routes(health: Health) -> list[Route]:
    """Return the routes that report whether the process runs, and whether it can do its work."""

    # Both are async, so that they need no thread of the pool: readers may use all of them.
    async def alive(_: Request) -> Response:
        return JSONResponse({"alive": True}, headers=NOT_STORED)

    async def ready(_: Request) -> Response:
        if reasons := health.reasons():
            return JSONResponse({"ready": False, "reasons": reasons}, 503, NOT_STORED)
        return JSONResponse({"ready": True}, headers=NOT_STORED)

    return [Route("/healthz", alive), Route("/readyz", ready)]
