"""Reads for the page from a hot standby, if there is one; from the primary if the standby fails.

A separate thread checks both every few seconds: whether the standby answers, whether it has the
tables of this release, and how far it has replayed. So at most one request waits for a standby that
does not answer, and no request waits for the primary while the standby answers.
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
"""The time between two checks."""
AGAIN_SECONDS = 0.5
"""The time until a check is repeated that conflicted with the replay, and so has no result."""
STALE_SECONDS = 20.0
"""The result of a check is ignored after so long."""
BEHIND = timedelta(minutes=1)
"""If the standby is behind by more than this, the page shows as of when its numbers are."""
LOG_SECONDS = 60.0
END_SECONDS = 0.5
CONNECTIONS = 5
MARKS = 1_000

CONFLICT = "40001"
"""The SQLSTATE of a statement that the standby cancels because it conflicts with the replay."""

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
    """The primary's write position at a moment, by its clock and by this process's clock."""

    lsn: int
    at: datetime
    seen: float


class Reached(NamedTuple):
    """The standby's replay position, when that was committed, and the standby's time."""

    lsn: int
    at: datetime | None
    now: datetime


def behind(reached: Reached, marks: Iterable[Mark], seen: float) -> datetime | None:
    """Return the time as of which the standby is, if that is more than ``BEHIND`` ago; else None.

    That is the time of the last mark that the standby has passed. The time of the last commit is
    not enough: the primary may be idle. ``seen`` is now by this process's clock.

    Raises:
        LookupError: neither a mark nor a commit shows it.
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
    """The result of a check of the standby; ``trouble`` is why it cannot be used."""

    trouble: str | None
    behind: datetime | None = None
    seen: float = 0.0


class Readers:
    """Reads from the standby, and from the primary what the standby cannot answer."""

    def __init__(self, primary: Engine, standby: str | URL | None = None) -> None:
        """Read from ``primary``, and inside ``watching`` from the server of ``standby``."""
        self._primary = primary
        self._standby: Engine | None = None
        if standby is not None:
            self._standby = bounded.connect(standby, kept=CONNECTIONS)
            # Separate engines without a pool, so that each check makes a new connection.
            self._looks = bounded.connect(standby), bounded.connect(primary.url)
        self._found = _Look("it was not checked yet")
        self._marks: deque[Mark] = deque(maxlen=MARKS)
        self._log = _StandbyLog()

    def read(self, what: Callable[[Connection, datetime | None], _T]) -> _T:
        """Return what ``what`` reads, in one transaction that cannot write.

        It is called with the connection, and with the time as of which the data is, or None for
        now. If the standby fails, it is called again with a connection to the primary.
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
        if _conflicts(error):
            return  # the standby works; only this statement or connection was cancelled
        self._found = _Look(_cause(error))
        standby.dispose()  # otherwise the next request would wait on another connection to it
        self._log.write(self._found.trouble, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Check the standby until the block ends, and then close its connections.

        The block begins after the first check, or when the standby does not answer in time.
        """
        if self._standby is None:
            yield
            return
        looked, ended = Event(), Event()
        # A daemon: the end of the process does not wait for a check.
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
            found = self._look(standby)
            if found is None:
                ended.wait(AGAIN_SECONDS)
                continue
            self._found = found
            self._log.write(found.trouble, time.monotonic())
            looked.set()
            ended.wait(EVERY_SECONDS)

    def _mark(self, primary: Engine) -> None:
        """Note the primary's write position; if it does not answer, the last mark grows older."""
        try:
            with primary.connect() as connection:
                connection.execute(_BOUND)
                seen = time.monotonic()
                lsn, at = connection.execute(_WRITTEN).one()
        except SQLAlchemyError:
            return  # /readyz reports it
        self._marks.append(Mark(int(lsn), at, seen))

    def _look(self, standby: Engine) -> _Look | None:
        """Check the standby; return None if the check itself conflicted with the replay."""
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
            return _Look("it does not report how far it has replayed")
        except SQLAlchemyError as error:
            return None if _conflicts(error) else _Look(_cause(error))


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
    """Return a sentence if the tables are not those of this release."""
    found, needed = migrations.revision(connection, "collector"), migrations.known("collector")[0]
    if found == needed:
        return None
    shown = re.sub(r"\W", "?", found, flags=re.ASCII)
    return f"its tables are at revision {shown} and this release needs {needed}"


def _sqlstate(error: Exception) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def _conflicts(error: Exception) -> bool:
    """Return whether the replay has cancelled a statement, or a connection that was being made.

    An error of a connection that is being made has no SQLSTATE, so that only its words show it.
    """
    return _sqlstate(error) == CONFLICT or "conflict with recovery" in str(error)


def _cause(error: Exception) -> str:
    """Return what is wrong with the standby, without any value in it."""
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
