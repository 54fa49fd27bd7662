"""Stops processes for a while, with their memory, connections and locks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SECONDS = 20


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Freeze a process and all that it has started until the block ends.

    When the block begins, each thread has stopped. SIGSTOP alone only asks for that: until the
    kernel has stopped its last thread, a process goes on and may commit.
    """
    parent = psutil.Process(pid)
    family = [parent]
    try:
        _stop(parent)  # first, so that it starts no more children
        for child in parent.children(recursive=True):
            family.append(child)
            with suppress(psutil.NoSuchProcess):
                _stop(child)
        yield
    finally:
        for each in family:
            with suppress(psutil.NoSuchProcess):  # a test may have killed it
                each.resume()


def _stop(process: psutil.Process) -> None:
    process.suspend()
    deadline = time.monotonic() + SECONDS
    while not all(_has_stopped(thread) for thread in Path(f"/proc/{process.pid}/task").glob("*")):
        assert time.monotonic() < deadline, f"process {process.pid} goes on"
        time.sleep(0.002)


def _has_stopped(thread: Path) -> bool:
    try:
        # The state is the first field behind the name, which is in parentheses.
        state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in {"T", "Z"}
