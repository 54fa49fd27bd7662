"""The broker of workers and scheduler. It is built when a process asks for it, not on import.

Messages are wake-ups without data. Redis may lose any of them; the next sweep finds the work.
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
"""How long an idle worker waits in Redis for a wake-up. Dramatiq takes a worker for dead that is
silent for a minute."""

WAIT = "BRPOPLPUSH"

ONE_SECOND = 1
"""How soon a wait in this process notices a request to stop."""

stopping = Event()
"""Set when this process is asked to stop. Then waits end, and no attempt begins."""

STAGE = "redis"

redis_outage = Outage()
"""The outage of Redis, as seen by this process. Every exchange with Redis reports to it, and no
other code logs a failure of Redis."""


@cache
def settings() -> Settings:
    """Return the settings, read from the environment once in each process."""
    return Settings.load()


def connect() -> RedisBroker:
    """Build the broker in a child of Dramatiq's master, which calls this after the fork."""
    if master := parent_process():
        _stop_once()
        _stop_without(master)
        Finalize(None, logging.shutdown, exitpriority=0)  # a fork runs no atexit function
    return build()


def build() -> RedisBroker:
    """Build the broker and set it as Dramatiq's; if that fails, exit with a sentence."""
    log.setup(settings().log_level)
    # periodiq reads cron lines in the local zone. pendulum caches that zone at its first use.
    pendulum.set_local_timezone(pendulum.UTC)
    try:
        namespace = settings().namespace
        client = _Client(connection_pool=wakeups.pool(settings()))
    except SettingsError as error:
        log.complain(f"consentos-telemetry: {error}")
        raise SystemExit(1) from None
    # No wake-up is too old: its age means nothing, and comes from two clocks that may disagree.
    middleware = [PeriodiqMiddleware(skip_delay=math.inf), Announcement()]
    broker = Broker(  # type: ignore[no-untyped-call]  # Dramatiq's has no types
        client=client,
        namespace=namespace,
        middleware=middleware,
        # The chance per request, in millionths. This worker makes a tenth of the usual requests.
        maintenance_chance=10 * DEFAULT_MAINTENANCE_CHANCE,
    )
    dramatiq.set_broker(broker)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_about_redis)
    return broker


def record_sweep() -> None:
    """Store in Redis that a worker has swept now, for `status`."""
    broker = dramatiq.get_broker()
    assert isinstance(broker, RedisBroker)  # noqa: S101 - `build` has set it
    wakeups.record_sweep(broker.client, broker.namespace)


def _is_not_about_redis(record: logging.LogRecord) -> bool:
    """Return whether a line may be logged: it is not one of Dramatiq's about a failure of Redis.

    Dramatiq logs each try, every three seconds. ``redis_outage`` logs one line a minute instead.
    """
    if not record.name.startswith("dramatiq."):
        return True
    arguments = record.args if isinstance(record.args, tuple) else ()
    errors = [*arguments, record.exc_info and record.exc_info[1]]
    about_redis = any(isinstance(each, redis.RedisError | BrokerConnectionError) for each in errors)
    return not about_redis and not str(record.msg).startswith("Restarting consumer in ")


class Broker(RedisBroker):
    """Dramatiq's broker, with few requests to Redis while there is nothing to do."""

    @property
    def consumer_class(self) -> type[_RedisConsumer]:
        """The class that takes messages from a queue."""
        return Consumer

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue, but not its queue of delayed messages, which is never used."""
        super().declare_queue(queue_name)
        self.delay_queues.clear()


class Consumer(_RedisConsumer):
    """Dramatiq's consumer, which waits in Redis for a message. The original polls.

    It extends a private class of Dramatiq and uses its counters, because Dramatiq has no public
    class of a consumer for Redis.
    """

    def __next__(self) -> Any:
        """Return the next message, or None after a while without one."""
        room = self.outstanding_message_count < self.prefetch
        if room and not self.message_cache and not stopping.is_set():
            self._wait()
            self.misses = 0  # with misses, Dramatiq would add a wait of its own
        return super().__next__()  # type: ignore[no-untyped-call]  # as below

    def _wait(self) -> None:
        """Wait for a message, for ``IDLE_SECONDS`` at most, or until the process must stop.

        BRPOPLPUSH of a queue onto itself takes no message, so it wakes every waiting worker.
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
                connection.disconnect()  # Redis may still answer, and nobody would read it
        except (redis.ConnectionError, redis.TimeoutError) as error:
            # Dramatiq replaces a connection that breaks during a wait. Only if that fails, it is
            # an outage.
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
    """Report a failed exchange. If Redis refused a command, only its success ends the outage."""
    away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
    redis_outage.failed(STAGE, log.cause(error), until=None if away else what)


class RedisAwayError(redis.ConnectionError, BrokerConnectionError):
    """Redis cannot be reached. Dramatiq waits and retries after this error, wherever it occurs."""


DISPATCHED = 4
"""The position of the script's own command in an EVALSHA of Dramatiq."""


class _Client(redis.Redis):
    """A client that reports failures, and turns a time-out into an error that Dramatiq handles."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        command = args[DISPATCHED] if args[0] == "EVALSHA" and len(args) > DISPATCHED else args[0]
        try:
            answer = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py has no types here
        except NoScriptError:
            raise  # Dramatiq then sends the script itself
        except (redis.ConnectionError, redis.TimeoutError) as error:
            _report(error, command)
            raise RedisAwayError(str(error)) from error
        except redis.RedisError as error:
            _report(error, command)
            raise
        redis_outage.succeeded(command)
        return answer


def _stop_once() -> None:
    """Stop at the first SIGTERM or SIGHUP, and ignore later ones.

    If a process group gets SIGTERM, Dramatiq's child gets it twice: from the sender and from its
    master. At the second one Dramatiq kills a running actor. The second may interrupt the handler
    of the first at any line, and only one of the two calls may go through. One may have come before
    this function was called: Dramatiq then takes the next one as the second and raises SystemExit.
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
    """Stop when Dramatiq's master is gone: its next start may be with telemetry turned off."""

    def watch() -> None:
        master.join()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, name="telemetry-orphan", daemon=True).start()


class Announcement(dramatiq.Middleware):
    """Log at the boot of a worker whether telemetry is on, and warnings about its settings."""

    def after_process_boot(self, broker: dramatiq.Broker) -> None:  # noqa: ARG002 - Dramatiq passes it by name
        """Log whether telemetry is on, and the warnings, one line each."""
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
