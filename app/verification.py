"""Whether what is on record is true: each row by itself, and the outbox beside a log. Pure."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from uuid import UUID

from app import payload
from app.logfile import MARK, Entry, Logged, TooLong, Unreadable
from app.outbox import Record
from app.schedule import running_day

NOT_FROZEN = (
    "the trigger telemetry_outbox_frozen, which keeps a row from being changed, does not stand"
    " unchanged and alone"
)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be, in a row or in a line of the log, or in neither."""

    sentence: str
    day: date | None = None
    id: UUID | None = None
    line: int | None = None


def of_rows(rows: Iterable[Record]) -> Iterator[Problem]:
    """Yield what is wrong with each row, by itself and with its attempts, ``tries``."""
    for row in rows:
        for sentence in (*_of_body(row), *_of_attempts(row)):
            yield Problem(sentence, day=row["day"], id=row["id"])


def _of_body(row: Record) -> Iterator[str]:
    if fault := payload.fault(row["payload"]):
        yield fault
        return
    body = json.loads(row["payload"])
    if body["instance_id"] != str(row["instance_id"]):
        yield "its body names another instance than the row"
    if running_day(row["created_at"]).date != row["day"]:
        yield "it was written on another day than it is for"
    if body["sent_at"] != row["created_at"].astimezone(UTC).isoformat(timespec="seconds"):
        yield "its body names another time than the one at which the row was written"


def _of_attempts(row: Record) -> Iterator[str]:
    numbers = [each["n"] for each in row["tries"]]
    if numbers != [*range(1, row["attempts"] + 1)]:
        found = ", ".join(map(str, numbers)) or "none"
        yield f"its count of attempts is {row['attempts']}, and those on record are {found}"
    if row["state"] in {"sent", "rejected"} and row["state"] not in _outcomes(row):
        yield f"it is {row['state']}, and no attempt on record was"


def _outcomes(row: Record) -> set[str | None]:
    return {each["outcome"] for each in row["tries"]}


@dataclass
class Compared:
    """How many bodies a log has, which lines were too long to have one, and what is wrong."""

    logged: int = 0
    too_long: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def of_log(
    rows: Sequence[Record], entries: Iterable[Entry], *, since: date | None = None
) -> Compared:
    """Compare a log with the rows: each logged body is stored, and each row sent was logged.

    With ``since``, which the rows are of, earlier bodies are left out. A body that does not say
    when it was written is not.
    """
    found, stored, seen = Compared(), {row["payload"] for row in rows}, set()
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
                    seen.add(whole)
                    found.problems += _of_logged(whole, line, stored)
    found.problems += _not_logged(rows, seen, sure=not found.too_long and not found.problems)
    return found


_UNREADABLE = "the log has a body here that cannot be read"
_NOT_WHOLE = f"{_UNREADABLE}: it is not a whole JSON object"


def _joined(logged: Logged, stored: Iterable[str]) -> str | None:
    """Return the stored body whose end is on the next line; None if that cannot be said."""
    if not logged.following or MARK in logged.following:
        return None
    for body in stored:
        if body.startswith(logged.body) and logged.following.endswith(body[len(logged.body) :]):
            return body
    return None


def _of_logged(body: str, line: int, stored: set[str]) -> Iterator[Problem]:
    if body not in stored:
        known = "the log has a body that is not stored"
        yield Problem(known if _is_whole(body) else _NOT_WHOLE, line=line)


def _is_whole(body: str) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def _not_logged(rows: Iterable[Record], seen: set[str], *, sure: bool) -> Iterator[Problem]:
    missing = "it was sent, and the log has no such body"
    for row in rows:
        sent = row["state"] == "sent" or "sent" in _outcomes(row)
        if sent and row["payload"] not in seen:
            where = missing if sure else f"{missing} in the lines that can be read"
            yield Problem(where, row["day"], row["id"])


def _counts(body: str, since: date) -> bool:
    written = _written(body)
    return written is None or running_day(written).date >= since


def _written(body: str) -> datetime | None:
    if payload.fault(body):
        return None
    return datetime.fromisoformat(json.loads(body)["sent_at"])
