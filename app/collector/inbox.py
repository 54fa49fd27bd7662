"""Where what is to be written waits until it is committed: in one order, and many at a time.

A commit waits for the disk, whether it carries one heartbeat or hundreds. So one thread takes all
that is waiting and commits the heartbeats in one transaction, and only then is anybody answered.
A deletion has a transaction of its own, between those of the heartbeats before and after it: none
comes back after its id was deleted. Between processes, the store sees to that.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self
from uuid import UUID

from psycopg.errors import DeadlockDetected
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

import migrations
from app.collector import store
from app.payload import Heartbeat

CAPACITY = 1_000
"""How many may be waiting, those included whose commit is under way."""
AT_ONCE = 64
"""So many are committed together, where they wait; and half, where that is more."""
ANSWER_SECONDS = 8.0
"""A sender gives up after 10, as it is delivered; it shall hear that the collector cannot."""
SETTLE_SECONDS = 1.0
STANDSTILL_SECONDS = 30.0
"""Longer than this no transaction takes, but one of a process that was stopped in the middle of it.
What it would commit may belong to an install that was forgotten meanwhile."""
AGAIN = 2
"""So often a commit is tried again at once."""
RETRY_SECONDS = 60

log = logging.getLogger(__package__)


class UnavailableError(Exception):
    """It is not known to be committed, and may be brought again; the message may be told."""

    def __init__(self, sentence: str, *, seconds: int = RETRY_SECONDS) -> None:
        """Say so in ``sentence``; before so many ``seconds`` it is not worth another try."""
        super().__init__(sentence)
        self.seconds = seconds


class RefusedError(Exception):
    """The database does not take it, however often it is brought; the message may be told."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    what: Heartbeat | UUID
    """What to keep, or the id to forget."""
    settled: asyncio.Future[bool]
    """Whether it has changed anything."""
    until: float
    """When its sender is answered 503, by the monotonic clock."""


Results = list[bool | UnavailableError] | Exception
"""What became of each entry, or what has kept all of them from being committed."""


class Inbox:
    """Keeps heartbeats and forgets installs, for an event loop; open while it is entered.

    When it closes, what waits is committed within ``SETTLE_SECONDS``, or never acknowledged.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        established_days: int = store.ESTABLISHED_DAYS,
        timed: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Write by one connection of ``engine``, which is kept.

        An install that is heard of on ``established_days`` days is established. How many seconds a
        commit took is given to ``timed``, by the writer's thread.
        """
        self._engine = engine
        self._established_days = established_days
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._timed = timed
        self._unsettled = 0  # counted by the event loop alone
        self._failed_at: float | None = None  # set by the writer alone
        # A server that stands still must not keep the process from its end: nothing is lost by it.
        self._writer = Thread(target=self._write, name="inbox", daemon=True)

    def __enter__(self) -> Self:
        """Begin to write."""
        self._writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what waits, and no more."""
        self._entries.put(None)
        self._writer.join(SETTLE_SECONDS)

    async def store(self, heartbeat: Heartbeat) -> bool:
        """Return when a heartbeat is committed, and whether it was not there before.

        Raises:
            UnavailableError: too many wait, the database fails or does not answer in time, or the
                install was forgotten a moment ago.
            RefusedError: the database takes others, and not this one.
        """
        return await self._bring(heartbeat)

    async def forget(self, instance_id: UUID) -> None:
        """Return when nothing is left under an id of what was brought before this was asked.

        It makes no difference which process of those that share the database it was brought to.

        Raises:
            UnavailableError: too many wait, or the database fails or does not answer in time.
        """
        await self._bring(instance_id)

    @property
    def waiting(self) -> int:
        """How many are waiting, those included whose commit is under way."""
        return self._unsettled

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return self._unsettled >= CAPACITY

    def failed_within(self, seconds: float) -> bool:
        """Return whether the last commit failed for want of the database, and not longer ago."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() < failed_at + seconds

    async def _bring(self, what: Heartbeat | UUID) -> bool:
        if self.full:
            raise UnavailableError("The collector is busy.")
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[bool] = loop.create_future()
        self._unsettled += 1
        self._entries.put(_Entry(what, settled, time.monotonic() + ANSWER_SECONDS))
        # A third of what asyncio.timeout costs, of which every heartbeat has one.
        expiry = loop.call_later(ANSWER_SECONDS, _expire, settled)
        try:
            return await settled
        finally:
            expiry.cancel()

    def _settle(self, entries: Sequence[_Entry], results: Results) -> None:
        self._unsettled -= len(entries)
        each = [results] * len(entries) if isinstance(results, Exception) else results
        for entry, result in zip(entries, each, strict=True):
            if entry.settled.done():  # nobody waits for it any more
                continue
            if isinstance(result, Exception):
                entry.settled.set_exception(result)
            else:
                entry.settled.set_result(result)

    # From here on it is the writer's thread.

    def _write(self) -> None:
        while entries := self._take():
            self._write_runs(_runs(entries))
        if self._connection:
            self._connection.close()

    def _write_runs(self, runs: Iterable[Sequence[_Entry]]) -> None:
        """Write one run after the other; a database that is gone is tried once for all of them."""
        results: Results = []
        for run in runs:
            if not isinstance(results, UnavailableError):
                results = self._attempt(run)
            if isinstance(results, RefusedError) and len(run) > 1:
                self._write_runs([entry] for entry in run)  # none fails for another's sake
            else:
                self._pass_on(run, results)

    def _take(self) -> list[_Entry]:
        """Wait for entries, and return those that came first; none at the end.

        Of many it is half: were it all, the disk would wait for the senders, and they for the disk.
        """
        entries: list[_Entry] = []
        entry = self._entries.get()
        enough = max(AT_ONCE, self._entries.qsize() // 2)
        while entry:
            entries.append(entry)
            if len(entries) == enough:
                return entries
            try:
                entry = self._entries.get_nowait()
            except Empty:
                return entries
        if entries:
            self._entries.put(None)  # the end is for the next time
        return entries

    def _attempt(self, entries: Sequence[_Entry]) -> Results:
        """Commit all of the entries or none; remember whether that failed."""
        began = time.monotonic()
        results = self._try(entries)
        if isinstance(results, UnavailableError):
            self._failed_at = time.monotonic()
        elif not isinstance(results, Exception):
            self._failed_at = None
            self._timed(time.monotonic() - began)
        return results

    def _try(self, entries: Sequence[_Entry]) -> Results:
        try:
            return self._commit(entries)
        except SQLAlchemyError as error:
            # No traceback: its words may be anybody's.
            log.error("collector.failed stage=commit error=%s", store.cause(error))  # noqa: TRY400 - see above
            if isinstance(error, DataError | IntegrityError):
                return RefusedError("The database refuses this heartbeat.")
            return UnavailableError("The database is not available.")
        except store.DeletedMeanwhileError:
            return UnavailableError("An install was deleted a moment ago.", seconds=1)
        except Exception as error:  # noqa: BLE001 - who waits raises it; the writer lives on
            return error

    def _commit(self, entries: Sequence[_Entry]) -> Results:
        if self._connection is None:
            self._connection = self._connect()
        for _ in range(AGAIN):
            try:
                return self._transact(self._connection, entries)
            except store.DeletedMeanwhileError:
                continue
            except DBAPIError as error:
                # It may have been cut while it was idle. To write twice does no harm.
                if not error.connection_invalidated and not isinstance(
                    error.orig, DeadlockDetected
                ):
                    raise
        return self._transact(self._connection, entries)

    def _connect(self) -> Connection:
        """Return a connection to tables of this release.

        Whoever is running while they are migrated goes on: a release takes what is sent until the
        next has started.
        """
        with ExitStack() as refused:
            connection = refused.enter_context(self._engine.connect())
            with connection.begin():
                found = migrations.revision(connection, "collector")
            if found != migrations.known("collector")[0]:
                raise UnavailableError("The database is not ready.")
            refused.pop_all()
        return connection

    def _transact(self, connection: Connection, entries: Sequence[_Entry]) -> Results:
        [first, *_] = entries
        if isinstance(first.what, UUID):
            with connection.begin():
                store.forget(connection, first.what)
            return [True]
        began = time.monotonic()
        # What its sender takes for lost is not kept: it may have been forgotten since, long ago.
        in_time = [
            each.what for each in entries if isinstance(each.what, Heartbeat) and began < each.until
        ]
        with connection.begin():
            fates = store.insert(connection, in_time, established_days=self._established_days)
            # A process that stands still from here on is cut off by the server.
            if time.monotonic() - began > STANDSTILL_SECONDS:
                raise _no_answer()
        of_those = map(_result, fates)
        return [next(of_those) if began < each.until else _no_answer() for each in entries]

    def _pass_on(self, entries: Sequence[_Entry], results: Results) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            entries[0].settled.get_loop().call_soon_threadsafe(self._settle, entries, results)


def _expire(settled: asyncio.Future[bool]) -> None:
    if not settled.done():
        settled.set_exception(_no_answer())


def _no_answer() -> UnavailableError:
    return UnavailableError("The database does not answer.")


def _result(fate: store.Fate) -> bool | UnavailableError:
    if fate.wait:
        return UnavailableError("This install was deleted a moment ago.", seconds=fate.wait)
    return fate.new


def _runs(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """Yield, in their order, each deletion, and the heartbeats between them."""
    heartbeats: list[_Entry] = []
    for entry in entries:
        if not isinstance(entry.what, UUID):
            heartbeats.append(entry)
            continue
        if heartbeats:
            yield heartbeats
            heartbeats = []
        yield [entry]
    if heartbeats:
        yield heartbeats
