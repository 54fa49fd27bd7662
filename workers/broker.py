"""The broker that workers and scheduler share, built when a process asks for it.

Messages are wake-ups without data: the broker may lose any of them, and the sweep finds the work.
"""

import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from threading import Event, Thread
from types import FrameType
from typing import Any

import dramatiq
import pendulum
import redis
from dramatiq.brokers.redis import DEFAULT_MAINTENANCE_CHANCE, RedisBroker, _RedisConsumer
from dramatiq.errors import BrokerConnectionError, ConnectionClosed
from periodiq import PeriodiqMiddleware
from redis.exceptions import NoScriptError

from app import __version__, log, wakeups
from app.outage import Outage
from app.settings import Disabled, Settings, SettingsError

QUEUE = "telemetry"

IDLE_SECONDS = 20
"""How long Redis lets an idle worker wait for a wake-up; within a minute, or Dramatiq takes the
worker for dead."""

WAIT = "BRPOPLPUSH"

ONE_SECOND = 1
"""How soon a wait in this process notices that it is told to stop."""

stopping = Event()
"""Set when this process is told to stop: waits end, and no further attempt begins."""

STAGE = "redis"

redis_outage = Outage()
"""What this process knows of Redis; every exchange reports to it, so nobody else logs one."""


@cache
def settings() -> Settings:
    """Return the environment as it was when this process first asked."""
    return Settings.load()


def connect() -> RedisBroker:
    """Build the broker in a child of Dramatiq's master, which calls this after the fork."""
    if master := parent_process():
        _stop_once()
        _stop_without(master)
        Finalize(None, logging.shutdown, exitpriority=0)  # a fork runs no atexit function
    return build()


def build() -> RedisBroker:
    """Build the broker and make it Dramatiq's own; exit with a sentence where it cannot be."""
    log.setup(settings().log_level)
    # periodiq reads cron lines in the local zone, and pendulum keeps the zone it found first.
    pendulum.set_local_timezone(pendulum.UTC)
    try:
        namespace = settings().namespace
        client = _Client(connection_pool=wakeups.pool(settings()))
    except SettingsError as error:
        log.complain(f"consentos-telemetry: {error}")
        raise SystemExit(1) from None
    # The age of a wake-up means nothing, and it is told by two clocks that may disagree.
    middleware = [PeriodiqMiddleware(skip_delay=math.inf), Announcement()]
    broker = Broker(  # type: ignore[no-untyped-call]
        client=client,
        namespace=namespace,
        middleware=middleware,
        # In a million requests; ours are a tenth of what an idle worker of Dramatiq's makes.
        maintenance_chance=10 * DEFAULT_MAINTENANCE_CHANCE,
    )
    dramatiq.set_broker(broker)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_about_redis)
    return broker


def record_sweep() -> None:
    """Have Redis remember that a worker sweeps now, for `status`."""
    broker = dramatiq.get_broker()
    assert isinstance(broker, RedisBroker)  # noqa: S101 - `build` made it
    wakeups.record_sweep(broker.client, broker.namespace)


def _is_not_about_redis(record: logging.LogRecord) -> bool:
    """Return whether a line is to be logged: Dramatiq's own about a failure of Redis are not.

    It logs each try, every three seconds; ``redis_outage`` logs one a minute, in words.
    """
    if not record.name.startswith("dramatiq."):
        return True
    arguments = record.args if isinstance(record.args, tuple) else ()
    errors = [*arguments, record.exc_info and record.exc_info[1]]
    about_redis = any(isinstance(each, redis.RedisError | BrokerConnectionError) for each in errors)
    return not about_redis and not str(record.msg).startswith("Restarting consumer in ")


class Broker(RedisBroker):
    """Dramatiq's broker, which asks Redis for little while there is nothing to do."""

    @property
    def consumer_class(self) -> type[_RedisConsumer]:
        """What takes messages out of a queue."""
        return Consumer

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue; a queue of delayed messages is none of ours, and not to be watched."""
        super().declare_queue(queue_name)
        self.delay_queues.clear()


class Consumer(_RedisConsumer):
    """Dramatiq's consumer, which Redis wakes; the original asks it again and again."""

    def __next__(self) -> Any:
        """Return the next message, or None after a while without one."""
        room = self.outstanding_message_count < self.prefetch
        if room and not self.message_cache and not stopping.is_set():
            self._wait()
            self.misses = 0  # or Dramatiq would now wait by itself
        return super().__next__()  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        """Wait until there is a message, or nothing came for a while, or the process is to stop.

        Every waiting worker is woken by BRPOPLPUSH of a queue onto itself, and nothing is taken.
        """
        queue = f"{self.broker.namespace}:{self.queue_name}"
        try:
            with _connection(self.broker.client.connection_pool) as connection:
                connection.send_command(WAIT, queue, queue, IDLE_SECONDS)
                for _ in range(IDLE_SECONDS + wakeups.TIMEOUT):
                    if stopping.is_set():
                        break
                    if connection.can_read(timeout=ONE_SECOND):
                        connection.read_response()
                        redis_outage.succeeded(WAIT)
                        return
                connection.disconnect()  # its answer is not waited for
        except (redis.ConnectionError, redis.TimeoutError) as error:
            # One that breaks while it waits is replaced; if that fails, it is an outage.
            raise ConnectionClosed(error) from None
        except redis.RedisError as error:
            _report(error, WAIT)
            raise ConnectionClosed(error) from None


@contextmanager
def _connection(pool: redis.ConnectionPool) -> Iterator[redis.Connection]:
    """Take a connection out of a pool, and put it back."""
    try:
        connection = pool.get_connection()
    except redis.RedisError as error:
        _report(error, WAIT)
        raise
    try:
        yield connection
    finally:
        pool.release(connection)


def _report(error: redis.RedisError, what: str) -> None:
    """Report an exchange that failed; one that Redis has refused must succeed to be in order."""
    away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
    redis_outage.failed(STAGE, log.cause(error), until=None if away else what)


class RedisAwayError(redis.ConnectionError, BrokerConnectionError):
    """Redis cannot be reached: the one error that Dramatiq waits out, wherever it is raised."""


DISPATCHED = 4
"""Where an EVALSHA of Dramatiq's has the script's own command."""


class _Client(redis.Redis):
    """Dramatiq knows its own ConnectionError, and Redis's; a TimeoutError is neither."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        command = args[DISPATCHED] if args[0] == "EVALSHA" and len(args) > DISPATCHED else args[0]
        try:
            answer = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise  # the script is sent then
        except (redis.ConnectionError, redis.TimeoutError) as error:
            _report(error, command)
            raise RedisAwayError(str(error)) from error
        except redis.RedisError as error:
            _report(error, command)
            raise
        redis_outage.succeeded(command)
        return answer


def _stop_once() -> None:
    """Take the first SIGTERM or SIGHUP as the request to stop, and let the later ones pass.

    A process group that gets SIGTERM has Dramatiq's child signalled twice, by the sender and by
    its master, and Dramatiq takes the second as the order to kill a running actor. The second may
    interrupt the handler of the first at any line, so that only one of them gets to stop; and one
    may have come before this was called, so that for Dramatiq this one is the second.
    """
    stop = iter([signal.getsignal(signal.SIGTERM)])

    def first(signum: int, frame: FrameType | None) -> None:
        if callable(once := next(stop, None)):
            stopping.set()
            with suppress(SystemExit):
                once(signum, frame)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, first)


def _stop_without(master: BaseProcess) -> None:
    """Stop when Dramatiq's master is gone: whoever restarts it may have turned telemetry off."""

    def watch() -> None:
        master.join()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, name="telemetry-orphan", daemon=True).start()


class Announcement(dramatiq.Middleware):
    """Say at the boot of a worker whether telemetry is on, and what is odd about its settings."""

    def after_process_boot(self, broker: dramatiq.Broker) -> None:  # noqa: ARG002 - Dramatiq's name
        """Log the gate and the warnings, one line each."""
        gate = settings().gate
        if isinstance(gate, Disabled):
            log.event("disabled", reason=gate.reason, release=__version__)
        else:
            log.event(
                "enabled",
                endpoint=settings().endpoint_without_query,
                version=settings().app_version,
                edition=settings().edition,
                release=__version__,
            )
        for warning in settings().warnings:
            log.event("warning", level=logging.WARNING, reason=warning)
