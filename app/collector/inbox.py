"""Where what is to be written waits until it is committed: in one order, and many at a time.

A commit waits for the disk, whether it carries one heartbeat or hundreds. So one thread takes all
that is waiting and commits it in one transaction, and only then is anybody told. What is kept and
what is forgotten go the same way, so that a heartbeat never comes back after its id was forgotten.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from app.collector import store
from app.payload import Heartbeat

CAPACITY = 1_000
"""How many may be waiting, those included whose commit is under way."""
AT_ONCE = 32
"""So many are committed together, where they wait; and half, where that is more."""
ANSWER_SECONDS = 8.0
"""A sender gives up after 10, as it is delivered; it shall hear that the collector cannot."""
SETTLE_SECONDS = 1.0

log = logging.getLogger(__package__)


class UnavailableError(Exception):
    """It is not known to be committed, and may be brought again; the message may be told."""


class RefusedError(Exception):
    """The database does not take it, however often it is brought; the message may be told."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    what: Heartbeat | UUID
    """What to keep, or the id to forget."""
    settled: asyncio.Future[None]


class Inbox:
    """Keeps heartbeats and forgets installs, for an event loop; open while it is entered.

    When it closes, what waits is committed within ``SETTLE_SECONDS``, or never acknowledged.
    """

    def __init__(self, engine: Engine) -> None:
        """Write by one connection of ``engine``, which is kept."""
        self._engine = engine
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._unsettled = 0  # counted by the event loop alone
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

    async def keep(self, heartbeat: Heartbeat) -> None:
        """Return when a heartbeat is committed.

        Raises:
            UnavailableError: too many wait, or the database fails or does not answer in time.
            RefusedError: the database takes others, and not this one.
        """
        await self._bring(heartbeat)

    async def forget(self, instance_id: UUID) -> None:
        """Return when nothing is left under an id of what was brought before this was asked.

        Raises:
            UnavailableError: as ``keep`` does.
        """
        await self._bring(instance_id)

    async def _bring(self, what: Heartbeat | UUID) -> None:
        if self._unsettled >= CAPACITY:
            raise UnavailableError("The collector is busy.")
        entry = _Entry(what, asyncio.get_running_loop().create_future())
        self._unsettled += 1
        self._entries.put(entry)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await entry.settled
        except TimeoutError:
            raise UnavailableError("The database does not answer.") from None

    def _settle(self, entries: Sequence[_Entry], error: Exception | None) -> None:
        self._unsettled -= len(entries)
        for entry in entries:
            if entry.settled.done():  # nobody waits for it any more
                continue
            if error:
                entry.settled.set_exception(error)
            else:
                entry.settled.set_result(None)

    # From here on it is the writer's thread.

    def _write(self) -> None:
        while entries := self._take():
            error = self._attempt(entries)
            if isinstance(error, RefusedError) and len(entries) > 1:
                self._write_each(entries)
            else:
                self._tell(entries, error)
        if self._connection:
            self._connection.close()

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

    def _write_each(self, entries: Sequence[_Entry]) -> None:
        """Have no entry fail for another's sake, but for a database that is gone."""
        error: Exception | None = None
        for entry in entries:
            if not isinstance(error, UnavailableError):
                error = self._attempt([entry])
            self._tell([entry], error)

    def _attempt(self, entries: Sequence[_Entry]) -> Exception | None:
        """Commit all of the entries or none, in their order; return what has kept them from it."""
        try:
            self._commit(entries)
        except SQLAlchemyError as error:
            # No traceback: its words may be anybody's.
            log.error("collector.failed stage=commit error=%s", store.cause(error))  # noqa: TRY400 - see above
            if isinstance(error, DataError | IntegrityError):
                return RefusedError("The database refuses this heartbeat.")
            return UnavailableError("The database is not available.")
        except Exception as error:  # noqa: BLE001 - who waits raises it; the writer lives on
            return error
        return None

    def _commit(self, entries: Sequence[_Entry]) -> None:
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            self._transact(self._connection, entries)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            # It may have been cut while it was idle. To write twice does no harm.
            self._transact(self._connection, entries)

    def _transact(self, connection: Connection, entries: Sequence[_Entry]) -> None:
        with connection.begin():
            for part in _parts(entries):
                if isinstance(part, UUID):
                    store.forget(connection, part)
                else:
                    store.insert(connection, part)

    def _tell(self, entries: Sequence[_Entry], error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            entries[0].settled.get_loop().call_soon_threadsafe(self._settle, entries, error)


def _parts(entries: Sequence[_Entry]) -> Iterator[list[Heartbeat] | UUID]:
    """Yield, in their order, the ids to forget and the heartbeats between them."""
    heartbeats: list[Heartbeat] = []
    for entry in entries:
        if not isinstance(entry.what, UUID):
            heartbeats.append(entry.what)
            continue
        if heartbeats:
            yield heartbeats
            heartbeats = []
        yield entry.what
    if heartbeats:
        yield heartbeats
