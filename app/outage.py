"""An outage of Redis or Postgres, as one process sees it: one line a minute, and one at its end.

This module imports no driver, because the scheduler uses it and does not load that of Postgres.
"""

import logging
import math
import time
from collections.abc import Callable
from threading import RLock
from typing import Any

from app import log

MOST_OFTEN = 60.0
"""The least number of seconds between two lines about failures."""

_AWAY = ("08", "28", "3D", "53300", "57P")
"""The first characters of the SQLSTATEs that concern every statement: no connection, no login, no
such database, too many connections, a server that stops or starts."""


class Outage:
    """Logs the failures of a server at most once a minute, and its return once.

    Threads share it, and a signal may interrupt an actor in it. So the lock is reentrant, and it is
    not held while a line is written.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without an outage; ``clock`` gives seconds."""
        self._clock = clock
        self._lock = RLock()
        self._since: float | None = None
        self._until: object = None
        self._stage = ""
        self._logged = False
        self._last_line = -math.inf

    def failed(self, stage: str, error: str, *, until: object = None) -> None:
        """Remember a failure, and log it unless one was logged within the last minute.

        ``until`` names what must succeed to end the outage; without it, any success ends it.
        """
        with self._lock:
            now = self._clock()
            if self._since is None:
                self._since, self._stage, self._logged = now, stage, False
            self._until = until
            due = now - self._last_line >= MOST_OFTEN
            if due:
                self._last_line, self._logged = now, True
        if due:
            log.event("failed", level=logging.WARNING, stage=stage, error=error)

    def succeeded(self, what: object = None) -> None:
        """End the outage if this success ends it; log the end if the outage was logged."""
        if self._since is None:  # the usual case needs no lock
            return
        with self._lock:
            if self._since is None or self._until not in {None, what}:
                return
            seconds = round(self._clock() - self._since)
            stage, logged, self._since = self._stage, self._logged, None
        if logged:
            log.event("recovered", stage=stage, after_seconds=seconds)


def is_away(error: BaseException) -> bool:
    """Return whether Postgres cannot be used at all, by an error's type and SQLSTATE."""
    origin: Any = getattr(error, "orig", None) or error
    state = getattr(origin, "sqlstate", None)
    if state is None:
        return "OperationalError" in (kind.__name__ for kind in type(origin).__mro__)
    return str(state).startswith(_AWAY)
