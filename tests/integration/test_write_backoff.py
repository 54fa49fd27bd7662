"""After a write that failed, a process waits before it counts ConsentOS's tables again."""

import time
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine

from app.pipeline import CollectError, Pipeline
from tests.conftest import Clock
from tests.support.database import give_notice, run
from tests.support.steps import DAY_BEGINS, TOMORROW_BEGINS

BREAK = "ALTER TABLE scan_jobs RENAME TO moved"
MEND = "ALTER TABLE moved RENAME TO scan_jobs"


@dataclass
class Stopwatch:
    """How far ahead of its real value the process's monotonic clock is."""

    ahead: float = 0

    def shift(self, seconds: float) -> None:
        self.ahead += seconds


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """The process's monotonic clock, which a test may move on."""
    real, stopwatch = time.monotonic, Stopwatch()
    monkeypatch.setattr(time, "monotonic", lambda: real() + stopwatch.ahead)
    return stopwatch


@pytest.fixture
def noticed(db: Engine) -> None:
    give_notice(db, "2026-05-01")


@pytest.fixture(autouse=True)
def due(noticed: None, clock: Clock, db: Engine) -> None:  # noqa: ARG001 - as a fixture
    """Half past two, and ConsentOS's tables cannot be counted."""
    clock(DAY_BEGINS)
    run(db, BREAK)


def fail_after(seconds: int, pipeline: Pipeline, stopwatch: Stopwatch) -> None:
    """See the pipeline do nothing until some seconds are over, and then fail again."""
    stopwatch.shift(seconds - 2)
    assert not pipeline.write_heartbeat()
    stopwatch.shift(4)
    with pytest.raises(CollectError):
        pipeline.write_heartbeat()


def test_the_wait_doubles_from_a_minute_to_an_hour(
    pipeline: Pipeline, stopwatch: Stopwatch
) -> None:
    with pytest.raises(CollectError):
        pipeline.write_heartbeat()
    for minutes in (1, 2, 4, 8, 16, 32, 60, 60):
        fail_after(60 * minutes, pipeline, stopwatch)


def test_the_wait_starts_again_at_a_minute_after_a_write_that_did_not_fail(
    pipeline: Pipeline, stopwatch: Stopwatch, clock: Clock, db: Engine
) -> None:
    with pytest.raises(CollectError):
        pipeline.write_heartbeat()
    fail_after(60, pipeline, stopwatch)
    run(db, MEND)
    stopwatch.shift(122)
    assert pipeline.write_heartbeat()
    run(db, BREAK)
    clock(TOMORROW_BEGINS)
    with pytest.raises(CollectError):
        pipeline.write_heartbeat()
    fail_after(60, pipeline, stopwatch)


def test_an_operators_send_does_not_wait(pipeline: Pipeline, db: Engine) -> None:
    with pytest.raises(CollectError):
        pipeline.write_heartbeat()
    run(db, MEND)
    sent = pipeline.send().row
    assert sent
    assert sent["state"] == "sent"
