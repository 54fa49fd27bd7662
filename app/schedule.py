"""The heartbeat's day, and the rule that decides when one is due. Everything here is pure."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256
from typing import Literal
from uuid import UUID

OPENS_AT = time(2, 30, tzinfo=UTC)
OVERDUE_AFTER = timedelta(hours=1)

CLOCKS_DIFFER = timedelta(minutes=5)
"""How far ahead of the database's clock a stored time may lie and still be believed, because
ConsentOS writes it by another machine's clock. Kerberos allows as much (RFC 4120, 5.2.9)."""


@dataclass(frozen=True)
class Day:
    """The 24 hours from one 02:30 UTC to the next, named by the UTC date on which they begin."""

    date: date

    @property
    def opens(self) -> datetime:
        """The 02:30 at which the day's heartbeat becomes due."""
        return datetime.combine(self.date, OPENS_AT)

    @property
    def closes(self) -> datetime:
        """The next 02:30, from which on this day's heartbeat is never sent."""
        return self.opens + timedelta(days=1)


def running_day(now: datetime) -> Day:
    """Return the day that began at the latest 02:30 UTC before or at ``now`` (an aware time)."""
    late = timedelta(hours=OPENS_AT.hour, minutes=OPENS_AT.minute)
    return Day((now.astimezone(UTC) - late).date())


def offset(instance_id: UUID, spread_seconds: int) -> timedelta:
    """Return the install's own stable delay after 02:30, in [0, ``spread_seconds``).

    It is a hash of the instance id, so that not all installs send in the same second.
    """
    share = int.from_bytes(sha256(instance_id.bytes).digest()[:8])
    return timedelta(seconds=spread_seconds * share >> 64)


def believed(at: datetime | None, now: datetime) -> datetime | None:
    """Return a stored time, or None if it lies in the future, because a clock was ahead once."""
    return at if at is None or at <= now + CLOCKS_DIFFER else None


Obstacle = Literal["written", "sent elsewhere", "not noticed"]
"""Why a day's heartbeat may not be written."""


def obstacle(
    now: datetime,
    *,
    written: bool,
    last_telemetry_at: datetime | None,
    noticed_at: datetime | None,
    waive_notice: bool = False,
) -> Obstacle | None:
    """Apply the rule that decides a write at ``now``; None means that the heartbeat may be written.

    It may be written if the running day has no row yet, if its 02:30 is later than the last send
    by any program, and if it is later than the notice for this payload schema. An operator's
    explicit request waives the last condition. A time in the future counts as absent.
    """
    opens = running_day(now).opens
    sent, noticed = believed(last_telemetry_at, now), believed(noticed_at, now)
    if written:
        return "written"
    if sent is not None and sent >= opens:
        return "sent elsewhere"
    if not waive_notice and (noticed is None or noticed >= opens):
        return "not noticed"
    return None
