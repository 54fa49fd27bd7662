"""A worker told to stop with a POST on its way stops within ten seconds and loses nothing."""

import os
import signal
import sys
from threading import Event

import psutil
import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from app.settings import Settings
from tests.database import attempts, outbox_row, run
from tests.faults.test_receiver import stay_silent
from tests.processes import Process, Processes
from tests.receiver import Receiver


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, db: Engine, processes: Processes) -> None:
    """The day's heartbeat waits to be sent, by a worker that will wait a minute for its answer."""
    run(db, "INSERT INTO telemetry_notice VALUES (1, now() - interval '2 days')")
    assert pipeline.write_heartbeat()
    processes.environment["TELEMETRY_TIMEOUT_SECONDS"] = "60"


def posting(process: Process, processes: Processes, receiver: Receiver) -> None:
    """Have a POST on its way to a receiver that stays silent."""
    receiver.answers = [stay_silent]
    process.wait_for("ready for action")
    processes.wake("drain")
    receiver.wait_for(1)


def settled_as_stopped(db: Engine) -> bool:
    """Whether the attempt is on record as stopped, and the row waits to be tried again."""
    (attempt,) = attempts(db)
    row = outbox_row(db)
    told = (row["state"], row["last_error"], attempt["outcome"], attempt["error"])
    return told == ("pending", "stopped", "retryable", "stopped")


def left_to_its_lease(db: Engine) -> bool:
    """Whether the attempt has no outcome, and the row is held until its lease lapses."""
    (attempt,) = attempts(db)
    row = outbox_row(db)
    return attempt["outcome"] is None and row["state"] == "sending" and bool(row["lease_until"])


def test_a_stop_ends_a_post_and_the_tries_after_it(
    environment: dict[str, str], receiver: Receiver, db: Engine
) -> None:
    assert environment
    stopping = Event()
    receiver.answers = [stay_silent]
    receiver.during = stopping.set
    Pipeline(Settings.load(), stopping).drain()
    assert settled_as_stopped(db)


@pytest.mark.parametrize(
    ("group", "times"), [(False, 1), (True, 1), (True, 2)], ids=["process", "group", "group twice"]
)
def test_a_post_on_its_way_is_settled_or_stays_recoverable(
    processes: Processes, receiver: Receiver, db: Engine, *, group: bool, times: int
) -> None:
    worker = processes.start("worker")
    posting(worker, processes, receiver)
    for _ in range(times):
        worker.signal(signal.SIGTERM, group=group)
    assert worker.wait(10) == 0
    assert settled_as_stopped(db), (worker.output(), attempts(db), outbox_row(db))


def test_under_honcho_no_process_has_to_be_killed(
    processes: Processes, receiver: Receiver, db: Engine
) -> None:
    line = f"exec {sys.executable} -m honcho -e /dev/null start worker scheduler"
    honcho = processes.run(line)
    posting(honcho, processes, receiver)
    honcho.signal(signal.SIGTERM)
    honcho.wait(10)
    assert "SIGKILL" not in honcho.output()
    assert "stopped (rc=-9)" not in honcho.output()
    assert settled_as_stopped(db)


def test_a_name_that_is_being_looked_up_holds_nothing_up(processes: Processes, db: Engine) -> None:
    worker = processes.start("worker", TELEMETRY_ENDPOINT="http://slow.invalid/")
    worker.wait_for("ready for action")
    processes.wake("drain")
    while not attempts(db):
        pass
    worker.signal(signal.SIGTERM)
    assert worker.wait(7) == 0
    assert settled_as_stopped(db)


def test_an_orphan_of_a_killed_master_stops_so_that_off_can_mean_off(
    processes: Processes, receiver: Receiver, db: Engine
) -> None:
    worker = processes.start("worker")
    worker.wait_for("ready for action")
    (child,) = psutil.Process(worker.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    child.wait(10)
    off = processes.start("worker", TELEMETRY_ENABLED="false")
    off.wait_for("ready for action")
    processes.wake("drain")
    processes.wake("sweep")
    off.wait_for("telemetry.discarded")
    assert receiver.connections == 0
    assert outbox_row(db)["state"] == "discarded"
