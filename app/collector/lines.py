"""A limit on the log: one line a minute for each cause, however often it occurs."""

import logging
import time
from collections.abc import Callable

EVERY_SECONDS = 60.0

log = logging.getLogger(__package__)


class Tally:
    """Counts something that callers can cause, and logs the count at most once a minute.

    Use it in one thread only, that of the event loop.
    """

    def __init__(self, line: str) -> None:
        """Log as ``line``."""
        self._line = line
        self._count = 0
        self._logged_at = float("-inf")

    def add(self, now: float) -> None:
        """Count one more; ``now`` is in seconds by a clock that never goes back.

        The first is logged at once. Those of the minute after it are in the next line.
        """
        self._count += 1
        if now >= self._logged_at + EVERY_SECONDS:
            log.warning("%s count=%d", self._line, self._count)
            self._count, self._logged_at = 0, now


class OnceAMinute(logging.Filter):
    """Drops a warning or an error if the same line was written within the last minute."""

    def __init__(self, format_line: Callable[[logging.LogRecord], str]) -> None:
        """Compare records by the lines that ``format_line`` makes of them."""
        super().__init__()
        self._format_line = format_line
        self._written_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the record."""
        if record.levelno < logging.WARNING:
            return True
        line, now = self._format_line(record), time.monotonic()
        recent = {each: at for each, at in self._written_at.items() if now < at + EVERY_SECONDS}
        self._written_at = {line: now} | recent
        return line not in recent
