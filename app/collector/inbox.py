"""A queue of heartbeats and deletions: one thread commits them in order, many at a time.

A commit waits for the disk, whether it has one heartbeat or hundreds. So one thread takes all
entries that wait and commits the heartbeats in one transaction. Only then are their senders
answered. A deletion has its own transaction, after the heartbeats that arrived before it and before
those that arrived after it: no deleted heartbeat is stored again. ``store`` ensures the same
between processes.
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
"""How many entries may wait, including those that are being committed."""
AT_ONCE = 64
"""How many of the waiting entries are committed together; half of them, if that is more."""
ANSWER_SECONDS = 8.0
"""A sender gives up after 10 seconds by default; it should receive the 503 before that."""
SETTLE_SECONDS = 1.0
STANDSTILL_SECONDS = 30.0
"""A transaction takes longer only if its process was suspended. Its install may have been deleted
in the meantime, so it must not commit."""
AGAIN = 2
"""How often a commit is retried at once."""
RETRY_SECONDS = 60

log = logging.getLogger(__package__)


class UnavailableError(Exception):
    """It may not be committed; the sender may try again. The message may be sent to it."""

    def __init__(self, sentence: str, *, seconds: int = RETRY_SECONDS) -> None:
        """Take the message for the sender, and after how many seconds it should try again."""
        super().__init__(sentence)
        self.seconds = seconds


class RefusedError(Exception):
    """The database will never accept it. The message may be sent to the sender."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    what: Heartbeat | UUID
    """The heartbeat to store, or the id to delete."""
    settled: asyncio.Future[bool]
    """Whether it has changed anything."""
    until: float
    """When its sender gets a 503, by the monotonic clock."""


Results = list[bool | UnavailableError] | Exception
"""The result of each entry, or why none of them was committed."""


class Inbox:
    """Stores heartbeats and deletes installs for an event loop, inside a ``with`` block.

    At the end of the block, waiting entries are committed within ``SETTLE_SECONDS``; those that are
    not are never acknowledged.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        established_days: int = store.ESTABLISHED_DAYS,
        timed: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Write through one connection of ``engine``, which stays open.

        An install is established after heartbeats on ``established_days`` days. The writer's thread
        calls ``timed`` with the seconds that each commit took.
        """
        self._engine = engine
        self._established_days = established_days
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._timed = timed
        self._unsettled = 0  # counted by the event loop alone
        self._failed_at: float | None = None  # set by the writer alone
        # A daemon, so that a frozen database cannot block the exit: nothing acknowledged is lost.
        self._writer = Thread(target=self._write, name="inbox", daemon=True)

    def __enter__(self) -> Self:
        """Start the writer."""
        self._writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the entries that wait, and stop."""
        self._entries.put(None)
        self._writer.join(SETTLE_SECONDS)

    async def store(self, heartbeat: Heartbeat) -> bool:
        """Wait until a heartbeat is committed; return whether it is new.

        Raises:
            UnavailableError: too many wait, the database fails or does not answer in time, or the
                install was deleted a moment ago.
            RefusedError: the database accepts others, but not this one.
        """
        return await self._add(heartbeat)

    async def forget(self, instance_id: UUID) -> None:
        """Wait until everything that arrived under an id before this call is deleted.

        That includes what other processes with the same database received.

        Raises:
            UnavailableError: too many wait, or the database fails or does not answer in time.
        """
        await self._add(instance_id)

    @property
    def waiting(self) -> int:
        """How many entries wait, including those that are being committed."""
        return self._unsettled

    @property
    def full(self) -> bool:
        """Whether no further entry may wait."""
        return self._unsettled >= CAPACITY

    def failed_within(self, seconds: float) -> bool:
        """Return whether the last commit failed within ``seconds`` because of the database."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() < failed_at + seconds

    async def _add(self, what: Heartbeat | UUID) -> bool:
        if self.full:
            raise UnavailableError("The collector is busy.")
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[bool] = loop.create_future()
        self._unsettled += 1
        self._entries.put(_Entry(what, settled, time.monotonic() + ANSWER_SECONDS))
        # This costs a third of asyncio.timeout, for every heartbeat.
        expiry = loop.call_later(ANSWER_SECONDS, _expire, settled)
        try:
            return await settled
        finally:
            expiry.cancel()

    def _settle(self, entries: Sequence[_Entry], results: Results) -> None:
        self._unsettled -= len(entries)
        each = [results] * len(entries) if isinstance(results, Exception) else results
        for entry, result in zip(entries, each, strict=True):
            if entry.settled.done():  # its sender has a 503 already, or has hung up
                continue
            if isinstance(result, Exception):
                entry.settled.set_exception(result)
            else:
                entry.settled.set_result(result)

    # The methods below run in the writer's thread.

    def _write(self) -> None:
        while entries := self._take():
            self._write_runs(_runs(entries))
        if self._connection:
            self._connection.close()

    def _write_runs(self, runs: Iterable[Sequence[_Entry]]) -> None:
        """Write one run after the other; if the database is unavailable, do not try the rest."""
        results: Results = []
        for run in runs:
            if not isinstance(results, UnavailableError):
                results = self._attempt(run)
            if isinstance(results, RefusedError) and len(run) > 1:
                self._write_runs(
                    [entry] for entry in run
                )  # one by one, so that only the refused entry fails
            else:
                self._pass_on(run, results)

    def _take(self) -> list[_Entry]:
        """Wait for entries and return the oldest; an empty list means the end.

        Of many entries it takes half. If it took all, the disk would be idle until the senders send
        again, and the senders would then wait for the disk.
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
            self._entries.put(None)  # the next call returns the end
        return entries

    def _attempt(self, entries: Sequence[_Entry]) -> Results:
        """Commit all entries or none; note whether that failed."""
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
            # No traceback: it may contain what a stranger sent.
            log.error("collector.failed stage=commit error=%s", store.cause(error))  # noqa: TRY400 - see above
            if isinstance(error, DataError | IntegrityError):
                return RefusedError("The database refuses this heartbeat.")
            return UnavailableError("The database is not available.")
        except store.DeletedMeanwhileError:
            return UnavailableError("An install was deleted a moment ago.", seconds=1)
        except Exception as error:  # noqa: BLE001 - it is raised where the entry is awaited; the writer goes on
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
                # The connection may have been closed while it was idle. Writing twice does no harm.
                if not error.connection_invalidated and not isinstance(
                    error.orig, DeadlockDetected
                ):
                    raise
        return self._transact(self._connection, entries)

    def _connect(self) -> Connection:
        """Return a connection to the tables of this release.

        A connection that is open during a migration stays in use: the old release accepts
        heartbeats until the new one has started.
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
        # Do not store what was already answered 503: its install may have been deleted since.
        in_time = [
            each.what for each in entries if isinstance(each.what, Heartbeat) and began < each.until
        ]
        with connection.begin():
            fates = store.insert(connection, in_time, established_days=self._established_days)
            # If the process is suspended after this line, the server ends the transaction.
            if time.monotonic() - began > STANDSTILL_SECONDS:
                raise _no_answer()
        of_those = map(_result, fates)
        return [next(of_those) if began < each.until else _no_answer() for each in entries]

    def _pass_on(self, entries: Sequence[_Entry], results: Results) -> None:
        with suppress(RuntimeError):  # the loop has ended, so nothing awaits the result
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
    """Yield each deletion, and the heartbeats between two deletions, in their order."""
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
