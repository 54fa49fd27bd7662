"""A line is written whole, or its loss is reported; nobody waits long for a reader."""

import fcntl
import os
import signal
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import FrameType

import pytest

from app.line_writer import MOST_WAITING, PATIENCE, LineWriter
from tests.support.pipe import Pipe


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    """A pipe with room in it."""
    opened = Pipe(tmp_path / "pipe")
    yield opened
    opened.hang_up()  # ends a thread that is blocked
    opened.close()


@pytest.fixture(params=[False, True], ids=["blocking", "non-blocking"])
def descriptor(pipe: Pipe, request: pytest.FixtureRequest) -> int:
    """The end of the pipe that a process writes to; a thread may use it until pytest ends."""
    end = os.open(pipe.path, os.O_WRONLY)
    if request.param:
        fcntl.fcntl(end, fcntl.F_SETFL, os.O_NONBLOCK)
    return end


@pytest.fixture
def writer(descriptor: int) -> LineWriter:
    """A writer into the pipe."""
    return LineWriter(descriptor, lambda lost: b"lost %d\n" % lost)


def read(pipe: Pipe, until: bytes) -> list[bytes]:
    """Return the lines of the test's own that come, until one of them has come."""
    read, deadline = b"", time.monotonic() + 10
    while until not in read:
        assert time.monotonic() < deadline, read[-1000:]
        read += pipe.read()
        time.sleep(0.01)
    return [line for line in read.splitlines() if not line.startswith(b"...")]


def seconds_of(writer: LineWriter, *lines: bytes) -> float:
    """Return how long it takes to hand over lines."""
    started = time.monotonic()
    for line in lines:
        writer.write(line)
    return time.monotonic() - started


def test_a_line_is_out_when_the_call_returns(pipe: Pipe, writer: LineWriter) -> None:
    for number in range(100):
        writer.write(b"%d\n" % number)
        assert pipe.read() == b"%d\n" % number


def test_a_blocked_reader_is_waited_for_once(pipe: Pipe, writer: LineWriter) -> None:
    pipe.fill()
    assert PATIENCE <= seconds_of(writer, *[b"line\n"] * 9) < 2 * PATIENCE


def test_lines_that_had_to_wait_come_whole_and_in_order(pipe: Pipe, writer: LineWriter) -> None:
    lines = [b"%d\n" % number for number in range(500)]
    pipe.fill()
    seconds_of(writer, *lines)
    assert read(pipe, until=b"499\n") == [line.strip() for line in lines]
    writer.write(b"waited for again\n")
    assert pipe.read() == b"waited for again\n"


def test_a_line_that_is_longer_than_the_pipe_comes_whole(pipe: Pipe, writer: LineWriter) -> None:
    line = b"x" * 300_000
    writer.write(line + b"\n")
    writer.write(b"next\n")
    assert read(pipe, until=b"next\n") == [line, b"next"]


def test_lines_of_two_writers_into_one_pipe_do_not_mix(pipe: Pipe) -> None:
    ends = [os.open(pipe.path, os.O_WRONLY) for _ in range(2)]
    writers = [LineWriter(end, lambda _lost: b"") for end in ends]
    lines = [letter * 3000 + b"\n" for letter in (b"a", b"b")]
    threads = [
        Thread(target=seconds_of, args=(writer, *[line] * 200))
        for writer, line in zip(writers, lines, strict=True)
    ]
    for thread in threads:
        thread.start()
    read = b""
    while any(thread.is_alive() for thread in threads):
        read += pipe.read()
    read += pipe.read()
    assert set(read.splitlines(keepends=True)) == set(lines)
    assert len(read) == 400 * 3001


def test_lines_beyond_the_most_that_may_wait_are_reported_as_lost(
    pipe: Pipe, writer: LineWriter
) -> None:
    pipe.fill()
    seconds_of(writer, *[b"kept\n"] * MOST_WAITING, *[b"dropped\n"] * 7)
    lines = read(pipe, until=b"lost 7\n")
    assert lines == [b"kept"] * MOST_WAITING + [b"lost 7"]
    writer.write(b"next\n")
    assert pipe.read() == b"next\n", "a loss is reported once"
    assert writer.end() == 0


def test_a_blocked_log_takes_no_more_than_so_much_memory(pipe: Pipe, writer: LineWriter) -> None:
    pipe.fill()
    tracemalloc.start()
    for number in range(50 * MOST_WAITING):
        writer.write(b"%d" % number * 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_reader_that_has_gone_raises_nothing_and_the_loss_is_reported_to_the_next_one(
    pipe: Pipe, writer: LineWriter
) -> None:
    pipe.hang_up()
    assert seconds_of(writer, *[b"lost\n"] * 5) < PATIENCE
    pipe.open()
    writer.write(b"next\n")
    assert pipe.read() == b"next\nlost 5\n"


def test_a_line_of_which_only_a_part_was_written_does_not_run_into_the_next(
    pipe: Pipe, writer: LineWriter
) -> None:
    writer.write(b"x" * 300_000 + b"\n")  # more than fits; nobody reads the rest
    pipe.hang_up()
    time.sleep(0.1)
    pipe.open()
    writer.write(b"next\n")
    part, *others = read(pipe, until=b"lost")
    assert set(part) == set(b"x")
    assert others == [b"next", b"lost 1"]


def test_the_end_says_how_many_lines_are_neither_written_nor_reported(
    pipe: Pipe, writer: LineWriter
) -> None:
    assert writer.end() == 0
    pipe.fill()
    seconds_of(writer, *[b"line\n"] * (MOST_WAITING + 3))
    started = time.monotonic()
    assert writer.end() == MOST_WAITING + 3
    assert time.monotonic() - started < 2 * PATIENCE


def test_the_end_waits_for_lines_that_are_being_written(pipe: Pipe, writer: LineWriter) -> None:
    pipe.fill()
    seconds_of(writer, *[b"line\n"] * 500)
    read = pipe.read()
    assert writer.end() == 0
    assert (read + pipe.read()).endswith(b"line\n" * 500)


def test_a_signal_handler_may_write_while_the_interrupted_one_waits(
    pipe: Pipe, writer: LineWriter
) -> None:
    def write(_number: int, _frame: FrameType | None) -> None:
        writer.write(b"handler\n")

    before = signal.signal(signal.SIGALRM, write)
    pipe.fill()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE / 2)
    assert seconds_of(writer, b"interrupted\n") < 3 * PATIENCE
    signal.signal(signal.SIGALRM, before)
    assert read(pipe, until=b"handler\n") == [b"interrupted", b"handler"]
