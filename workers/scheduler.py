"""The scheduler's process: ``python -m workers.scheduler``.

periodiq's own command exits if Redis cannot be reached at a tick. As PID 1 it ignores SIGTERM, and
otherwise SIGTERM kills it. This entry survives both, and ends with exit code 0.
"""

import signal
import socket
import sys
from collections.abc import Sequence
from queue import SimpleQueue
from types import FrameType
from typing import Any

import dramatiq
import pendulum
import periodiq
from dramatiq.brokers.redis import RedisBroker
from redis.exceptions import RedisError

from app import log
from app.outage import Outage
from workers.broker import QUEUE, build, stopping

MOST_WAITING = 100
"""The most wake-ups that may wait for a worker. Without a worker, Redis must not fill up."""

RETRY_SECONDS = 5
"""Seconds after which a wake-up that could not be sent is tried again."""


class Scheduler(periodiq.Scheduler):  # type: ignore[misc]  # periodiq has no types
    """periodiq's Scheduler, which survives an outage of Redis and ends cleanly when asked to stop.

    It replaces ``alarm_q`` and ``loop``, parts that periodiq does not document, because periodiq
    has no other way to stop its loop.
    """

    def __init__(self, broker: RedisBroker, actors: Sequence[dramatiq.Actor[Any, Any]]) -> None:
        """Schedule ``actors`` of ``broker`` by their cron lines."""
        super().__init__(actors=actors)
        self.broker = broker
        self._unsent: list[dramatiq.Actor[Any, Any]] = []
        self._crowd = Outage()
        # Unlike Queue, its put may be called from a signal handler that interrupts its get.
        self.alarm_q: SimpleQueue[bool] = SimpleQueue()
        self._first_request = iter([True])
        self._signalled, wake_up = socket.socketpair()
        wake_up.setblocking(False)
        signal.set_wakeup_fd(wake_up.detach(), warn_on_full_buffer=False)

    def send_actors(self, actors: Sequence[dramatiq.Actor[Any, Any]], now: Any) -> None:
        """Send each actor's message; keep those that cannot be sent, to try again."""
        self._unsent = [actor for actor in actors if not self._is_sent(actor, now)]

    def _is_sent(self, actor: dramatiq.Actor[Any, Any], now: Any) -> bool:
        """Send an actor's message; return whether it was sent or is no longer needed."""
        if stopping.is_set():
            return True
        try:
            # The broker's own count also includes messages that were fetched but not acknowledged.
            if self.broker.client.llen(f"{self.broker.namespace}:{QUEUE}") >= MOST_WAITING:
                self._crowd.failed("schedule", "no worker takes the waiting wake-ups")
                return False
            super().send_actors([actor], now)
        except RedisError:
            return False  # the broker's client has logged it
        self._crowd.succeeded()
        return True

    def loop(self) -> None:
        """Schedule at each alarm, until a request to stop.

        It waits on a descriptor to which every signal writes. With a wait on the queue, a signal
        just before the wait would be noticed only at the next alarm, a minute later.
        """
        while True:
            while not self.alarm_q.empty():
                if not self.alarm_q.get():
                    return
                self.schedule()
            self._signalled.settimeout(RETRY_SECONDS if self._unsent else None)
            try:
                self._signalled.recv(64)
            except TimeoutError:
                now = pendulum.now()
                self._unsent = [actor for actor in self._unsent if not self._is_sent(actor, now)]

    def run(self) -> None:
        """Log what is scheduled, and schedule it until a request to stop."""
        for actor in self.actors:
            cron = actor.options["periodic"]
            log.event("scheduled", actor=actor.actor_name, cron=cron, zone="UTC")
        self.schedule()
        self.loop()
        signal.alarm(0)  # an alarm would kill the process during its end

    def stop(self, _signum: int, _frame: FrameType | None) -> None:
        """End the loop after the current tick."""
        if next(self._first_request, False):  # a second one may interrupt it at any line
            stopping.set()
        self.alarm_q.put_nowait(False)


def boot() -> Scheduler:
    """Connect, and return a scheduler that SIGTERM and SIGINT stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    broker = build()
    from workers import actors  # noqa: PLC0415 - their declaration needs the broker

    scheduler = Scheduler(broker, [actors.heartbeat, actors.sweep])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, scheduler.stop)
    return scheduler


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    boot().run()


if __name__ == "__main__":
    main()
