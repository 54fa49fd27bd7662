"""The Procfile's own lines as processes that a test can watch, signal and kill."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from honcho.environ import parse_procfile
from redis import Redis

from app.settings import Settings
from workers.broker import QUEUE

ROOT = Path(__file__).parents[2]
GUARD = ROOT / "tests" / "guard"

HONCHO = f"exec {sys.executable} -m honcho -e /dev/null start"
"""Starts the named lines of the Procfile as one process group."""

WAYS = ("worker scheduler", "solo")
"""The two ways to run an install: the lines that an operator starts."""

READY = {
    "worker": "is ready for action",
    "scheduler": "telemetry.scheduled",
    "solo": "telemetry.scheduled",
}
"""What each process logs when it has started."""


def minimal(environment: Mapping[str, str], trace: Path | None = None) -> dict[str, str]:
    """Return the whole environment of a process: ours, what Python needs, and the guard."""
    if point := environment.get("GUARD_POINT"):
        check(point)
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(GUARD),
        **({"GUARD_TRACE": str(trace)} if trace else {}),
        **environment,
    }


def check(point: str) -> None:
    """Raise LookupError unless a GUARD_POINT names a function of the project and an event."""
    module, function, when = point.split(":")
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.exists():
        raise LookupError(f"GUARD_POINT={point}: there is no module {module}")
    found = ast.walk(ast.parse(file.read_text()))
    if function not in (each.name for each in found if isinstance(each, ast.FunctionDef)):
        raise LookupError(f"GUARD_POINT={point}: {module} has no function {function}")
    if when not in {"call", "return"}:
        raise LookupError(f"GUARD_POINT={point}: the event is neither call nor return")


def namespace(environment: Mapping[str, str]) -> str:
    """Return the prefix of an install's keys in Redis."""
    return Settings.model_validate({"DATABASE_URL": environment["DATABASE_URL"]}).namespace


def line(name: str, procfile: str = "Procfile") -> str:
    """Return a line of a Procfile."""
    found: str = parse_procfile((ROOT / procfile).read_text()).processes[name]
    return found


class Process:
    """One process of a Procfile, with the file that its output goes to."""

    def __init__(self, command: str, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(  # noqa: S602 - as every Procfile runner does
                command,
                shell=True,
                env=dict(environment),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, start: str) -> list[str]:
        """Return the lines of the output so far that begin with ``start``."""
        return [line for line in self.output().splitlines() if line.startswith(start)]

    def wait_for(self, words: str, count: int = 1, seconds: float = 30) -> None:
        """Wait until the output holds ``words`` ``count`` times."""
        deadline = time.monotonic() + seconds
        while self.output().count(words) < count:
            if time.monotonic() > deadline or self._popen.poll() is not None:
                raise AssertionError(f"{words!r} did not come within {seconds} s:\n{self.output()}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 10) -> int:
        """Wait for the end and return the exit code."""
        return self._popen.wait(seconds)

    def end(self) -> None:
        """Kill the process and all that it started, orphans of its group included."""
        try:
            family = [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(10)


class Processes:
    """Starts lines of the Procfile in one environment."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self.environment = dict(environment)
        self.trace = directory / "sockets"
        self._directory = directory
        self._running: list[Process] = []

    def start(self, name: str, procfile: str = "Procfile", **environment: str) -> Process:
        """Start a line of a Procfile, with variables changed or added."""
        return self.run(line(name, procfile), **environment)

    def run(self, command: str, **environment: str) -> Process:
        """Start any command in the processes' environment."""
        log = self._directory / f"{len(self._running)}.log"
        variables = minimal({**self.environment, **environment}, self.trace)
        self._running.append(Process(command, variables, log))
        return self._running[-1]

    def start_all(self, way: str, **environment: str) -> list[Process]:
        """Start each of several lines of the Procfile."""
        return [self.start(name, **environment) for name in way.split()]

    def start_to_stop_at(self, point: str, name: str = "worker") -> "Stopped":
        """Start a line of the Procfile that waits at MODULE:FUNCTION:call or :return."""
        reached = self._directory / f"{len(self._running)}.reached"
        process = self.start(
            name, GUARD_POINT=point, GUARD_ACTION="wait", GUARD_REACHED=str(reached)
        )
        return Stopped(process, reached)

    @property
    def queue(self) -> str:
        """The key of the queue that the processes share."""
        return f"{namespace(self.environment)}:{QUEUE}"

    def wake(self, actor: str) -> None:
        """Send an actor its message, as the scheduler does."""
        with Redis.from_url(self.environment["REDIS_URL"]) as client:
            own = namespace(self.environment)
            broker = RedisBroker(client=client, namespace=own, middleware=[])
            broker.enqueue(Message(QUEUE, actor, (), {}, {}))

    def end(self) -> None:
        for process in self._running:
            process.end()


class Stopped:
    """A process that waits at a named point of its code."""

    def __init__(self, process: Process, reached: Path) -> None:
        self.process = process
        self._reached = reached

    def wait(self, seconds: float = 30) -> int:
        """Wait until it reaches the point; return the id of the process that waits there."""
        deadline = time.monotonic() + seconds
        while not (self._reached.exists() and self._reached.read_text()):
            assert time.monotonic() < deadline, self.process.output()
            time.sleep(0.02)
        return int(self._reached.read_text())

    def go_on(self) -> None:
        """Wait until it reaches the point, and let it go on."""
        self.wait()
        self._reached.unlink()

    def kill(self) -> None:
        """Wait until it reaches the point, and kill it and its process group with -9."""
        self.wait()
        self.process.end()
