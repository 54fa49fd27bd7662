"""What is held under an id, for anyone who knows the id: the right of access."""

import logging
from datetime import UTC, datetime
from typing import TypedDict
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app import payload
from app.collector import store
from app.collector.inbox import UnavailableError

AT_MOST = 1_000
"""One answer has at most so many heartbeats; a further request can ask for those after them."""

log = logging.getLogger(__package__)


class HeldHeartbeat(TypedDict):
    """A stored heartbeat; ``body`` is byte for byte what the schema's model writes."""

    sent_at: str
    received_at: str
    body: str


class Held(TypedDict):
    """What is held of an install; all times are ISO 8601 in UTC.

    ``retention_days`` is how long a heartbeat is stored, 0 means forever; ``more`` says whether
    there are heartbeats after these.
    """

    instance_id: str
    first_seen: str
    last_seen: str
    retention_days: int
    heartbeats: list[HeldHeartbeat]
    more: bool


class Holdings:
    """Reads what is held in one snapshot, in transactions that cannot write."""

    def __init__(self, engine: Engine, retention_days: int) -> None:
        """Read through ``engine``; ``retention_days`` is only part of the answer."""
        self._engine = engine
        self.retention_days = retention_days

    def of(self, instance_id: UUID, *, after: str | None) -> Held | None:
        """Return what is held under an id, in the order of ``sent_at``; None if there is nothing.

        Only heartbeats sent later than ``after`` are returned, and at most ``AT_MOST`` of them.

        Raises:
            UnavailableError: the database fails or does not answer in time.
        """
        try:
            with self._engine.connect() as connection:
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
                seen = store.seen(connection, instance_id)
                if seen is None:
                    return None
                found = store.held(connection, instance_id, after=after, limit=AT_MOST + 1)
        except SQLAlchemyError as error:
            # No traceback: it may contain what a stranger sent.
            log.error("collector.failed stage=access error=%s", store.cause(error))  # noqa: TRY400 - see above
            raise UnavailableError("The database is not available.") from None
        return Held(
            instance_id=str(instance_id),
            first_seen=_iso(seen.first),
            last_seen=_iso(seen.last),
            retention_days=self.retention_days,
            heartbeats=[
                HeldHeartbeat(
                    sent_at=each.sent_at,
                    received_at=_iso(each.received_at),
                    body=payload.canonical(each.body),
                )
                for each in found[:AT_MOST]
            ],
            more=len(found) > AT_MOST,
        )


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()
