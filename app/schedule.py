"""The heartbeat's day: pure rules of when one is due, for every caller the same."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256
from typing import Literal
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
    share = int.from_bytes(sha256(instance_id.bytes).digest()[:8])
    return timedelta(seconds=spread_seconds * share >> 64)


Obstacle = Literal["written", "sent elsewhere", "not noticed"]
"""Why a day's heartbeat is not to be written."""


def obstacle(
    day: Day,
    *,
    written: bool,
    last_telemetry_at: datetime | None,
    noticed_at: datetime | None,
    waive_notice: bool = False,
) -> Obstacle | None:
    """Apply the one rule that decides a write, or return None where nothing is in its way.

    The day has no row yet; its 02:30 is later than the last send that the instance knows of,
    by whatever program; and it is later than the notice for this payload schema, unless the
    operator asks for the heartbeat in person.
    """
    if written:
        return "written"
    if last_telemetry_at is not None and last_telemetry_at >= day.opens:
        return "sent elsewhere"
    if not waive_notice and (noticed_at is None or noticed_at >= day.opens):
        return "not noticed"
    return None
