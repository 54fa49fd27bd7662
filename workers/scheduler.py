"""The scheduler's process: ``python -m workers.scheduler``.

periodiq's own command exits when Redis is away at a tick, ignores SIGTERM as PID 1 and dies of it
otherwise; this entry keeps its Scheduler alive and ends with exit code 0.
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
"""Wake-ups that may wait for a worker; with no worker at all, Redis is not to be filled."""

RETRY_SECONDS = 5
"""Seconds after which a wake-up that could not be sent is tried again."""


class Scheduler(periodiq.Scheduler):  # type: ignore[misc]  # periodiq carries no types
    """periodiq's Scheduler, which outlives its broker's absence and a request to stop."""

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
        """Send each actor's message; one that cannot be sent is kept, to try again."""
        self._unsent = [actor for actor in actors if not self._is_sent(actor, now)]

    def _is_sent(self, actor: dramatiq.Actor[Any, Any], now: Any) -> bool:
        """Send an actor's message, and return whether that is done, or is not wanted any more."""
        if stopping.is_set():
            return True
        try:
            # Not the broker's own count: it has in it what was fetched and never acknowledged.
            if self.broker.client.llen(f"{self.broker.namespace}:{QUEUE}") >= MOST_WAITING:
                self._crowd.failed("schedule", "no worker takes what waits")
                return False
            super().send_actors([actor], now)
        except RedisError:
            return False  # the broker's client has logged it
        self._crowd.succeeded()
        return True

    def loop(self) -> None:
        """Schedule at each alarm, until a request to stop.

        It waits on a descriptor that every signal writes to: one that came just before a wait on
        the queue would be noticed only with the next alarm, a minute later.
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
        """Say what is scheduled, and schedule it until a request to stop."""
        for actor in self.actors:
            cron = actor.options["periodic"]
            log.event("scheduled", actor=actor.actor_name, cron=cron, zone="UTC")
        self.schedule()
        self.loop()
        signal.alarm(0)  # it would kill a process that has begun to end

    def stop(self, _signum: int, _frame: FrameType | None) -> None:
        """End the loop after the tick at hand."""
        if next(self._first_request, False):  # a second one may interrupt it at any line
            stopping.set()
        self.alarm_q.put_nowait(False)


def boot() -> Scheduler:
    """Connect, and return a scheduler that SIGTERM and SIGINT stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    broker = build()
    from workers import actors  # noqa: PLC0415 - actors are declared on the broker just built

    scheduler = Scheduler(broker, [actors.heartbeat, actors.sweep])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, scheduler.stop)
    return scheduler


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    boot().run()


if __name__ == "__main__":
    main()
