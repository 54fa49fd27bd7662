"""If Redis fails in any way, processes go on, and each day's heartbeat is still sent once."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import Engine, text

from demo.servers import Servers
from tests.conftest import Clock
from tests.support.breakable import Server
from tests.support.database import count
from tests.support.processes import WAYS, Process, Processes
from tests.support.receiver import Receiver, answer, late
from tests.support.relay import Relay
from tests.support.steps import (
    DAY_BEGINS,
    MORE_THAN_A_LEASE,
    TOMORROW_BEGINS,
    ahead,
    bodies,
    eventually,
    ready,
    standing_at,
    without_harm,
)
from workers.broker import QUEUE
from workers.scheduler import MOST_WAITING

EVE = "2026-05-01T12:00:00Z"
A_MINUTE = 65
"""Seconds within which a minute has certainly begun."""

FIVE_SECONDS = timedelta(seconds=5)

Trouble = Callable[[], AbstractContextManager[object]]
"""Makes Redis fail until the block ends."""

Shock = Callable[[], object]

either_way = pytest.mark.parametrize("way", WAYS)
"""Runs a test for each way to run an install."""


class Admin:
    """Redis as its administrator sees it, over a connection that survives all faults."""

    def __init__(self, client: redis.Redis, processes: Processes) -> None:
        self.ask: Callable[..., Any] = client.execute_command
        self._processes = processes

    @contextmanager
    def crowded(self) -> Iterator[None]:
        """Accept no connection but the administrator's."""
        (_, most) = self.ask("CONFIG GET", "maxclients").popitem()
        self.ask("CONFIG SET", "maxclients", 1)
        self.hang_up()
        try:
            yield
        finally:
            self.ask("CONFIG SET", "maxclients", most)

    @contextmanager
    def full(self) -> Iterator[None]:
        self.ask("CONFIG SET", "maxmemory", 1)
        try:
            yield
        finally:
            self.ask("CONFIG SET", "maxmemory", 0)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.ask("REPLICAOF", "127.0.0.1", 1)
        try:
            yield
        finally:
            self.ask("REPLICAOF", "NO", "ONE")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Require an unknown password. The open connections are broken, so all of them need it."""
        self.ask("CONFIG SET", "requirepass", "unknown")
        self.hang_up()
        try:
            yield
        finally:
            self.ask("CONFIG SET", "requirepass", "")

    def hang_up(self) -> None:
        self.ask("CLIENT KILL", "TYPE", "normal")

    def forget(self) -> None:
        self.ask("FLUSHALL")

    def forget_scripts(self) -> None:
        self.ask("SCRIPT FLUSH")

    def waiting(self) -> int:
        """Return how many wake-ups wait for a worker."""
        return int(self.ask("LLEN", self._processes.queue))

    def unfinished(self) -> int:
        """Return how many wake-ups wait, or are being worked on."""
        return int(self.ask("HLEN", f"{self._processes.queue}.msgs"))

    def put(self, message: str) -> None:
        """Queue bytes, which need not be a message."""
        self.ask("HSET", f"{self._processes.queue}.msgs", "an id", message)
        self.ask("RPUSH", self._processes.queue, "an id")


@pytest.fixture(autouse=True)
def quick(breakable: Servers, processes: Processes) -> None:
    """Workers retry a lost Redis ten times a second instead of every three seconds."""
    assert breakable
    processes.environment["dramatiq_restart_delay"] = "100"


@pytest.fixture
def admin(redis_url: str, processes: Processes) -> Iterator[Admin]:
    with redis.Redis.from_url(redis_url, single_connection_client=True) as client:
        yield Admin(client, processes)


@pytest.fixture
def trouble(request: pytest.FixtureRequest, admin: Admin, valkey: Server) -> Trouble:
    """The trouble that is the test's parameter."""
    if request.param == "silent":
        relay: Relay = request.getfixturevalue("relayed_redis")
        return relay.silent
    troubles: dict[str, Trouble] = {
        "down": valkey.down,
        "crowded": admin.crowded,
        "frozen": partial(frozen_for_ten_seconds, valkey),
        "full": admin.full,
        "read-only": admin.read_only,
        "locked": admin.locked,
    }
    return troubles[request.param]


@contextmanager
def frozen_for_ten_seconds(valkey: Server) -> Iterator[None]:
    with valkey.frozen():
        thaw = time.monotonic() + 10
        yield
        time.sleep(max(0, thaw - time.monotonic()))


def in_trouble(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trouble", names, indirect=True)


@pytest.fixture
def due(noticed: None, clock: Clock) -> None:  # noqa: ARG001 - pytest runs it first
    """It is half past two, and the day's heartbeat is not written yet."""
    clock(DAY_BEGINS)


StartOnTheEve = Callable[[str], tuple[Process, Process]]


@pytest.fixture
def start_on_the_eve(processes: Processes, clock: Clock, admin: Admin) -> StartOnTheEve:
    """Start worker and scheduler so that they have been idle since noon at half past two."""

    def start(way: str) -> tuple[Process, Process]:
        clock(EVE)
        started = processes.start_all(way, GUARD_CLOCK=ahead(DAY_BEGINS, -FIVE_SECONDS))
        started[0].wait_for("telemetry.notice")
        eventually(lambda: admin.unfinished() == 0)
        clock(DAY_BEGINS)
        return started[0], started[-1]

    return start


def scheduler_without_a_worker(processes: Processes, admin: Admin) -> Process:
    """Start a scheduler shortly before half past two, and have its first wake-ups wait."""
    scheduler = processes.start("scheduler", GUARD_CLOCK=ahead(DAY_BEGINS, -FIVE_SECONDS))
    eventually(lambda: admin.waiting() >= 1)
    return scheduler


def start_with_a_post_on_its_way(
    processes: Processes, receiver: Receiver, name: str = "worker"
) -> tuple[Process, Callable[[], None]]:
    """Start a worker whose first POST is answered when the test asks for it."""
    reply, wanted = late(answer(202))
    receiver.answers = [reply, answer(202)]
    worker = ready(processes, name, TELEMETRY_TIMEOUT_SECONDS="60")
    processes.wake("drain")
    receiver.wait_for(1)
    return worker, wanted.set


def all_sent(db: Engine, receiver: Receiver, days: int = 1) -> None:
    """Wait until each day's heartbeat is on record as sent; it was received once, as it is kept."""

    def rows() -> list[tuple[str, str]]:
        statement = "SELECT state, payload::text FROM telemetry_outbox ORDER BY day"
        with db.begin() as connection:
            return [(state, body) for state, body in connection.execute(text(statement))]

    eventually(lambda: [state for state, _ in rows()] == ["sent"] * days, A_MINUTE)
    assert [body for _, body in rows()] == [body.decode() for body in bodies(receiver)]
    assert count(db, "telemetry_attempt") == days


def unharmed(*started: Process) -> bool:
    """Whether the processes still run, and have logged everything as events."""
    states = {psutil.Process(process.pid).status() for process in started}
    return psutil.STATUS_ZOMBIE not in states and without_harm(*started)


def the_next_day_is_sent_too(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine
) -> None:
    clock(TOMORROW_BEGINS)
    processes.wake("sweep")
    receiver.wait_for(2, A_MINUTE)
    all_sent(db, receiver, days=2)


@pytest.mark.usefixtures("due")
@either_way
@in_trouble("down", "silent", "locked", "crowded")
def test_processes_that_start_without_redis_wait_for_it_and_then_work(
    processes: Processes, receiver: Receiver, db: Engine, trouble: Trouble, way: str
) -> None:
    with trouble():
        started = processes.start_all(way)
        worker, scheduler = started[0], started[-1]
        scheduler.wait_for("telemetry.failed stage=redis")
        worker.wait_for("telemetry.failed stage=redis")
        assert count(db, "telemetry_outbox") == 0
    receiver.wait_for(1, A_MINUTE)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


@either_way
@in_trouble("down", "frozen", "silent", "full", "locked")
def test_a_wake_up_that_cannot_be_sent_at_its_minute_is_sent_as_soon_as_redis_is_back(
    start_on_the_eve: StartOnTheEve, receiver: Receiver, db: Engine, trouble: Trouble, way: str
) -> None:
    worker, scheduler = start_on_the_eve(way)
    with trouble():
        scheduler.wait_for("telemetry.failed stage=redis", seconds=A_MINUTE)
        assert receiver.connections == 0
    receiver.wait_for(1, seconds=20)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


@either_way
def test_a_failure_between_two_minutes_is_repaired_by_the_next_sweep(
    start_on_the_eve: StartOnTheEve,
    relayed_redis: Relay,
    admin: Admin,
    receiver: Receiver,
    db: Engine,
    way: str,
) -> None:
    worker, scheduler = start_on_the_eve(way)
    admin.forget()
    admin.forget_scripts()
    admin.hang_up()
    relayed_redis.cut()
    receiver.wait_for(1, A_MINUTE)
    all_sent(db, receiver)
    assert scheduler.lines("telemetry.failed") == worker.lines("telemetry.failed") == []
    assert unharmed(worker, scheduler)


@pytest.mark.usefixtures("pending")
@in_trouble("down", "silent", "full", "read-only", "locked")
def test_an_actor_ends_its_work_without_redis_and_the_worker_takes_the_next(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine, trouble: Trouble
) -> None:
    worker, answer_now = start_with_a_post_on_its_way(processes, receiver)
    with trouble():
        answer_now()
        all_sent(db, receiver)
        worker.wait_for("telemetry.failed stage=redis")
    the_next_day_is_sent_too(processes, clock, receiver, db)
    assert unharmed(worker)


@pytest.fixture
def shock(
    request: pytest.FixtureRequest, admin: Admin, valkey: Server, relayed_redis: Relay
) -> Shock:
    """The shock that is the test's parameter."""
    shocks: dict[str, Shock] = {
        "restart": valkey.restart,
        "cut": relayed_redis.cut,
        "hang up": admin.hang_up,
        "forget": admin.forget,
        "forget scripts": admin.forget_scripts,
    }
    return shocks[request.param]


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("name", ["worker", "solo"])
@pytest.mark.parametrize(
    "shock", ["restart", "cut", "hang up", "forget", "forget scripts"], indirect=True
)
def test_a_shock_during_the_work_on_a_wake_up_does_not_change_the_work(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine, shock: Shock, name: str
) -> None:
    worker, answer_now = start_with_a_post_on_its_way(processes, receiver, name)
    shock()
    answer_now()
    all_sent(db, receiver)
    the_next_day_is_sent_too(processes, clock, receiver, db)
    assert unharmed(worker)


@pytest.mark.parametrize("actor", ["heartbeat", "sweep"])
@pytest.mark.usefixtures("due")
def test_a_heartbeat_that_is_written_without_redis_is_sent_after_its_return(
    processes: Processes, receiver: Receiver, db: Engine, valkey: Server, actor: str
) -> None:
    writing = standing_at("app.pipeline:write_heartbeat:return", processes, actor)
    with valkey.down():
        writing.go_on()
        writing.process.wait_for("telemetry.failed stage=redis")
        assert count(db, "telemetry_outbox") == 1
        assert receiver.connections == 0
    processes.wake("sweep")
    receiver.wait_for(1, A_MINUTE)
    all_sent(db, receiver)
    assert unharmed(writing.process)


@pytest.mark.usefixtures("pending")
def test_a_wake_up_that_is_forgotten_while_it_waits_is_followed_by_the_next_minutes(
    processes: Processes, admin: Admin, receiver: Receiver, db: Engine
) -> None:
    scheduler = scheduler_without_a_worker(processes, admin)
    admin.forget()
    worker = processes.start("worker")
    receiver.wait_for(1, A_MINUTE)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


@pytest.mark.usefixtures("pending")
def test_a_wake_up_that_is_lost_on_its_way_to_the_worker_is_followed_by_the_next_minutes(
    processes: Processes, relayed_redis: Relay, admin: Admin, receiver: Receiver, db: Engine
) -> None:
    scheduler = scheduler_without_a_worker(processes, admin)
    lose_what_waits(relayed_redis)
    worker = processes.start("worker")
    assert relayed_redis.lost.wait(30)
    assert receiver.connections == 0
    receiver.wait_for(1, A_MINUTE)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


@pytest.mark.usefixtures("pending")
def test_lost_wake_ups_soon_stop_counting_as_waiting(
    processes: Processes, relayed_redis: Relay, admin: Admin, receiver: Receiver, db: Engine
) -> None:
    for _ in range(MOST_WAITING):
        processes.wake("drain")
    lose_what_waits(relayed_redis)
    worker = processes.start("worker", dramatiq_queue_prefetch=str(MOST_WAITING))
    assert relayed_redis.lost.wait(30)
    eventually(lambda: admin.waiting() == 0)
    scheduler = processes.start("scheduler")
    receiver.wait_for(1, seconds=20)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


def lose_what_waits(relay: Relay) -> None:
    """Lose the wake-ups that a worker is going to fetch."""
    relay.lose_the_reply_to(rb"\r\nfetch\r\n.*\r\n%b\r\n" % QUEUE.encode())


@pytest.mark.usefixtures("pending")
def test_a_wake_up_that_is_sent_twice_as_its_reply_was_lost_sends_one_heartbeat(
    processes: Processes, relayed_redis: Relay, admin: Admin, receiver: Receiver, db: Engine
) -> None:
    processes.wake("drain")  # Redis then has the script whose reply is to be lost
    relayed_redis.lose_the_reply_to(rb"\r\nenqueue\r\n")
    scheduler = processes.start("scheduler", GUARD_CLOCK=ahead(MORE_THAN_A_LEASE, FIVE_SECONDS))
    assert relayed_redis.lost.wait(30)
    eventually(lambda: admin.waiting() == 3)
    worker = processes.start("worker")
    receiver.wait_for(1)
    eventually(lambda: admin.unfinished() == 0)
    all_sent(db, receiver)
    assert unharmed(worker, scheduler)


GARBAGE: dict[str, dict[str, object]] = {
    "unknown actor": {"actor_name": "stranger"},
    "arguments": {"args": [1, 2, 3]},
    "no time": {"options": {"redis_message_id": "an id", "scheduled_at": "never"}},
    "no options": {"options": None},
}


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("kind", [*GARBAGE, "not JSON", "not a message"])
def test_an_invalid_message_does_not_keep_the_next_wake_up_from_working(
    processes: Processes, admin: Admin, receiver: Receiver, db: Engine, kind: str
) -> None:
    worker = ready(processes)
    for _ in range(3):  # more than the worker has threads
        admin.put(garbage(kind))
        eventually(lambda: admin.waiting() == 0)
    processes.wake("drain")
    receiver.wait_for(1, seconds=20)
    all_sent(db, receiver)
    assert unharmed(worker)


def garbage(kind: str) -> str:
    """Return an invalid message."""
    good = {
        "queue_name": QUEUE,
        "actor_name": "sweep",
        "args": [],
        "kwargs": {},
        "options": {"redis_message_id": "an id"},
        "message_id": "an id",
        "message_timestamp": 0,
    }
    wrong = {"not JSON": "\0", "not a message": "[]"}
    return wrong.get(kind) or json.dumps({**good, **GARBAGE[kind]})
