"""A stdout that is blocked, closed or full delays nothing, and no line is lost silently."""

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM, Signals

import pytest
from sqlalchemy import Engine

from tests.support.database import outbox_row
from tests.support.pipe import Pipe
from tests.support.processes import READY, Process, Processes, line
from tests.support.receiver import Receiver, stay_silent
from tests.support.steps import eventually, without_harm

pytestmark = pytest.mark.usefixtures("pending")

senders = pytest.mark.parametrize("name", ["worker", "solo"])
every = pytest.mark.parametrize("name", READY)

PROMPT = 6.0
"""Seconds that a process with a blocked log takes to stop, at most; ten are promised."""

BOOTED = 4.0
"""Seconds after which a process without output has started."""

NON_BLOCKING = """
import fcntl, os, sys
fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)
os.execvp("sh", ["sh", "-c", sys.argv[1]])
"""
"""Makes stdout non-blocking, as a process that shares it may do, and becomes another command."""

FIRST_SOCKET = """
import pathlib, socket, sys
from app import log
log.setup("INFO")
pathlib.Path(sys.argv[1]).write_text(str(socket.socket().fileno()))
"""


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    """A full pipe."""
    opened = Pipe(tmp_path / "stdout")
    opened.fill()
    yield opened
    opened.close()


def sent(db: Engine) -> bool:
    return bool(outbox_row(db)["state"] == "sent")


def seconds_to_stop(process: Process, number: Signals = SIGTERM, *, group: bool = False) -> float:
    """Ask a process to stop, which must end as usual, and return how long that takes."""
    started = time.monotonic()
    process.signal(number, group=group)
    assert process.wait(10) == 0
    return time.monotonic() - started


def read(pipe: Pipe, until: str) -> list[str]:
    """Return the lines that come out of the pipe, until one of them begins with a word."""
    read = b""

    def has_come() -> bool:
        nonlocal read
        read += pipe.read()
        return any(line.startswith(until) for line in read.decode().splitlines())

    eventually(has_come)
    return [line for line in read.decode().splitlines() if line.startswith("telemetry.")]


@pytest.fixture(params=[">{}", ">{} 2>&1"], ids=["stdout", "stdout and stderr"])
def blocked(pipe: Pipe, request: pytest.FixtureRequest) -> str:
    """Makes the shell redirect stdout, or both outputs, into the pipe."""
    return str(request.param.format(pipe.path))


class TestAPipeThatNobodyReads:
    @pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
    @senders
    def test_holds_up_neither_a_heartbeat_nor_a_stop(
        self, processes: Processes, db: Engine, blocked: str, name: str, *, group: bool
    ) -> None:
        processes.wake("drain")
        process = processes.run(f"{line(name)} {blocked}")
        eventually(lambda: sent(db))
        assert seconds_to_stop(process, group=group) < PROMPT
        assert without_harm(process)

    @senders
    def test_does_not_hold_up_a_stop_where_the_pipe_was_read_until_then(
        self,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        pipe: Pipe,
        blocked: str,
        name: str,
    ) -> None:
        pipe.read()
        receiver.answers = [stay_silent]
        processes.wake("drain")
        process = processes.run(f"{line(name)} {blocked}", TELEMETRY_TIMEOUT_SECONDS="60")
        receiver.wait_for(1)
        pipe.fill()
        assert seconds_to_stop(process, group=True) < PROMPT
        assert outbox_row(db)["last_error"] == "stopped"

    def test_does_not_hold_up_the_stop_of_a_scheduler(
        self, processes: Processes, blocked: str
    ) -> None:
        scheduler = processes.run(f"{line('scheduler')} {blocked}")
        time.sleep(BOOTED)
        assert seconds_to_stop(scheduler) < PROMPT
        assert without_harm(scheduler)

    @pytest.mark.parametrize("name", ["scheduler", "solo"])
    def test_does_not_hold_up_a_process_that_cannot_work(
        self, processes: Processes, blocked: str, name: str
    ) -> None:
        process = processes.run(f"{line(name)} {blocked}", REDIS_URL="")
        assert process.wait(20) == 1
        assert without_harm(process)


@every
def test_lines_that_nobody_has_read_by_the_end_are_reported_on_stderr(
    processes: Processes, pipe: Pipe, name: str
) -> None:
    process = processes.run(f"{line(name)} >{pipe.path}")
    time.sleep(BOOTED)
    assert seconds_to_stop(process) < PROMPT
    (reported,) = process.output().splitlines()
    assert reported.startswith("telemetry.failed stage=log error=")
    assert reported.endswith('lines could not be written" level=WARNING')


@senders
def test_a_non_blocking_stdout_that_is_full_for_a_moment_loses_nothing(
    processes: Processes, receiver: Receiver, db: Engine, pipe: Pipe, name: str
) -> None:
    processes.wake("drain")
    command = shlex.join([sys.executable, "-c", NON_BLOCKING, line(name)])
    process = processes.run(f"exec {command} >{pipe.path}")
    (request,) = receiver.wait_for(1)
    eventually(lambda: sent(db))
    lines = read(pipe, until="telemetry.attempt")
    payload = f"telemetry.payload {request.body.decode()}"
    events = [line.split()[0] for line in lines]
    assert lines.count(payload) == 1
    assert events.index("telemetry.enabled") < lines.index(payload)
    assert seconds_to_stop(process) < PROMPT
    assert process.output() == ""


class TestAClosedStdout:
    @pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
    @senders
    def test_sends_the_log_to_stderr_and_the_heartbeat_still_leaves(
        self, processes: Processes, receiver: Receiver, db: Engine, name: str, closed: str
    ) -> None:
        processes.wake("drain")
        process = processes.run(f"{line(name)} {closed}")
        (request,) = receiver.wait_for(1)
        process.wait_for("telemetry.attempt")
        eventually(lambda: sent(db))
        assert seconds_to_stop(process) < PROMPT
        first, *_ = process.output().splitlines()
        assert first.startswith('telemetry.warning reason="stdout is closed, so the log goes to')
        assert f"telemetry.payload {request.body.decode()}\n" in process.output()
        assert without_harm(process)

    def test_sends_the_log_of_a_scheduler_to_stderr(self, processes: Processes) -> None:
        scheduler = processes.run(f"{line('scheduler')} >&-")
        scheduler.wait_for(READY["scheduler"])
        assert seconds_to_stop(scheduler) < PROMPT
        assert without_harm(scheduler)

    @senders
    def test_with_a_closed_stderr_lets_the_heartbeat_leave_without_a_log(
        self, processes: Processes, receiver: Receiver, db: Engine, name: str
    ) -> None:
        processes.wake("drain")
        process = processes.run(f"{line(name)} <&- >&- 2>&-")
        receiver.wait_for(1)
        eventually(lambda: sent(db))
        assert seconds_to_stop(process) < PROMPT
        assert process.output() == ""

    @pytest.mark.parametrize("command", ["status", "preview", "audit", "send", "send --json"])
    def test_does_not_make_a_command_fail(
        self, processes: Processes, receiver: Receiver, command: str
    ) -> None:
        ended = processes.run(f"exec {sys.executable} -m app {command} >&-")
        assert ended.wait(30) == 0, ended.output()
        assert without_harm(ended)
        assert "unforeseen" not in ended.output()
        sends = command.startswith("send")
        assert len(receiver.requests) == sends
        assert ("telemetry.payload" in ended.output()) == sends
        assert ("stdout is closed" in ended.output()) == (command == "send")

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_is_not_reused_for_the_next_socket(
        self, processes: Processes, tmp_path: Path, closed: str
    ) -> None:
        descriptor = tmp_path / "descriptor"
        command = shlex.join([sys.executable, "-c", FIRST_SOCKET, str(descriptor)])
        ended = processes.run(f"exec {command} {closed}")
        assert ended.wait(30) == 0, ended.output()
        assert int(descriptor.read_text()) > 2


def test_a_reader_that_has_gone_stops_neither_a_heartbeat_nor_a_stop(
    processes: Processes, receiver: Receiver, db: Engine, pipe: Pipe
) -> None:
    solo = processes.run(f"{line('solo')} >{pipe.path}")
    time.sleep(BOOTED)
    pipe.hang_up()
    processes.wake("drain")
    receiver.wait_for(1)
    eventually(lambda: sent(db))
    assert seconds_to_stop(solo) < PROMPT
    (reported,) = solo.output().splitlines()
    assert reported.startswith("telemetry.failed stage=log error=")
