"""Lines for a descriptor that may be blocked: whoever logs waits for a moment at most."""

import os
import select
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, RLock, Thread

PATIENCE = 1.0
"""Seconds that a caller waits for its line to be written, before it goes on without."""

MOST_WAITING = 1000
"""Lines that may wait for a blocked reader; those that come after them are dropped and counted."""

_A_MOMENT = 0.01


class LineWriter:
    """Writes whole lines to a descriptor, in a thread of its own.

    With a reader that reads, a line is written when ``write`` returns. With one that does not, the
    first caller waits for ``PATIENCE``, and nobody waits again until all waiting lines are written.
    ``write`` may be called from a signal handler, whatever the handler has interrupted: the queue
    and the lock are reentrant. The thread does not survive a fork.
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
        """Have a line written, and wait for that unless the reader is known to be blocked."""
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
        """Give waiting lines a last moment; return how many are neither written nor reported."""
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
        """Write a line, and return whether all of it was: a part of one ends before the next."""
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
        """Write as much as the descriptor takes; it may be a non-blocking one that takes none."""
        try:
            return os.write(self._descriptor, some)
        except BlockingIOError:
            is_writable(self._descriptor, seconds=None)
            return 0


def is_writable(descriptor: int, *, seconds: float | None) -> bool:
    """Wait until a descriptor takes something, or ends; return whether it did so in time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
