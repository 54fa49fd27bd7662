"""Whether what is on record is true: each row by itself, and the outbox beside a log. Pure."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from uuid import UUID

from app import payload
from app.outbox import Record
from app.schedule import running_day

MARK = "telemetry.payload "

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


@dataclass(frozen=True)
class Logged:
    """A body as a line of the log has it."""

    body: str
    line: int


def logged(lines: Iterable[str]) -> Iterator[Logged]:
    """Yield the bodies that a log holds, as ``grep`` and ``sed`` would: whatever stands before."""
    for number, line in enumerate(lines, start=1):
        _, mark, body = line.rstrip("\r\n").rpartition(MARK)
        if mark:
            yield Logged(body, number)


def of_log(rows: Sequence[Record], bodies: Sequence[Logged]) -> Iterator[Problem]:
    """Yield each body that was logged and is not stored, and each row sent that was not logged."""
    stored = {row["payload"] for row in rows}
    for each in bodies:
        if each.body not in stored:
            yield Problem("the log has a body that is not stored", line=each.line)
    told = {each.body for each in bodies}
    for row in rows:
        sent = row["state"] == "sent" or "sent" in _outcomes(row)
        if sent and row["payload"] not in told:
            yield Problem("it was sent, and the log has no such body", row["day"], row["id"])


def since(day: date, bodies: Iterable[Logged]) -> Iterator[Logged]:
    """Yield the bodies of ``day`` and later, and those that do not say when they were written."""
    for each in bodies:
        written = _written(each.body)
        if written is None or running_day(written).date >= day:
            yield each


def _written(body: str) -> datetime | None:
    if payload.fault(body):
        return None
    return datetime.fromisoformat(json.loads(body)["sent_at"])
