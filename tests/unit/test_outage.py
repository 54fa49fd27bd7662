"""An outage is one line a minute, however often something fails, and its end is one line."""

import re
from collections.abc import Callable
from threading import Thread

import psycopg
import pytest
from psycopg import errors

from app.outage import Outage, is_away

TEN_MINUTES = 600


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outage(clock: Clock) -> Outage:
    return Outage(clock)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what the log has, and empty it."""

    def lines() -> list[str]:
        found = caplog.messages[:]
        caplog.clear()
        return found

    caplog.set_level("INFO", "telemetry")
    return lines


Said = Callable[[], list[str]]


def test_ten_minutes_of_failures_are_a_line_a_minute_and_one_at_the_end(
    outage: Outage, clock: Clock, said: Said
) -> None:
    for _ in range(TEN_MINUTES):
        outage.failed("redis", "Redis does not answer")
        clock.now += 1
    assert said() == ['telemetry.failed stage=redis error="Redis does not answer"'] * 10
    for _ in range(3):
        outage.succeeded()
    assert said() == ["telemetry.recovered stage=redis after_seconds=600"]


def test_a_server_that_is_well_is_not_mentioned(outage: Outage, said: Said) -> None:
    outage.succeeded()
    assert said() == []


def test_a_new_cause_waits_for_its_minute(outage: Outage, clock: Clock, said: Said) -> None:
    outage.failed("redis", "one")
    outage.failed("redis", "another")
    clock.now += 60
    outage.failed("redis", "another")
    errors = [line.rpartition("error=")[2] for line in said()]
    assert errors == ["one", "another"]


def test_a_server_that_comes_and_goes_is_no_more_than_a_line_and_its_end_a_minute(
    outage: Outage, clock: Clock, said: Said
) -> None:
    for _ in range(TEN_MINUTES):
        outage.failed("redis", "gone")
        outage.succeeded()
        clock.now += 1
    names = [line.split()[0] for line in said()]
    assert names == ["telemetry.failed", "telemetry.recovered"] * 10


def test_what_was_refused_must_succeed_before_the_outage_is_over(
    outage: Outage, said: Said
) -> None:
    outage.failed("redis", "a right is missing", until="SET")
    outage.succeeded("LLEN")
    assert len(said()) == 1
    outage.succeeded("SET")
    assert re.fullmatch(r"telemetry.recovered .*", said()[0])


def test_threads_that_fail_at_once_write_one_line(outage: Outage, said: Said) -> None:
    threads = [Thread(target=outage.failed, args=("redis", "gone")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said()) == 1


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (psycopg.OperationalError("connection failed"), True),
        (errors.AdminShutdown(), True),
        (errors.CannotConnectNow(), True),
        (errors.TooManyConnections(), True),
        (errors.InvalidPassword(), True),
        (errors.InvalidCatalogName(), True),
        (errors.UndefinedTable(), False),
        (errors.InsufficientPrivilege(), False),
        (errors.DiskFull(), False),
        (errors.QueryCanceled(), False),
        (errors.LockNotAvailable(), False),
        (errors.ReadOnlySqlTransaction(), False),
        (ValueError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_database_is_away_if_no_statement_could_succeed(
    error: Exception,
    away: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    assert is_away(error) is away
