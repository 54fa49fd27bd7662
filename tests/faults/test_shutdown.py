"""A process that is asked to stop exits with 0 within ten seconds, and loses no work."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from threading import Event

import psutil
import pytest
import redis
from sqlalchemy import Engine

from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.breakable import Server
from tests.support.database import attempts, one, outbox_row, run
from tests.support.processes import HONCHO, READY, WAYS, Process, Processes, line
from tests.support.receiver import Receiver, answer, stay_silent
from tests.support.steps import (
    MORE_THAN_A_BACKOFF,
    eventually,
    left,
    locked,
    ready,
    standing_at,
    without_harm,
    worked_off,
)

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child"]
"""Starts a command as the first process of a process namespace, as a container does."""

if os.geteuid() != 0:
    CONTAINER += ["--user", "--map-root-user"]

senders = pytest.mark.parametrize("name", ["worker", "solo"])
"""Runs a test for each process that sends."""


@pytest.fixture(autouse=True)
def patient(pending: None, processes: Processes) -> None:  # noqa: ARG001 - pytest runs it first
    """The day's heartbeat waits to be sent, with a deadline of a minute for each POST."""
    processes.environment["TELEMETRY_TIMEOUT_SECONDS"] = "60"


def posting(
    process: Process, processes: Processes, receiver: Receiver, name: str = "worker"
) -> None:
    """Start a POST to a receiver that does not answer."""
    receiver.answers = [stay_silent]
    process.wait_for(READY[name])
    processes.wake("drain")
    receiver.wait_for(1)


def stopped(process: Process) -> bool:
    """Whether a process that is asked to stop does so in time and without an error."""
    return process.wait(10) == 0 and without_harm(process)


def settled_as_stopped(db: Engine) -> bool:
    """Whether the attempt is on record as stopped, and the row waits to be tried again."""
    (attempt,) = attempts(db)
    row = outbox_row(db)
    end = (row["state"], row["last_error"], attempt["outcome"], attempt["error"])
    return end == ("pending", "stopped", "retryable", "stopped")


def left_to_its_lease(db: Engine) -> bool:
    """Whether the attempt has no outcome, and the row is held until its lease lapses."""
    (attempt,) = attempts(db)
    row = outbox_row(db)
    return attempt["outcome"] is None and row["state"] == "sending" and bool(row["lease_until"])


def untouched(db: Engine) -> bool:
    """Whether the row waits as it was written."""
    row = outbox_row(db)
    return (row["state"], row["drains"], row["attempts"]) == ("pending", 0, 0)


def waiting(processes: Processes) -> int:
    """Return how many wake-ups no worker has fetched."""
    with redis.Redis.from_url(processes.environment["REDIS_URL"]) as client:
        return int(client.execute_command("LLEN", processes.queue))


class TestWithAPostOnItsWay:
    def test_a_stop_ends_it_and_the_tries_after_it(
        self, environment: dict[str, str], receiver: Receiver, db: Engine
    ) -> None:
        assert environment
        stopping = Event()
        receiver.answers = [stay_silent]
        receiver.during = stopping.set
        Pipeline(Settings.load(), stopping).drain()
        assert settled_as_stopped(db)

    @pytest.mark.parametrize(
        "requests",
        [
            [(SIGTERM, False)],
            [(SIGTERM, True)],
            [(SIGTERM, True)] * 2,
            [(SIGINT, True)],
            [(SIGINT, True)] * 2,
        ],
        ids=["process", "group", "group twice", "Ctrl-C", "Ctrl-C twice"],
    )
    @senders
    def test_a_post_on_its_way_is_settled_before_the_end(
        self,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        name: str,
        requests: list[tuple[signal.Signals, bool]],
    ) -> None:
        worker = processes.start(name, LOG_LEVEL="DEBUG")
        posting(worker, processes, receiver, name)
        for number, group in requests:
            worker.signal(number, group=group)
        assert stopped(worker)
        assert "Consumer thread stopped." in worker.output(), "it was given up"
        assert settled_as_stopped(db), (worker.output(), attempts(db), outbox_row(db))

    @pytest.mark.parametrize("way", WAYS)
    def test_a_worker_settles_it_under_honcho_and_no_process_has_to_be_killed(
        self, processes: Processes, receiver: Receiver, db: Engine, way: str
    ) -> None:
        honcho = processes.run(f"{HONCHO} {way}")
        posting(honcho, processes, receiver, way.split(maxsplit=1)[0])
        honcho.signal(SIGTERM)
        honcho.wait(10)
        assert "SIGKILL" not in honcho.output()
        assert "stopped (rc=-9)" not in honcho.output()
        assert settled_as_stopped(db)

    @senders
    def test_a_worker_that_is_the_first_process_of_a_container_settles_it(
        self,
        container: Callable[[str], Process],
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        name: str,
    ) -> None:
        worker = container(name)
        posting(worker, processes, receiver, name)
        first_process_in(worker).send_signal(SIGTERM)
        assert stopped(worker)
        assert settled_as_stopped(db)

    def test_a_scheduler_that_is_the_first_process_of_a_container_leaves_it_alone(
        self,
        container: Callable[[str], Process],
        processes: Processes,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        scheduler = container("scheduler")
        worker = processes.start("worker")
        posting(worker, processes, receiver)
        first_process_in(scheduler).send_signal(SIGTERM)
        assert stopped(scheduler)
        assert left_to_its_lease(db)
        assert len(receiver.requests) == 1

    def test_a_reload_settles_it_and_the_worker_goes_on(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        worker = processes.start("worker")
        posting(worker, processes, receiver)
        worker.signal(SIGHUP)
        worker.wait_for("ready for action", count=2)
        assert settled_as_stopped(db)
        receiver.answers = [answer(202)]
        clock(MORE_THAN_A_BACKOFF)
        processes.wake("drain")
        worker.wait_for("telemetry.payload")
        worker.wait_for("outcome=sent")
        assert outbox_row(db)["state"] == "sent"
        assert left(receiver, db, times=2)
        worker.signal(SIGTERM)
        assert stopped(worker)

    @senders
    def test_a_name_that_is_being_looked_up_holds_nothing_up(
        self, processes: Processes, db: Engine, name: str
    ) -> None:
        worker = ready(processes, name, TELEMETRY_ENDPOINT="http://slow.invalid/")
        processes.wake("drain")
        eventually(lambda: attempts(db))
        worker.signal(SIGTERM)
        assert worker.wait(7) == 0
        assert settled_as_stopped(db)


@pytest.fixture
def container(processes: Processes) -> Callable[[str], Process]:
    """Start a line of the Procfile as the first process of a process namespace."""
    permitted = subprocess.run([*CONTAINER, "true"], capture_output=True, check=False)
    if permitted.returncode != 0:
        pytest.skip(f"no process namespace can be made here: {permitted.stderr.decode().strip()}")

    def start(name: str) -> Process:
        process = processes.run(shlex.join(["exec", *CONTAINER, "sh", "-c", line(name)]))
        process.wait_for(READY[name])
        return process

    return start


def first_process_in(container: Process) -> psutil.Process:
    (first,) = psutil.Process(container.pid).children()
    return first


class TestBetweenPosts:
    def test_a_stop_ends_the_wait_until_a_row_is_due_and_leaves_the_row_unchanged(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        run(db, "UPDATE telemetry_outbox SET next_attempt_at = now() + interval '50 s'")
        waiting = processes.start_to_stop_at("app.outbox:until_due:return")
        processes.wake("drain")
        waiting.go_on()
        waiting.process.signal(SIGTERM)
        assert stopped(waiting.process)
        assert worked_off(processes), "the drain was left behind"
        assert untouched(db)
        assert receiver.connections == 0

    @senders
    def test_a_stop_ends_the_wait_for_the_next_try_and_the_row_backs_off(
        self, processes: Processes, receiver: Receiver, db: Engine, name: str
    ) -> None:
        receiver.answers = [answer(503, "Retry-After: 3")]
        worker = ready(processes, name)
        processes.wake("drain")
        worker.wait_for("telemetry.attempt")
        worker.signal(SIGTERM)
        assert stopped(worker)
        row, (attempt,) = outbox_row(db), attempts(db)
        assert (row["state"], row["last_error"]) == ("pending", "HTTP 503")
        assert (row["next_attempt_at"] - attempt["finished_at"]).total_seconds() >= 60
        assert (attempt["outcome"], attempt["http_status"]) == ("retryable", 503)
        assert len(receiver.requests) == 1


class TestAtBoot:
    @pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
    @pytest.mark.parametrize(
        ("name", "point"),
        [
            ("worker", "workers.broker:connect:call"),
            ("scheduler", "workers.broker:build:call"),
            ("solo", "workers.broker:build:call"),
            ("scheduler", "workers.scheduler:boot:return"),
            ("solo", "workers.scheduler:boot:return"),
        ],
    )
    def test_a_process_that_has_only_begun_stops_as_well(
        self, processes: Processes, db: Engine, name: str, point: str, *, group: bool
    ) -> None:
        booting = processes.start_to_stop_at(point, name)
        booting.wait()
        booting.process.signal(SIGTERM, group=group)
        booting.go_on()
        assert stopped(booting.process), booting.process.output()
        assert untouched(db)


@pytest.fixture(params=["down", "frozen"])
def without_redis(
    request: pytest.FixtureRequest, valkey: Server
) -> Callable[[], AbstractContextManager[None]]:
    """A block during which Redis is down, or does not answer."""
    return {"down": valkey.down, "frozen": valkey.frozen}[request.param]


class TestWithoutRedis:
    @senders
    def test_a_worker_stops_with_wake_ups_that_it_has_fetched(
        self,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        name: str,
        without_redis: Callable[[], AbstractContextManager[None]],
    ) -> None:
        write_another_days(db)
        receiver.answers = [stay_silent]
        worker = ready(processes, name)
        for _ in range(7):
            processes.wake("drain")
        receiver.wait_for(2)  # both threads work, and two more wake-ups were fetched
        assert waiting(processes) >= 3  # solo schedules more itself
        with without_redis():
            worker.signal(SIGTERM)
            assert stopped(worker)
        assert without_harm(worker)
        assert one(db, "SELECT count(*) FROM telemetry_outbox WHERE last_error = 'stopped'") == 2
        assert [attempt["error"] for attempt in attempts(db)] == ["stopped"] * 2
        assert len(receiver.requests) == 2

    @pytest.mark.parametrize("name", ["scheduler", "solo"])
    def test_a_scheduler_stops_with_wake_ups_that_it_could_not_send(
        self,
        processes: Processes,
        db: Engine,
        name: str,
        without_redis: Callable[[], AbstractContextManager[None]],
    ) -> None:
        with without_redis():
            scheduler = processes.start(name)
            scheduler.wait_for("telemetry.failed stage=redis")
            scheduler.signal(SIGTERM)
            assert stopped(scheduler)
        assert untouched(db)


def write_another_days(db: Engine) -> None:
    """Make the next day's heartbeat due too, for a second worker thread to send."""
    run(
        db,
        "INSERT INTO telemetry_outbox"
        " (id, day, instance_id, payload, created_at, next_attempt_at, expires_at)"
        " SELECT gen_random_uuid(), day + 1, instance_id, payload, created_at, next_attempt_at,"
        " expires_at FROM telemetry_outbox",
    )


class TestWithoutTheDatabase:
    @pytest.mark.parametrize("how", ["frozen", "locked"])
    @senders
    def test_a_worker_that_cannot_settle_stops_and_leaves_the_row_to_its_lease(
        self,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        postgres: Server,
        name: str,
        how: str,
    ) -> None:
        settling = standing_at("app.delivery:_settle:call", processes, name=name)
        with postgres.frozen() if how == "frozen" else locked(db, "telemetry_outbox"):
            settling.go_on()
            settling.process.wait_for("telemetry.payload")
            settling.process.signal(SIGTERM)
            assert stopped(settling.process)
        assert left_to_its_lease(db)
        assert len(receiver.requests) == 1


def test_an_orphan_of_a_killed_master_stops_so_that_off_can_mean_off(
    processes: Processes, receiver: Receiver, db: Engine
) -> None:
    worker = ready(processes)
    (child,) = psutil.Process(worker.pid).children()
    os.kill(worker.pid, SIGKILL)
    child.wait(10)
    off = ready(processes, TELEMETRY_ENABLED="false")
    processes.wake("drain")
    processes.wake("sweep")
    off.wait_for("telemetry.discarded")
    assert receiver.connections == 0
    assert outbox_row(db)["state"] == "discarded"
