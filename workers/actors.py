"""What runs when. Each actor wakes the pipeline and returns; none raises, none carries data.

The pipeline is imported inside the actors, so that the scheduler, which needs only their names
and times, loads no SQLAlchemy and no httpx.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import dramatiq
from periodiq import cron
from redis.exceptions import RedisError

from app import log
from app.outage import Outage, is_away
from workers.broker import QUEUE, record_sweep, settings, stopping

if TYPE_CHECKING:
    from app.pipeline import Pipeline


@dramatiq.actor(queue_name=QUEUE, periodic=cron("30 2 * * *"))
def heartbeat() -> None:
    """Write the day's heartbeat at 02:30 UTC, and wake the sender."""
    with _swallowed("write"):
        _pipeline().write_heartbeat()
    with _swallowed("wake"):
        drain.send()


@dramatiq.actor(queue_name=QUEUE, periodic=cron("* * * * *"))
def sweep() -> None:
    """Every minute: keep the outbox in order, catch up a missed write, wake the sender."""
    due = False
    with _swallowed("connect"), _pipeline().connect() as link:
        with _swallowed("sweep"):
            due = _pipeline().sweep(link)
            database_outage.succeeded()
        with _swallowed("write"):
            due = _pipeline().write_heartbeat(link) or due
        with _swallowed("prune"):
            _pipeline().prune(link)
    with _swallowed("wake"):
        if due:
            drain.send()
        record_sweep()


@dramatiq.actor(queue_name=QUEUE)
def drain() -> None:
    """Send what is due."""
    with _swallowed("drain"):
        _pipeline().drain()


@cache
def _pipeline() -> "Pipeline":
    from app.pipeline import Pipeline  # noqa: PLC0415 - see this module's docstring

    return Pipeline(settings(), stopping)


database_outage = Outage()
"""What this process knows of Postgres; a sweep, every minute, sees whether it is back."""


@contextmanager
def _swallowed(stage: str) -> Iterator[None]:
    """Log a failure and end it here: nothing of telemetry may reach its host."""
    try:
        yield
    except RedisError:
        pass  # the broker's client has logged it
    except Exception as error:  # noqa: BLE001 - the one place where failures end
        stage = getattr(error, "stage", stage)
        if is_away(error):
            database_outage.failed(stage, log.cause(error))
            return
        log.event("failed", level=logging.WARNING, stage=stage, error=log.cause(error))
