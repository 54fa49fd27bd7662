"""What the collector does by itself: it makes weeks, counts days, and deletes what is too old.

It looks once a minute, and goes on at once while there is more to count. How requests ended is
added to a table then as well, and once more at the end.
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
    """Count and delete now and once a minute, in a thread of its own, until the block ends.

    Heartbeats and installs older than ``retention_days`` are deleted; 0 keeps all of them. A
    failure is one line in the log, and tried again a minute later.
    """
    ended = Event()
    # What is under way at the end is rolled back with the process.
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
            _attempt("prune", lambda: _prune(engine, retention_days, ended, anyhow=failed))  # noqa: B023 - at once
            ended.wait(EVERY_SECONDS)
        _attempt("outcomes", lambda: outcomes.write(engine))


def _attempt(stage: str, work: Callable[[], bool | None]) -> bool | None:
    """Return what ``work`` does, or None where it fails."""
    try:
        return bool(work())
    except Exception as error:  # noqa: BLE001 - in a minute it may go well
        # No traceback: its words may be anybody's.
        log.error("collector.failed stage=%s error=%s", stage, store.cause(error))  # noqa: TRY400 - see above
        return None


def _prune(engine: Engine, retention_days: int, ended: Event, *, anyhow: bool) -> None:
    """Delete what is too old; while another process counts earlier days, only ``anyhow``."""
    with engine.begin() as connection:
        store.prune_marks(connection)
        needed = recount.progress(connection) is not None and not anyhow
    if retention_days == 0 or needed:
        return
    cutoff = store.cutoff(engine, timedelta(days=retention_days))
    weeks.drop(engine, cutoff)
    while store.prune(engine, cutoff) and not ended.is_set():
        pass
