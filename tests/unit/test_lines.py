"""However often something occurs, it is one line a minute in the log."""

import logging
import time

import pytest

from app.collector.lines import OnceAMinute, Tally


def test_a_tally_logs_the_first_at_once_and_the_others_a_minute_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tally = Tally("collector.example")
    for now in (0.0, 1.0, 59.9, 60.0, 60.1, 500.0):
        tally.add(now)
    assert caplog.messages == [f"collector.example count={count}" for count in (1, 3, 2)]


def record(level: int, words: str, name: str = "asyncio") -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, words, None, None)


def test_a_warning_or_an_error_is_written_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    once = OnceAMinute(logging.Formatter().format)
    error = record(logging.ERROR, "one")

    assert [once.filter(error) for _ in range(3)] == [True, False, False]
    assert once.filter(record(logging.WARNING, "another"))
    now = 59.0
    assert not once.filter(error)
    now = 60.0
    assert once.filter(error)
    assert not once.filter(error)


def test_what_is_no_failure_is_always_written() -> None:
    once = OnceAMinute(logging.Formatter().format)
    assert all(once.filter(record(logging.INFO, "one")) for _ in range(3))


def test_lines_are_compared_as_they_are_written() -> None:
    once = OnceAMinute(lambda record: f"collector.failed error={record.name}")
    assert once.filter(record(logging.ERROR, "from 192.0.2.1"))
    assert not once.filter(record(logging.ERROR, "from 192.0.2.2"))
    assert once.filter(record(logging.ERROR, "from 192.0.2.2", "another"))
