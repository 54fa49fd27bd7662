"""The collector's background work: it creates partitions, counts days and deletes old data.

It runs once a minute, and again at once while there are more days to count. Each run also adds the
outcomes of requests to their table; so does the end of the process.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from sqlalchemy import Engine

from app.collector import recount, store, weeks
from app.collector.outcomes import Outcomes

EVERY_SECONDS = 60.0
END_SECONDS = 0.5

log = logging.getLogger(__package__)


@contextmanager
def housekeeping(engine: Engine, retention_days: int, outcomes: Outcomes) -> Iterator[None]:
    """Run now and once a minute, in a separate thread, until the block ends.

    Heartbeats and installs older than ``retention_days`` are deleted; 0 keeps all of them. A
    failure is logged in one line, and the work is retried a minute later.
    """
    ended = Event()
    # The end of the process rolls back an open transaction.
    arguments = (engine, retention_days, outcomes, ended)
    thread = Thread(target=_run, args=arguments, name="housekeeping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(END_SECONDS)


def _run(engine: Engine, retention_days: int, outcomes: Outcomes, ended: Event) -> None:
    while not ended.is_set():
        _attempt("weeks", lambda: weeks.make(engine))
        more = _attempt("count", lambda: recount.step(engine))
        if not more:
            failed = more is None
            _attempt("prune", lambda: _prune(engine, retention_days, ended, even_if_needed=failed))  # noqa: B023 - called at once
            ended.wait(EVERY_SECONDS)
        _attempt("outcomes", lambda: outcomes.write(engine))


def _attempt(stage: str, work: Callable[[], bool | None]) -> bool | None:
    """Return the result of ``work``, or None if it fails."""
    try:
        return bool(work())
    except Exception as error:  # noqa: BLE001 - any failure is logged, and retried in a minute
        # No traceback: it may contain what a stranger sent.
        log.error("collector.failed stage=%s error=%s", stage, store.cause(error))  # noqa: TRY400 - see above
        return None


def _prune(engine: Engine, retention_days: int, ended: Event, *, even_if_needed: bool) -> None:
    """Delete old data, but not during a recount, which needs it, unless ``even_if_needed``."""
    with engine.begin() as connection:
        store.prune_marks(connection)
        needed = recount.progress(connection) is not None and not even_if_needed
    if retention_days == 0 or needed:
        return
    cutoff = store.cutoff(engine, timedelta(days=retention_days))
    weeks.drop(engine, cutoff)
    while store.prune(engine, cutoff) and not ended.is_set():
        pass
