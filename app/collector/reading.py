"""What the page is read by: a hot standby if there is one, and the primary if that is gone.

A thread of its own looks at both every few seconds: whether the standby answers, has the tables of
this release, and how far it has come. So a request waits for a standby that does not answer at
most once, and none waits for the primary while the standby answers.
"""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

import migrations
from app.collector import bounded

EVERY_SECONDS = 5.0
"""How long what a look has found holds before the next look."""
STALE_SECONDS = 20.0
"""What a look has found so long ago says nothing any more."""
BEHIND = timedelta(minutes=1)
"""A standby that has come less far is not shown as now."""
LOG_SECONDS = 60.0
END_SECONDS = 0.5
CONNECTIONS = 5
MARKS = 1_000

CONFLICT = "40001"
"""The SQLSTATE of a statement that conflicts with what the standby has to replay."""

# LOCAL, not a connection option: those do not pass through a transaction pooler.
_BOUND = text("SELECT set_config('statement_timeout', '5s', true)")
_WRITTEN = text("SELECT pg_current_wal_lsn() - '0/0', clock_timestamp()")
_REPLAYED = text(
    "SELECT pg_last_wal_replay_lsn() - '0/0' AS lsn, pg_last_xact_replay_timestamp() AS at,"
    " clock_timestamp() AS now, pg_is_in_recovery() AS standby"
)

_T = TypeVar("_T")

log = logging.getLogger(__package__)


class Mark(NamedTuple):
    """How far the primary had written at a moment, by its clock and by this process's."""

    lsn: int
    at: datetime
    seen: float


class Reached(NamedTuple):
    """How far the standby has come: to what, when that was committed, and its own time."""

    lsn: int
    at: datetime | None
    now: datetime


def behind(reached: Reached, marks: Iterable[Mark], seen: float) -> datetime | None:
    """Return as of when the standby is, if that is more than ``BEHIND`` ago; else None.

    It is as of each mark that it has passed, though nothing was committed since: on a primary that
    is idle the time of the last commit says nothing. ``seen`` is now by this process's clock.

    Raises:
        LookupError: that cannot be known.
    """
    passed = [mark for mark in marks if mark.lsn <= reached.lsn]
    if passed:
        last = max(passed, key=lambda mark: mark.seen)
        as_of, now = last.at, last.at + timedelta(seconds=seen - last.seen)
        if reached.at and as_of < reached.at <= now:
            as_of = reached.at
    elif reached.at:
        as_of, now = reached.at, reached.now
    else:
        raise LookupError
    return as_of if now - as_of > BEHIND else None


@dataclass(frozen=True)
class _Look:
    """What was found at a look at the standby: ``trouble`` is why it cannot be used."""

    trouble: str | None
    behind: datetime | None = None
    seen: float = 0.0


class Readers:
    """Reads by the standby, and by the primary what the standby cannot answer."""

    def __init__(self, primary: Engine, standby: str | URL | None = None) -> None:
        """Read by ``primary``; and by the server of ``standby``, while that is being watched."""
        self._primary = primary
        self._standby: Engine | None = None
        if standby is not None:
            self._standby = bounded.connect(standby, kept=CONNECTIONS)
            # Of their own, so that each look sees what whoever connects now would.
            self._looks = bounded.connect(standby), bounded.connect(primary.url)
        self._found = _Look("it was not looked at")
        self._marks: deque[Mark] = deque(maxlen=MARKS)
        self._log = _StandbyLog()

    def read(self, what: Callable[[Connection, datetime | None], _T]) -> _T:
        """Return what ``what`` reads, in one transaction that cannot write.

        It gets the connection; and as of when all is that it reads, if that is not now. It is
        called again, with the primary's, if the standby fails.
        """
        found = self._found
        fresh = time.monotonic() < found.seen + STALE_SECONDS
        if self._standby is not None and found.trouble is None and fresh:
            try:
                return _read(self._standby, what, found.behind)
            except SQLAlchemyError as error:
                self._failed(self._standby, error)
        return _read(self._primary, what, None)

    def _failed(self, standby: Engine, error: SQLAlchemyError) -> None:
        if _sqlstate(error) == CONFLICT:
            return  # it is well, and another statement may be
        self._found = _Look(_cause(error))
        standby.dispose()  # who is next shall not wait for the same server by another connection
        self._log.write(self._found.trouble, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the standby until the block ends, and then let go of it.

        The first look is over, or the standby does not answer, when the block begins.
        """
        if self._standby is None:
            yield
            return
        looked, ended = Event(), Event()
        # A look that is under way at the end is not waited for.
        thread = Thread(target=self._watch, args=(looked, ended), name="reading", daemon=True)
        thread.start()
        looked.wait(bounded.WITHIN_SECONDS)
        try:
            yield
        finally:
            ended.set()
            thread.join(END_SECONDS)
            self._standby.dispose()

    def _watch(self, looked: Event, ended: Event) -> None:
        standby, primary = self._looks
        while not ended.is_set():
            self._mark(primary)
            self._found = self._look(standby)
            self._log.write(self._found.trouble, time.monotonic())
            looked.set()
            ended.wait(EVERY_SECONDS)

    def _mark(self, primary: Engine) -> None:
        """Note how far the primary has written; where it does not say, the last mark ages."""
        try:
            with primary.connect() as connection:
                connection.execute(_BOUND)
                seen = time.monotonic()
                lsn, at = connection.execute(_WRITTEN).one()
        except SQLAlchemyError:
            return  # /readyz says so
        self._marks.append(Mark(int(lsn), at, seen))

    def _look(self, standby: Engine) -> _Look:
        try:
            with standby.connect() as connection:
                connection.execute(_BOUND)
                found = connection.execute(_REPLAYED).one()
                if not found.standby or found.lsn is None:
                    return _Look("it is not a standby")
                if (trouble := _outdated(connection)) is not None:
                    return _Look(trouble)
            seen = time.monotonic()
            reached = Reached(int(found.lsn), found.at, found.now)
            return _Look(None, behind(reached, self._marks, seen), seen)
        except LookupError:
            return _Look("it does not say how far it has come")
        except SQLAlchemyError as error:
            return _Look(_cause(error))


def _read(
    engine: Engine,
    what: Callable[[Connection, datetime | None], _T],
    as_of: datetime | None,
) -> _T:
    with engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        connection.execute(_BOUND)
        return what(connection, as_of)


def _outdated(connection: Connection) -> str | None:
    """Return a sentence where the tables are not those of this release."""
    found, needed = migrations.revision(connection, "collector"), migrations.known("collector")[0]
    if found == needed:
        return None
    shown = re.sub(r"\W", "?", found, flags=re.ASCII)
    return f"its tables are at revision {shown} and this release needs {needed}"


def _sqlstate(error: Exception) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def _cause(error: Exception) -> str:
    """Say what is wrong with the standby, without a value in it."""
    if (state := _sqlstate(error)) is not None:
        return f"it failed with SQLSTATE {state}"
    origin: Any = getattr(error, "orig", None) or error
    words = str(origin)
    if re.search(r"time-?out|timed? ?out|QueuePool limit", words):
        return "it does not answer"
    if re.search(r"password|pg_hba|does not exist", words):
        return "it refuses the login"
    return "it cannot be reached"


class _StandbyLog:
    """Logs that the standby is gone, once a minute while it is, and when it is back."""

    def __init__(self) -> None:
        self._gone = False
        self._not_before = float("-inf")

    def write(self, trouble: str | None, now: float) -> None:
        if trouble is None:
            if self._gone:
                log.info("collector.standby_back")
            self._gone = False
        elif now >= self._not_before:
            log.warning('collector.standby_gone reason="%s"', trouble)
            self._gone, self._not_before = True, now + LOG_SECONDS
