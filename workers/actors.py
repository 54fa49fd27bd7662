"""The actors: what runs when. Each one calls the pipeline. No actor raises or takes arguments.

The actors import the pipeline when they run. So the scheduler, which needs only their names and
times, loads neither SQLAlchemy nor httpx.
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
    """Every minute: put the outbox in order, write a missed heartbeat, and wake the sender."""
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
    """Send every due heartbeat."""
    with _swallowed("drain"):
        _pipeline().drain()


@cache
def _pipeline() -> "Pipeline":
    from app.pipeline import Pipeline  # noqa: PLC0415 - see this module's docstring

    return Pipeline(settings(), stopping)


database_outage = Outage()
"""The outage of Postgres, as seen by this process; a sweep ends it when Postgres is back."""


@contextmanager
def _swallowed(stage: str) -> Iterator[None]:
    """Log a failure and swallow it: no error of telemetry may affect ConsentOS."""
    try:
        yield
    except RedisError:
        pass  # the broker's client has logged it
    except Exception as error:  # noqa: BLE001 - the only place that swallows failures
        stage = getattr(error, "stage", stage)
        if is_away(error):
            database_outage.failed(stage, log.cause(error))
            return
        log.event("failed", level=logging.WARNING, stage=stage, error=log.cause(error))
