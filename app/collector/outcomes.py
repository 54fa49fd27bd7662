"""The outcomes of requests to store a heartbeat: counted in memory, added to a table each minute.

``kill -9`` loses the counts of the last minute. A count contains no id, no address and no schema
number. One more row of the table counts the requests of each process's busiest client.
"""

import logging
import time
from collections import Counter
from datetime import date
from threading import Lock
from typing import Literal, get_args

from sqlalchemy import Connection, Engine, text

from app.collector import store
from app.collector.limit import Busiest

Outcome = Literal[
    "accepted",
    "duplicate",
    "newer schema",
    "invalid",
    "too large",
    "rate-limited",
    "too many ids",
    "unavailable",
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""``accepted`` is new, and ``duplicate`` was stored before; ``invalid`` is not a heartbeat, or did
not arrive complete and in time; ``unavailable`` could not be stored at that moment."""

BUSIEST = "from the busiest client"
"""Not an outcome: how many of these requests came from the client with the most of them on this UTC
day. Each process adds its own number."""

LOG_SECONDS = 60.0

_OF_DAY = text(f"SELECT outcome, requests FROM ingest WHERE day = :day AND outcome <> '{BUSIEST}'")  # noqa: S608 - only constants of this module
_FROM_BUSIEST = text(f"SELECT requests FROM ingest WHERE day = :day AND outcome = '{BUSIEST}'")  # noqa: S608 - see above

log = logging.getLogger(__package__)


class Outcomes:
    """The counts since they were last added to the table; any thread may add to them."""

    def __init__(self, busiest: Busiest | None = None) -> None:
        """Start at zero; with ``busiest``, also count the requests of the busiest client."""
        self._lock = Lock()
        self._busiest = busiest
        self._counts: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._logged_at = float("-inf")

    def count(self, outcome: Outcome) -> None:
        """Count one request."""
        with self._lock:
            self._counts[outcome] += 1
            self._totals[outcome] += 1

    def count_client(self, address: str) -> None:
        """Count one request for the client that it came from."""
        if self._busiest is None:
            return
        with self._lock:
            if self._busiest.count(address, time.time()):
                self._counts[BUSIEST] += 1

    def totals(self) -> dict[str, int]:
        """Return how many requests had each outcome since the process began."""
        with self._lock:
            return {outcome: self._totals[outcome] for outcome in OUTCOMES}

    def newer_schema(self, version: int | None) -> None:
        """Count a request of a schema that is not supported yet; log it at most once a minute."""
        self.count("newer schema")
        now = time.monotonic()
        with self._lock:
            if now < self._logged_at + LOG_SECONDS:
                return
            self._logged_at = now
        log.warning("collector.newer_schema schema=%s", "?" if version is None else version)

    def write(self, engine: Engine) -> None:
        """Add the counts to those of the day, by the database's clock, and start at zero again.

        If that fails, they are kept for the next call.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            with engine.begin() as connection:
                store.add_outcomes(connection, counts)
        except BaseException:
            with self._lock:
                self._counts += counts
            raise


def of_day(connection: Connection, day: date) -> dict[str, int]:
    """Return how many requests of a UTC day had each outcome that occurred."""
    return dict(connection.execute(_OF_DAY, {"day": day}).all())


def from_the_busiest(connection: Connection, day: date) -> int:
    """Return how many requests of a UTC day came from the busiest client of each process."""
    found: int | None = connection.scalar(_FROM_BUSIEST, {"day": day})
    return found or 0
