"""Writes lines to a descriptor that may block; a caller waits one second at most."""

import os
import select
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, RLock, Thread

PATIENCE = 1.0
"""Seconds that a caller waits for its line to be written."""

MOST_WAITING = 1000
"""Lines that may wait for a blocked reader; further lines are dropped and counted."""

_A_MOMENT = 0.01


class LineWriter:
    """Writes whole lines to a descriptor, in a thread of its own.

    While the reader reads, a line is written when ``write`` returns. If it stops, the first caller
    waits for ``PATIENCE``, and later callers do not wait until all waiting lines are written.
    ``write`` may be called from a signal handler at any time: the queue and the lock are
    reentrant. The thread does not survive a fork.
    """

    def __init__(self, descriptor: int, report: Callable[[int], bytes]) -> None:
        """Write to ``descriptor``; ``report`` makes the line that reports how many were lost."""
        self._descriptor = descriptor
        self._report = report
        self._lines: SimpleQueue[tuple[bytes, Event]] = SimpleQueue()
        self._counts = RLock()
        self._waiting = 0
        self._lost = 0
        self._behind = False
        self._torn = False
        Thread(target=self._write_lines, name="telemetry-log", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Queue a line, and wait until it is written unless the reader is known to be blocked."""
        with self._counts:
            if self._waiting >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting += 1
        written = Event()
        self._lines.put((line, written))
        if not self._behind and not written.wait(PATIENCE):
            self._behind = True

    def end(self) -> int:
        """Wait a moment for the waiting lines; return how many lines were lost."""
        deadline = time.monotonic() + PATIENCE
        while self._waiting and time.monotonic() < deadline:
            time.sleep(_A_MOMENT)
        with self._counts:
            return self._waiting + self._lost

    def _write_lines(self) -> None:
        while True:
            line, written = self._lines.get()
            if not self._is_written(line):
                with self._counts:
                    self._lost += 1
            elif self._lines.empty():
                self._behind = False
                self._report_loss()
            with self._counts:
                self._waiting -= 1
            written.set()

    def _report_loss(self) -> None:
        lost = self._lost
        if lost and self._is_written(self._report(lost)):
            with self._counts:
                self._lost -= lost

    def _is_written(self, line: bytes) -> bool:
        """Return whether the whole line was written; a partly written line ends before the next."""
        rest = whole = b"\n" + line if self._torn else line
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError:
            self._torn = self._torn or len(rest) < len(whole)
            return False
        self._torn = False
        return True

    def _write_some(self, some: bytes) -> int:
        """Write as much as the descriptor accepts: a non-blocking one may accept nothing."""
        try:
            return os.write(self._descriptor, some)
        except BlockingIOError:
            is_writable(self._descriptor, seconds=None)
            return 0


def is_writable(descriptor: int, *, seconds: float | None) -> bool:
    """Wait until a descriptor accepts data or is closed; return whether it was in time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
