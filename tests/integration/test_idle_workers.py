"""What an idle worker asks of Redis, and what waits there while there is no worker."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from dramatiq import Message

from app import wakeups
from app.settings import Settings
from tests.support.command import python
from tests.support.steps import eventually
from workers import broker as brokers
from workers.broker import QUEUE, WAIT, Broker
from workers.scheduler import MOST_WAITING


@pytest.fixture
def broker(
    environment: dict[str, str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Broker]:
    """The broker of a worker, on a Redis without a key in it."""
    assert environment
    monkeypatch.setenv("REDIS_URL", redis_url)
    settings = Settings.load()
    client = redis.Redis(connection_pool=wakeups.pool(settings))
    yield Broker(  # type: ignore[no-untyped-call]  # Dramatiq has no types
        client=client, namespace=settings.namespace, middleware=[]
    )
    brokers.stopping.clear()
    client.close()


@pytest.fixture
def take(broker: Broker) -> Callable[[], Any]:
    """Take the next message as a worker does; None if there is none for a while."""
    consumer: Any = broker.consume(QUEUE, prefetch=2, timeout=1000)
    consumer.misses = 20  # as after many times without a message
    return lambda: next(consumer)


def test_an_idle_worker_asks_redis_a_few_times_a_minute(
    broker: Broker, take: Callable[[], Any], redis_url: str
) -> None:
    with (
        redis.Redis.from_url(redis_url) as client,
        client.monitor() as monitor,
        ThreadPoolExecutor(1) as worker,
    ):
        taking = worker.submit(take)
        commands = (each["command"].split() for each in monitor.listen())
        asked = next(words for words in commands if words[0] == WAIT)
        broker.enqueue(Message(QUEUE, "sweep", (), {}, {}))
        assert taking.result(1).actor_name == "sweep"
    assert 10 <= int(asked[-1]) < broker.heartbeat_timeout / 1000


def test_a_worker_without_a_message_waits_again_at_once_on_the_same_connection(
    broker: Broker, take: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "IDLE_SECONDS", 1)
    connection = broker.client.client_id()
    started = time.monotonic()
    assert take() is None
    assert 0.9 < time.monotonic() - started < 1.4
    assert broker.client.client_id() == connection


def test_a_worker_that_stops_leaves_no_connection_on_which_redis_still_waits(
    broker: Broker,
    take: Callable[[], Any],
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brokers, "ONE_SECOND", 0.2)

    def waiting() -> bool:
        with redis.Redis.from_url(redis_url) as client:
            return any(each["cmd"] == WAIT.lower() for each in client.client_list())

    with ThreadPoolExecutor(1) as worker:
        taking = worker.submit(take)
        eventually(waiting)
        brokers.stopping.set()
        assert taking.result(2) is None
    assert broker.client.ping()
    eventually(lambda: not waiting(), seconds=1)


SCHEDULE_FOR_LONG = """
from workers.scheduler import boot

scheduler = boot()
for minute in range(200):
    scheduler.send_actors(scheduler.actors, f"minute {minute}")
"""


def test_wake_ups_do_not_pile_up_while_there_is_no_worker(
    environment: dict[str, str], broker: Broker, redis_url: str
) -> None:
    said = python({**environment, "REDIS_URL": redis_url}, SCHEDULE_FOR_LONG)
    assert broker.client.llen(f"{broker.namespace}:{QUEUE}") == MOST_WAITING
    assert said.count("no worker takes the waiting wake-ups") == 1
