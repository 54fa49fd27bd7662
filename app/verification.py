"""Finds problems in the stored rows: in each row alone, against a log, against the receiver.

Pure.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from app import payload
from app.holding import Holding
from app.logfile import MARK, Entry, Logged, TooLong, Unreadable
from app.outbox import Record
from app.schedule import Day, running_day

NOT_FROZEN = (
    "the trigger telemetry_outbox_frozen, which protects the rows from changes, is missing or"
    " changed, or another trigger or a rule was added"
)


@dataclass(frozen=True)
class Problem:
    """A problem in a row, in a line of the log, or at the receiver.

    ``instance_id`` is set if only the receiver has the heartbeat. If no field is set, the problem
    is in the table itself.
    """

    sentence: str
    day: date | None = None
    id: UUID | None = None
    line: int | None = None
    instance_id: UUID | None = None


def of_rows(rows: Iterable[Record]) -> Iterator[Problem]:
    """Yield the problems of each row and of its attempts, ``tries``."""
    for row in rows:
        for sentence in (*_of_body(row), *_of_attempts(row)):
            yield Problem(sentence, day=row["day"], id=row["id"])


def _of_body(row: Record) -> Iterator[str]:
    if fault := payload.fault(row["payload"]):
        yield fault
        return
    body = json.loads(row["payload"])
    if body["instance_id"] != str(row["instance_id"]):
        yield "its body has a different instance_id than the row"
    if running_day(row["created_at"]).date != row["day"]:
        yield "it was written on a different day than the row's day"
    if body["sent_at"] != _sent_at(row):
        yield "its body's sent_at is not the time at which the row was written"


def _of_attempts(row: Record) -> Iterator[str]:
    numbers = [each["n"] for each in row["tries"]]
    if numbers != [*range(1, row["attempts"] + 1)]:
        found = ", ".join(map(str, numbers)) or "none"
        yield f"it counts {row['attempts']} attempts, and the stored ones are {found}"
    if row["state"] in {"sent", "rejected"} and row["state"] not in _outcomes(row):
        yield f"it is {row['state']}, but no stored attempt was"


def _outcomes(row: Record) -> set[str | None]:
    return {each["outcome"] for each in row["tries"]}


def _sent_at(row: Record) -> str:
    """Return the ``sent_at`` that the row's body must have, from the row's other columns."""
    return str(row["created_at"].astimezone(UTC).isoformat(timespec="seconds"))


def was_sent(row: Record) -> bool:
    """Whether a receiver has accepted the row, in any state that it has now."""
    return row["state"] == "sent" or "sent" in _outcomes(row)


@dataclass
class Compared:
    """The bodies of a log, the lines too long to hold one, and the problems found."""

    logged: int = 0
    bodies: set[str] = field(default_factory=set)
    too_long: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def of_log(
    rows: Sequence[Record],
    entries: Iterable[Entry],
    *,
    since: date | None = None,
    held: Collection[str] | None = None,
) -> Compared:
    """Compare a log with the rows: each logged body is stored, and each row sent was logged.

    ``since`` is the first day of the rows: bodies written earlier are skipped, and a body without
    a valid time is not. ``held`` has the bodies at the receiver, if it was asked.
    """
    found, stored = Compared(), {row["payload"] for row in rows}
    for entry in entries:
        match entry:
            case TooLong(line):
                found.too_long.append(line)
            case Unreadable(line, reason):
                found.problems.append(Problem(f"{_UNREADABLE}: {reason}", line=line))
            case Logged(body, line):
                whole = _joined(entry, stored) or body
                if since is None or _counts(whole, since):
                    found.logged += 1
                    found.bodies.add(whole)
                    found.problems += _of_logged(whole, line, stored, held)
    sure = not found.too_long and not found.problems
    found.problems += _not_logged(rows, found.bodies, held, sure=sure)
    return found


_UNREADABLE = "the log has a body in this line that cannot be read"
_NOT_WHOLE = f"{_UNREADABLE}: it is not a whole JSON object"


def _joined(logged: Logged, stored: Iterable[str]) -> str | None:
    """Return the stored body that continues on the next line, or None if none fits."""
    if not logged.following or MARK in logged.following:
        return None
    for body in stored:
        if body.startswith(logged.body) and logged.following.endswith(body[len(logged.body) :]):
            return body
    return None


def _of_logged(
    body: str, line: int, stored: set[str], held: Collection[str] | None
) -> Iterator[Problem]:
    if body in stored:
        return
    if not _is_whole(body):
        yield Problem(_NOT_WHOLE, line=line)
        return
    sentence = "the log has a body that is not stored"
    if held is not None:
        there = "the receiver holds it" if body in held else "the receiver does not hold it either"
        sentence = f"{sentence}; {there}"
    yield Problem(sentence, line=line)


def _is_whole(body: str) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def _not_logged(
    rows: Iterable[Record], seen: set[str], held: Collection[str] | None, *, sure: bool
) -> Iterator[Problem]:
    missing = "it was sent, but the log does not have its body"
    for row in rows:
        if was_sent(row) and row["payload"] not in seen:
            where = missing if sure else f"{missing} in the readable lines"
            if held is not None and row["payload"] in held:
                where = f"{where}; the receiver holds the row's bytes"
            yield Problem(where, row["day"], row["id"])


def _counts(body: str, since: date) -> bool:
    written = _written(body)
    return written is None or running_day(written).date >= since


def _written(body: str) -> datetime | None:
    if payload.fault(body):
        return None
    return datetime.fromisoformat(json.loads(body)["sent_at"])


@dataclass(frozen=True)
class There:
    """What the receiver holds, by instance id, and which rows had been sent when it was asked."""

    endpoint: str
    holdings: Mapping[UUID, Holding]
    sent: Collection[UUID]

    @property
    def bodies(self) -> set[str]:
        """All bodies that the receiver holds."""
        return {body for each in self.holdings.values() for body in each.bodies.values()}


@dataclass(frozen=True)
class Here:
    """This side of the comparison with the receiver: the time, and what is no longer stored here.

    ``retention`` is how long a row is stored, ``None`` means forever. Heartbeats before ``since``
    do not count. ``logged`` has the bodies of a log, if one is given.
    """

    now: datetime
    retention: timedelta | None = None
    since: date | None = None
    logged: Collection[str] | None = None


@dataclass
class Confirmed:
    """How many of the rows the receiver holds, and how many heartbeats it holds without a row.

    Of the ``sent`` rows it holds ``equal - equal_unsent`` byte for byte. ``equal_unsent`` counts
    rows without an accepted attempt: the answer was lost, or the row was carried by hand.
    ``only_there`` and ``no_longer_here`` count heartbeats without a row; the latter are older than
    the retention here.
    """

    endpoint: str
    ids: list[UUID]
    sent: int = 0
    equal: int = 0
    equal_unsent: int = 0
    missing: int = 0
    different: int = 0
    only_there: int = 0
    no_longer_here: int = 0


def of_receiver(
    rows: Sequence[Record], there: There, here: Here
) -> tuple[Confirmed, list[Problem]]:
    """Compare what the receiver holds with the rows, byte for byte; return the problems as well.

    A row and a heartbeat match by instance id and by the second in which they were written.
    """
    found, problems = Confirmed(there.endpoint, sorted(there.holdings)), []
    unmatched = {
        (instance_id, sent_at): body
        for instance_id, holding in there.holdings.items()
        for sent_at, body in holding.bodies.items()
    }
    for row in rows:
        sent = row["id"] in there.sent
        found.sent += sent
        body = unmatched.pop((row["instance_id"], _sent_at(row)), None)
        if body == row["payload"]:
            found.equal += 1
            found.equal_unsent += not sent
        elif body is not None:
            found.different += 1
            sentence = _different(row["payload"], body, here.logged)
            problems.append(Problem(sentence, row["day"], row["id"]))
        elif sent:
            found.missing += 1
            problems.append(Problem(_missing(row, there, here), row["day"], row["id"]))
    for (instance_id, sent_at), body in unmatched.items():
        written = datetime.fromisoformat(sent_at)
        if here.since and written < Day(here.since).opens:
            continue
        if here.retention and here.now - written > here.retention:
            found.no_longer_here += 1
            continue
        found.only_there += 1
        problems.append(_without_row(instance_id, written, body, here.logged))
    return found, problems


def _different(stored: str, held: str, logged: Collection[str] | None) -> str:
    """Say that the bytes differ, and whether the log agrees with the row or with the receiver."""
    differ = "the receiver holds different bytes under its id and time"
    match logged is not None and stored in logged, logged is not None and held in logged:
        case True, False:
            return f"{differ}; the row and the log have the same bytes: the receiver's was changed"
        case False, True:
            return f"{differ}; the receiver and the log have the same bytes: the row was changed"
    return f"{differ}: the row or the receiver's copy was changed"


def _missing(row: Record, there: There, here: Here) -> str:
    """Say that the receiver does not hold a row that was sent, and the possible reasons."""
    reasons = ["it was deleted there"]
    holding = there.holdings.get(row["instance_id"])
    days = holding.retention_days if holding else 0
    if days and here.now - row["created_at"] > timedelta(days=days):
        reasons.insert(0, f"it is older than the {days} days for which the receiver stores it")
    went = {each["endpoint"] for each in row["tries"] if each["outcome"] == "sent"}
    if went and there.endpoint not in went:
        reasons.insert(0, "it was sent to another endpoint, shown in its attempt")
    logged = here.logged is not None and row["payload"] in here.logged
    sent = "it was sent, which the log confirms" if logged else "it was sent"
    return f"{sent}, and the receiver does not hold it: {_either(reasons)}"


def _either(reasons: Sequence[str]) -> str:
    *first, last = reasons
    return f"{', '.join(first)}, or {last}" if first else last


_NOT_HERE = (
    "this database was restored from a backup",
    "ConsentOS's own telemetry sent it under the same id",
    "somebody else uses this id",
)


def _without_row(
    instance_id: UUID, written: datetime, body: str, logged: Collection[str] | None
) -> Problem:
    why = _either(_NOT_HERE)
    if logged is not None and body in logged:
        why = "the log has the same bytes, so it was sent from here and its row is gone"
    held = f"the receiver holds a heartbeat of {written.isoformat()} that is not stored here"
    return Problem(f"{held}: {why}", instance_id=instance_id)
