"""All SQL on the outbox and its attempts, in the order of a row's life.

Every function works in the caller's transaction and by the database's clock. A claimed row is
changed only by the holder of its lease token, until the lease lapses and a sweep takes the row
back. A process that has lost its lease does not change the row.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Interval,
    Row,
    Select,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql

from app.models import (
    ATTEMPT,
    CURRENT_INSTANCE,
    FINAL,
    INSTANCE,
    OPEN,
    OUTBOX,
    last_telemetry_at,
)
from app.models import STATES as STATES  # noqa: PLC0414 - the commands import it from here
from app.models import State as State  # noqa: PLC0414 - as STATES
from app.retry import FAILURES, Delivered, Outcome, Rejected, RetryAt, Verdict, backoff
from app.schedule import CLOCKS_DIFFER, Day

_now = func.now()
_row, _attempt = OUTBOX.c, ATTEMPT.c

# No rule sets a time further ahead than this, so a later one was written while a clock was ahead,
# and is ignored. A wait is at most a Retry-After of 6 hours, a lease 90 s, a day 24 hours.
_no_such_wait = _now + timedelta(hours=7)
_no_such_lease = _now + timedelta(minutes=10)
_no_such_day = _now + timedelta(hours=25)

_due_at = case((_row.next_attempt_at > _no_such_wait, _now), else_=_row.next_attempt_at)
_asked_to_wait = and_(_row.not_before > _now, _row.not_before <= _no_such_wait)
_held = and_(_row.lease_until > _now, _row.lease_until <= _no_such_lease)

_of_this_instance = _row.instance_id == (
    CURRENT_INSTANCE.with_only_columns(INSTANCE.c.id).scalar_subquery()
)


@dataclass(frozen=True)
class Claim:
    """A row taken for one drain, with the token that every later change needs."""

    id: UUID
    day: date
    token: UUID
    body: str
    instance_id: UUID
    drains: int


@dataclass(frozen=True)
class Begun:
    """An attempt on record, and the database's time at its beginning."""

    outbox_id: UUID
    n: int
    at: datetime


Refusal = Literal["not held", "sent elsewhere", "sent before"]
"""Why no attempt may begin: this claim may not send the row any more; another program has sent the
day's heartbeat; or an earlier attempt of this row has sent it, but did not settle the row."""


def has_day(connection: Connection, day: date) -> bool:
    """Whether the day has a row, final or not."""
    return bool(connection.scalar(select(exists().where(_row.day == day))))


def lock_shared(connection: Connection) -> None:
    """Take the shared lock that every writer of the outbox holds."""
    connection.execute(text("LOCK TABLE telemetry_outbox IN ROW EXCLUSIVE MODE"))


def lock_exclusive(connection: Connection) -> None:
    """Lock the outbox: wait for its writers to end, and let only readers in until the end."""
    connection.execute(text("LOCK TABLE telemetry_outbox IN EXCLUSIVE MODE"))


def write(
    connection: Connection,
    *,
    day: Day,
    instance_id: UUID,
    body: str,
    next_attempt_at: datetime,
    host_revision: str | None,
) -> UUID | None:
    """Store a day's heartbeat; return its id, or None if the day already has one."""
    statement = (
        postgresql.insert(OUTBOX)
        .values(
            id=uuid4(),
            day=day.date,
            instance_id=instance_id,
            payload=body,
            created_at=_now,
            next_attempt_at=next_attempt_at,
            expires_at=day.closes,
            host_revision=host_revision,
        )
        .on_conflict_do_nothing(index_elements=[_row.day])
        .returning(_row.id)
    )
    return connection.scalar(statement)


def until_due(connection: Connection) -> timedelta | None:
    """Return how long until the next pending row may be claimed, or None without such a row."""
    return connection.scalar(
        select(type_coerce(func.min(_due_at) - _now, Interval)).where(
            _row.state == State.PENDING, _row.expires_at > _now, _of_this_instance
        )
    )


def claim(connection: Connection, lease: timedelta, *, day: date | None = None) -> Claim | None:
    """Take a due row for ``lease``; None if nothing is due or another process was first.

    With ``day``, take that day's row even during its backoff, but never before the time that the
    receiver asked for.
    """
    token = uuid4()
    due: ColumnElement[bool] = _due_at <= _now
    if day is not None:
        due = and_(_row.day == day, _asked_to_wait.is_not(True))
    chosen = (
        select(_row.id)
        .where(_row.state == State.PENDING, due, _row.expires_at > _now, _of_this_instance)
        .order_by(_due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    row = connection.execute(
        update(OUTBOX)
        .where(_row.id == chosen.c.id)
        .values(
            state=State.SENDING,
            drains=_row.drains + 1,
            lease_token=token,
            lease_until=_now + lease,
        )
        .returning(_row.id, _row.day, _row.payload, _row.instance_id, _row.drains)
    ).one_or_none()
    if row is None:
        return None
    return Claim(row.id, row.day, token, row.payload, row.instance_id, row.drains)


_sent_already = (
    last_telemetry_at(CLOCKS_DIFFER)
    .between(_row.expires_at - timedelta(hours=24), _now + CLOCKS_DIFFER)
    .is_(True)
)
"""Any program has sent the row's day for this install, by the rule of ``schedule.obstacle``."""
_sent_by_us = exists().where(_attempt.outbox_id == _row.id, _attempt.outcome == "sent")


def begin(
    connection: Connection, claim: Claim, lease: timedelta, *, endpoint: str
) -> Begun | Refusal:
    """Record an attempt and renew the lease, just before the attempt starts.

    It records nothing and returns the reason if the lease is lost, the row has expired, its
    instance id is no longer this install's, or the day's heartbeat has been sent already.
    """
    leased = (
        update(OUTBOX)
        .where(
            _row.id == claim.id,
            _row.lease_token == claim.token,
            _held,
            _row.expires_at > _now,
            _of_this_instance,
            ~_sent_already,
            ~_sent_by_us,
        )
        .values(attempts=_row.attempts + 1, lease_until=_now + lease)
        .returning(_row.id, _row.attempts)
        .cte("leased")
    )
    row = connection.execute(
        insert(ATTEMPT)
        .from_select(
            ["outbox_id", "n", "started_at", "endpoint"],
            select(leased.c.id, leased.c.attempts, _now, literal(endpoint)),
        )
        .returning(_attempt.outbox_id, _attempt.n, _attempt.started_at)
    ).one_or_none()
    return Begun(*row) if row else _why_not(connection, claim)


def _why_not(connection: Connection, claim: Claim) -> Refusal:
    held = connection.execute(
        select(_sent_by_us.label("before"), _sent_already.label("elsewhere")).where(
            _row.id == claim.id, _row.lease_token == claim.token
        )
    ).one_or_none()
    if held and held.before:
        return "sent before"
    return "sent elsewhere" if held and held.elsewhere else "not held"


def record(connection: Connection, attempt: Begun, outcome: Outcome) -> None:
    """Complete the attempt with its outcome, even if another process now holds the row."""
    connection.execute(
        update(ATTEMPT)
        .where(_attempt.outbox_id == attempt.outbox_id, _attempt.n == attempt.n)
        .values(
            finished_at=_now,
            outcome=outcome.result,
            http_status=outcome.status,
            error=outcome.error,
            duration_ms=outcome.duration_ms,
        )
    )


def settle(connection: Connection, claim: Claim, verdict: Verdict, error: str | None) -> bool:
    """End the claim with its verdict; return False and change nothing if the lease is lost."""
    match verdict:
        case Delivered():
            return _end_lease(
                connection, claim, state=State.SENT, finished_at=_now, last_error=None
            )
        case Rejected():
            return _end_lease(
                connection, claim, state=State.REJECTED, finished_at=_now, last_error=error
            )
        case RetryAt(at, not_before):
            return _end_lease(
                connection,
                claim,
                state=State.PENDING,
                next_attempt_at=at,
                not_before=not_before,
                last_error=error,
            )


def release(connection: Connection, claim: Claim) -> bool:
    """Make the row pending again, with its drain counted; return False if the lease is lost."""
    return _end_lease(connection, claim, state=State.PENDING)


def discard(connection: Connection, claim: Claim, reason: str) -> bool:
    """End the row unsent; return False and change nothing if the lease is lost."""
    return _end_lease(connection, claim, state=State.DISCARDED, finished_at=_now, last_error=reason)


def _end_lease(connection: Connection, claim: Claim, **result: object) -> bool:
    ended = connection.execute(
        update(OUTBOX)
        .where(_row.id == claim.id, _row.lease_token == claim.token)
        .values(**result, lease_token=None, lease_until=None)
    )
    return ended.rowcount == 1


def reclaim(connection: Connection, jitter: float) -> Sequence[UUID]:
    """Take back the rows whose lease has lapsed; each waits as after a failed drain.

    The read locks them, so that no lease is renewed and no row settled before the update.
    """
    lapsed = connection.execute(
        select(_row.id, _row.drains, _now)
        .where(_row.state == State.SENDING, ~_held)
        .with_for_update(skip_locked=True)
    ).all()
    for id_, drains, now in lapsed:
        connection.execute(
            update(OUTBOX)
            .where(_row.id == id_)
            .values(
                state=State.PENDING,
                next_attempt_at=now + backoff(drains, jitter),
                last_error="its lease lapsed",
                lease_token=None,
                lease_until=None,
            )
        )
    return [row.id for row in lapsed]


def expire(connection: Connection) -> Sequence[Row[UUID, date]]:
    """End the pending rows whose day is over; return their ids and days."""
    return _finish(connection, State.EXPIRED, _row.expires_at <= _now)


def discard_all(connection: Connection) -> Sequence[Row[UUID, date]]:
    """End every pending row. This reads no table but the outbox."""
    return _finish(connection, State.DISCARDED, literal(True))


def discard_foreign(connection: Connection) -> Sequence[Row[UUID, date]]:
    """End the pending rows under an instance id that is no longer this install's."""
    return _finish(connection, State.DISCARDED, _of_this_instance.is_not(True))


def discard_future(connection: Connection) -> Sequence[Row[UUID, date]]:
    """End the pending rows of a future day, which were written while a clock was ahead.

    A row that was never tried is deleted, so that its day can have a heartbeat later.
    """
    future = _row.expires_at > _no_such_day
    untried = (
        select(_row.id)
        .where(_row.state == State.PENDING, future, _row.attempts == 0)
        .with_for_update(skip_locked=True)
    )
    deleted = connection.execute(
        delete(OUTBOX).where(_row.id.in_(untried)).returning(_row.id, _row.day)
    ).all()
    return [*deleted, *_finish(connection, State.DISCARDED, future)]


def _finish(
    connection: Connection, state: State, which: ColumnElement[bool]
) -> Sequence[Row[UUID, date]]:
    # A row that another session has locked is left for the next sweep.
    free = (
        select(_row.id)
        .where(_row.state == State.PENDING, which)
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    return connection.execute(
        update(OUTBOX)
        .where(_row.id == free.c.id)
        .values(state=state, finished_at=_now)
        .returning(_row.id, _row.day)
    ).all()


CARRIED = "carried by hand"
"""The reason of a discarded row whose body the operator carries to the receiver."""

_carried = and_(_row.state == State.DISCARDED, _row.last_error == CARRIED)


def carry(connection: Connection, day: date) -> tuple[str, UUID | None] | None:
    """End the day's pending row, to be carried by hand; return its body and its id.

    If the row has been carried before, nothing changes, and the id is ``None``. The result is
    ``None`` if the row may not be carried: it is not pending, it belongs to a former instance id,
    or the day's heartbeat has been sent.
    """
    unsent = and_(_row.expires_at > _now, ~_sent_already, ~_sent_by_us)
    ended = connection.execute(
        update(OUTBOX)
        .where(_row.day == day, _row.state == State.PENDING, _of_this_instance, unsent)
        .values(state=State.DISCARDED, finished_at=_now, last_error=CARRIED)
        .returning(_row.payload, _row.id)
    ).one_or_none()
    if ended:
        return ended.payload, ended.id
    before = select(_row.payload).where(_row.day == day, _carried, _of_this_instance)
    body = connection.scalar(before)
    return (body, None) if body else None


def prune(connection: Connection, retention: timedelta) -> None:
    """Delete the finished rows, with their attempts, that are older than ``retention``."""
    old = _row.state.in_(FINAL) & (_row.finished_at < _now - retention)
    free = select(_row.id).where(old).with_for_update(skip_locked=True)
    connection.execute(delete(OUTBOX).where(_row.id.in_(free)))


def instance_ids(connection: Connection) -> Sequence[UUID]:
    """Return each instance id that a stored heartbeat has."""
    return connection.scalars(select(_row.instance_id).distinct()).all()


def remove(connection: Connection) -> tuple[Sequence[UUID], int]:
    """Delete the whole outbox; return each row's instance id, and the number of attempts."""
    tries = connection.execute(delete(ATTEMPT)).rowcount
    return connection.scalars(delete(OUTBOX).returning(_row.instance_id)).all(), tries


# The trigger's function could have been replaced by one that does nothing, so its body is compared
# with that of migration 0001. It must have no settings of its own, such as a search_path, which
# could change what the body means. A second trigger could change the row after this one has checked
# it, and a rule, a child table or a policy could keep rows away from it: all of these are refused.
# The trigger's type is FOR EACH ROW (1), BEFORE (2) and UPDATE (16).
_FROZEN = text(
    """
    SELECT count(*) = 1 AND bool_and(
        tgname = 'telemetry_outbox_frozen' AND tgenabled IN ('O', 'A') AND tgtype = 1 + 2 + 16
        AND tgattr = '' AND tgqual IS NULL
        AND md5(prosrc) = 'd0715aac988669d2d631386206fc3070' AND proconfig IS NULL
        AND relkind = 'r' AND NOT (relhasrules OR relhassubclass OR relrowsecurity)
    )
    FROM pg_trigger
    JOIN pg_proc ON pg_proc.oid = tgfoid
    JOIN pg_class ON pg_class.oid = tgrelid
    WHERE tgrelid = to_regclass('telemetry_outbox') AND NOT tgisinternal
    """
)


def frozen(connection: Connection) -> bool:
    """Whether the trigger that keeps rows from changing is there, unchanged, and the only one."""
    return bool(connection.scalar(_FROZEN))


Record = dict[str, Any]
"""A row, or an attempt, as stored: column names to values."""


def of_day(connection: Connection, day: date) -> Record | None:
    """Return the day's row, or None if the day has no row."""
    return next(iter(_read(connection, select(OUTBOX).where(_row.day == day))), None)


def of_another_host_revision(connection: Connection, revision: str | None) -> Record | None:
    """Return the latest day's row that was written at another revision of ConsentOS, or None."""
    other = select(OUTBOX).where(_row.host_revision != revision).order_by(_row.day.desc()).limit(1)
    return next(iter(_read(connection, other)), None)


def last_sent(connection: Connection) -> Record | None:
    """Return the sent row of the latest day, or None if none was ever sent."""
    past = _row.created_at <= _now + CLOCKS_DIFFER
    sent = select(OUTBOX).where(_row.state == State.SENT, past).order_by(_row.day.desc()).limit(1)
    return next(iter(_read(connection, sent)), None)


def unfinished(connection: Connection) -> list[Record]:
    """Return the rows that are pending or being sent, the oldest day first."""
    return _read(connection, select(OUTBOX).where(_row.state.in_(OPEN)).order_by(_row.day))


def last_failure(connection: Connection) -> Record | None:
    """Return the latest attempt that failed, or whose process died in it; or None."""
    in_flight = exists().where(_row.id == _attempt.outbox_id, _row.state == State.SENDING)
    died = _attempt.outcome.is_(None) & ~in_flight
    failed = died | _attempt.outcome.in_(FAILURES)
    past = _attempt.started_at <= _now + CLOCKS_DIFFER
    latest = select(ATTEMPT).where(failed, past).order_by(_attempt.started_at.desc()).limit(1)
    return next(iter(_read(connection, latest)), None)


@dataclass(frozen=True)
class Wanted:
    """Which rows to read: those of the latest days that meet every condition that is set."""

    id: UUID | None = None
    day: date | None = None
    since: date | None = None
    state: State | None = None
    left: bool = False
    """Whether to read only rows that may have left: those with an attempt, or carried by hand."""
    limit: int | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions as SQL, without the limit."""
        conditions: list[ColumnElement[bool]] = []
        if self.id is not None:
            conditions.append(_row.id == self.id)
        if self.day is not None:
            conditions.append(_row.day == self.day)
        if self.since is not None:
            conditions.append(_row.day >= self.since)
        if self.state is not None:
            conditions.append(_row.state == self.state)
        if self.left:
            conditions.append(or_(exists().where(_attempt.outbox_id == _row.id), _carried))
        return conditions


ALL = Wanted()


def rows(connection: Connection, wanted: Wanted = ALL) -> list[Record]:
    """Return the wanted rows, the newest day first, with their attempts as ``tries``."""
    chosen = select(OUTBOX).where(*wanted.conditions()).order_by(_row.day.desc())
    found = _read(connection, chosen.limit(wanted.limit))
    ids = chosen.with_only_columns(_row.id).limit(wanted.limit)
    tries: dict[UUID, list[Record]] = defaultdict(list)
    begun = select(ATTEMPT).where(_attempt.outbox_id.in_(ids))
    for each in _read(connection, begun.order_by(_attempt.outbox_id, _attempt.n)):
        tries[each["outbox_id"]].append(each)
    return [{**row, "tries": tries[row["id"]]} for row in found]


def count(connection: Connection, wanted: Wanted) -> int:
    """Return how many rows meet the conditions, ignoring the limit."""
    counted = select(func.count()).select_from(OUTBOX).where(*wanted.conditions())
    return connection.execute(counted).scalar_one()


def _read(connection: Connection, statement: Select[*tuple[Any, ...]]) -> list[Record]:
    return [dict(row) for row in connection.execute(statement).mappings()]
