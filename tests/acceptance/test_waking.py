"""An idle worker asks Redis for nothing, and a wake-up reaches it at once."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from demo.servers import Servers
from tests.support.processes import Process, Processes
from tests.support.steps import ahead, eventually, ready, until_worked_off
from workers.broker import IDLE_SECONDS

SOON_AFTER_A_MINUTE = "2026-05-02T12:00:05Z"
"""A time from which the scheduler within a solo stays still for most of a minute."""

OURS = {"info", "config|resetstat"}
"""What the test itself asks."""

workers = pytest.mark.parametrize("name", ["worker", "solo"])


@pytest.fixture
def admin(embedded: Servers | None, redis_url: str) -> Iterator[Redis]:
    """Redis as its administrator sees it, who knows what everybody asks."""
    if embedded is None:
        pytest.skip("others may use the server that TEST_REDIS_URL names")
    with Redis.from_url(redis_url, single_connection_client=True) as client:
        yield client


def asleep(admin: Redis) -> int:
    """Return how many connections wait for Redis to wake them."""
    return int(admin.info("clients")["blocked_clients"])


def asked(admin: Redis) -> dict[str, int]:
    """Return how often each command was given by others since the count began."""
    counted = admin.info("commandstats").items()
    commands = {name.removeprefix("cmdstat_"): reported["calls"] for name, reported in counted}
    return {name: calls for name, calls in commands.items() if name not in OURS}


def idle(processes: Processes, name: str = "worker") -> Process:
    """Start a worker that has worked off its first wake-up."""
    worker = ready(processes, name, LOG_LEVEL="DEBUG", GUARD_CLOCK=ahead(SOON_AFTER_A_MINUTE))
    if name == "worker":  # a solo has a scheduler that wakes it
        processes.wake("sweep")
    worker.wait_for("Received message sweep")
    until_worked_off(processes)
    return worker


@workers
def test_an_idle_worker_asks_redis_for_nothing_and_is_woken_within_a_second(
    processes: Processes, admin: Redis, name: str
) -> None:
    worker = idle(processes, name)
    eventually(lambda: asleep(admin) == 1)
    admin.config_resetstat()
    time.sleep(3)  # in which nothing is to come
    assert asked(admin) == {}
    processes.wake("drain")
    worker.wait_for("Received message drain", seconds=1)


def test_an_idle_worker_asks_once_between_two_waits(processes: Processes, admin: Redis) -> None:
    idle(processes)
    eventually(lambda: asleep(admin) == 1)
    admin.config_resetstat()
    # Redis counts a wait when it is over.
    eventually(lambda: "brpoplpush" in asked(admin), IDLE_SECONDS + 5)
    eventually(lambda: asleep(admin) == 1)
    counted = asked(admin)
    assert (counted["brpoplpush"], counted["evalsha"]) == (1, 1)


def test_a_wake_up_wakes_all_that_wait_and_one_of_them_works_it_off(
    processes: Processes, admin: Redis
) -> None:
    # By the clock of the one, the other is alive: to Dramatiq a worker silent for a minute is dead.
    clock = ahead(SOON_AFTER_A_MINUTE)
    both = [idle(processes), ready(processes, LOG_LEVEL="DEBUG", GUARD_CLOCK=clock)]
    for times in range(1, 6):
        eventually(lambda: asleep(admin) == len(both))
        processes.wake("drain")
        until_worked_off(processes)
        received = [worker.output().count("Received message drain") for worker in both]
        assert sum(received) == times


@workers
def test_a_worker_has_no_consumer_for_delayed_messages(
    processes: Processes, admin: Redis, name: str
) -> None:
    worker = idle(processes, name)
    eventually(lambda: asleep(admin) == 1)
    assert worker.output().count("Adding consumer for") == 1
    assert "telemetry.DQ" not in worker.output()
