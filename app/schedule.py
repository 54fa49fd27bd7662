"""The heartbeat's day: pure rules of when one is due, for every caller the same."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256
from uuid import UUID

OPENS_AT = time(2, 30, tzinfo=UTC)
OVERDUE_AFTER = timedelta(hours=1)


@dataclass(frozen=True)
class Day:
    """The 24 hours from one 02:30 UTC to the next, named by the UTC date they begin on."""

    date: date

    @property
    def opens(self) -> datetime:
        """The 02:30 at which the day's heartbeat becomes due."""
        return datetime.combine(self.date, OPENS_AT)

    @property
    def closes(self) -> datetime:
        """The next 02:30, after which this day's heartbeat is never sent."""
        return self.opens + timedelta(days=1)


def running_day(now: datetime) -> Day:
    """Return the day that began at the latest 02:30 UTC before or at ``now`` (an aware time)."""
    late = timedelta(hours=OPENS_AT.hour, minutes=OPENS_AT.minute)
    return Day((now.astimezone(UTC) - late).date())


def offset(instance_id: UUID, spread_seconds: int) -> timedelta:
    """Return the install's own stable delay after 02:30, in [0, ``spread_seconds``).

    It is a hash of the instance id, so that a fleet does not arrive in one second.
    """
    share = int.from_bytes(sha256(instance_id.bytes).digest()[:8]) / 2**64
    return timedelta(seconds=int(spread_seconds * share))
