"""A running server that a test may kill, start again, and freeze."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL, SIGQUIT

import psutil

from demo import servers
from tests.support.freezing import frozen

SECONDS = 20

AT_HOME = (
    "import os, sys; home, user, *command = sys.argv[1:];"
    "os.chdir(home); os.setreuid(int(user), int(user)); os.execv(command[0], command)"
)
"""Becomes a command in its home directory, as its user."""


class Server:
    """One of the embedded servers. It is restarted with the command that started it."""

    def __init__(self, keeper: servers.Servers, pid: int, is_up: Callable[[], bool]) -> None:
        self._keeper = keeper
        self._is_up = is_up
        self._process = psutil.Process(pid)
        self._command = self._process.cmdline()
        self._home = self._process.cwd()
        self._environment = self._process.environ()
        self._user = self._process.uids().real

    def child(self, title: str) -> psutil.Process:
        """Return the server's own process that has a word in its title."""
        return next(
            child for child in self._process.children() if title in " ".join(child.cmdline())
        )

    def kill(self) -> None:
        """Kill it without a clean shutdown, and wait until it is gone."""
        family = [self._process, *self._process.children(recursive=True)]
        # At SIGQUIT, Postgres and its children end at once and free their shared memory.
        self._process.send_signal(SIGQUIT if self._process.name() == "postgres" else SIGKILL)
        psutil.wait_procs(family, SECONDS)
        assert not self._is_up()

    def start(self) -> None:
        """Start it on the same address, with its data on disk, and wait until it answers."""
        pid = self._keeper.start(
            [sys.executable, "-c", AT_HOME, self._home, str(self._user), *self._command],
            env=self._environment,
            log=Path(f"{self._home}.again.log"),
        )
        self._process = psutil.Process(pid)
        deadline = time.monotonic() + SECONDS
        while not self._is_up():
            assert time.monotonic() < deadline, f"{self._command[0]} did not come back"
            time.sleep(0.05)

    def restart(self) -> None:
        with self.down():
            pass

    @contextmanager
    def down(self) -> Iterator[None]:
        """Kill it, and start it again when the block ends."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it and its children, with open sockets, until the block ends."""
        with frozen(self._process.pid):
            yield
