"""Starts the project's programs as forks of a process that has imported their libraries already.

A fork is a process like any other: it has its own environment, arguments, streams and exit code,
and a test can kill it alone. It saves the second that Python needs to import SQLAlchemy, Typer and
Starlette; the tests would need this second a thousand times. The lines of the Procfile are started
without a fork, exactly as they are written: see ``tests.support.processes``.

The process that forks ends with the one that started it. Each test runner has one.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NoReturn

ROOT = Path(__file__).parents[2]
GUARD = ROOT / "tests" / "guard"
PROGRAMS = ("app.cli", "app.collector.web", "app.collector.commands", "uvicorn.server")
"""What the project's programs import."""

LIBRARIES = (
    *("alembic.command", "anyio", "dramatiq.brokers.redis", "httpx", "hypothesis.strategies"),
    *("jinja2", "pendulum", "periodiq", "prometheus_client", "psycopg", "pydantic_settings"),
    *("pytest", "rich.table", "sqlalchemy.dialects.postgresql.psycopg", "starlette.applications"),
    *("tenacity", "trustme", "typer", "uvicorn.server", "valkey"),
)
"""What the tests and the project import, but no module of the project's own: that may change."""

READ_FIRST = ("PYTHON", "LC_", "LANG")
"""How the names of the variables begin that Python reads before it imports anything."""

LONGEST_REQUEST = 200_000
"""Bytes of a program's arguments and environment; a message is received whole or not at all."""


class Fork:
    """A program that was started by a fork, with the part of ``Popen`` that the tests use."""

    def __init__(self, status: int) -> None:
        """Read the fork's number from a pipe, from which its exit code comes at its end."""
        self.returncode: int | None = None
        self._status = status
        self.pid = int(self._read())

    def _read(self) -> bytes:
        said = b""
        while not said.endswith(b"\n"):
            part = os.read(self._status, 1)
            assert part, "the process that forks has ended"
            said += part
        return said

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the program runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code; raise what ``Popen.wait`` raises."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        self.returncode = int(self._read())
        os.close(self._status)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Program = Fork | subprocess.Popen[bytes]


class Parent:
    """A process that has imported modules, and forks for each program."""

    def __init__(self, modules: Sequence[str], *path: Path) -> None:
        """Start it. Modules are looked for in ``path``, then where Python always looks."""
        self._asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sending = threading.Lock()
        for end in (self._asked, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LONGEST_REQUEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, path))},
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._asked.close()
        self._process.wait()

    def fork(self, words: Mapping[str, object], streams: Sequence[IO[bytes]]) -> Fork:
        """Fork, and have the fork call ``_become`` with these words and its three streams."""
        status, other = os.pipe()
        request = json.dumps(words).encode()
        assert len(request) < LONGEST_REQUEST
        with self._sending:
            numbers = [stream.fileno() for stream in streams]
            socket.send_fds(self._asked, [request], [*numbers, other])
        os.close(other)
        return Fork(status)


@cache
def programs() -> Parent:
    """Return the test runner's own process that forks."""
    return Parent(PROGRAMS, GUARD, ROOT)


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    streams: tuple[IO[bytes] | None, IO[bytes], IO[bytes]],
    *,
    directory: Path = ROOT,
    parent: Parent | None = None,
) -> Program:
    """Start a Python program in a directory, by a fork if nothing prevents it.

    ``streams`` are its stdin (None is empty), stdout and stderr. What Python reads before it
    imports anything has to be read by a Python of its own.
    """
    stdin, stdout, stderr = streams
    asked = {name for name in env if name.startswith(READ_FIRST)} - {"PYTHONPATH"}
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device, opened for its number
        given = stdin or nothing
        if asked or argv[0] != sys.executable or argv[1] not in {"-m", "-c"}:
            return subprocess.Popen(
                argv, cwd=directory, env=env, stdin=given, stdout=stdout, stderr=stderr
            )
        words = {"argv": [*argv[1:]], "env": {**env}, "directory": str(directory)}
        return (parent or programs()).fork(words, (given, stdout, stderr))


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    directory: Path = ROOT,
    typed: str = "",
    timeout: float | None = 100,
    parent: Parent | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end, ``typed`` being its input; return what it printed."""
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
        given.write(typed.encode())
        given.seek(0)
        program = start(argv, env, (given, out, err), directory=directory, parent=parent)
        try:
            code = program.wait(timeout)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
        printed = []
        for stream in (out, err):
            stream.seek(0)
            printed.append(stream.read().decode())
    return subprocess.CompletedProcess(argv, code, *printed)


def serve(requests: socket.socket) -> None:
    """Fork for each request until the runner has ended; return in the forks alone."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    while True:
        for ready in select.select([requests.fileno(), wake], [], [])[0]:
            if ready == wake:
                os.read(wake, 4096)
                _report_ended(running)
                continue
            request, descriptors, *_ = socket.recv_fds(requests, LONGEST_REQUEST, 4)
            if not request:
                os._exit(0)  # the runner has ended: nothing of it is left to do here
            *streams, status = descriptors
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for each in (*descriptors, *running.values(), wake, woken):
                    os.close(each)
                _become(**json.loads(request))
            for stream in streams:
                os.close(stream)
            os.write(status, b"%d\n" % pid)
            running[pid] = status


def _report_ended(running: dict[int, int]) -> None:
    while running:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        status = running.pop(pid)
        with suppress(BrokenPipeError):  # a test that has given up on its program reads nothing
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os.close(status)


@cache
def libraries() -> Parent:
    """Return a process that forks for each run of pytest on a copy of the project."""
    return Parent(LIBRARIES)


def pytest(
    words: Sequence[str], env: Mapping[str, str], *, directory: Path
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a copy of the project, which may differ from the project itself."""
    known = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that are in LIBRARIES
    argv = [sys.executable, "-m", "pytest", "-W", known, *words]
    return run(argv, env, directory=directory, timeout=None, parent=libraries())


_codes: list[object] = []
"""What the program that a fork has become has given to ``sys.exit``."""


def _become(argv: list[str], env: dict[str, str], directory: str) -> NoReturn:
    """Run a program as ``python`` would run it, and end."""
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(directory)
    what, named, *arguments = argv
    sys.path.insert(0, directory if what == "-m" else "")
    sys.argv = [what, *arguments]
    try:
        if what == "-c":
            exec(compile(named, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - python -c
        else:
            runpy.run_module(named, run_name="__main__", alter_sys=True)
        sys.exit()
    except SystemExit as ended:
        _codes.append(ended.code)
        raise


def _end_without_taking_down_the_modules() -> None:
    """End without freeing each module: that takes six times as long as ``--version``."""
    match _codes:
        case [None | int() as code]:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    return  # Python has an exit code of its own for that
            os._exit(code or 0)


def main() -> None:
    """Import modules, and serve."""
    number, *modules = sys.argv[1:]
    atexit.register(_end_without_taking_down_the_modules)  # the last to be called
    for module in modules:
        import_module(module)
    gc.freeze()  # a fork whose collector visits these objects copies each page of them
    with socket.socket(fileno=int(number)) as requests:
        serve(requests)


if __name__ == "__main__":
    main()
