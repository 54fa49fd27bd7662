"""Output of the commands: tables for people, JSON for programs, times in UTC."""

import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.outbox import STATES, Record

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON: dates and times in ISO 8601, other unknown types as text."""
    typer.echo(to_json(value, indent=indent))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, by default on one line."""
    return json.dumps(value, indent=indent, default=_json)


def _json(value: object) -> str:
    return value.isoformat() if isinstance(value, (date, datetime)) else str(value)


def time(value: datetime | None) -> str:
    """Return a time for a person to read, or an empty string without one."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z" if value else ""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return "1 attempt", "2 attempts"."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


WIDE = 160
"""The width in columns if neither a terminal nor COLUMNS sets one."""


def print_table(table: Table, *, err: bool = False) -> None:
    """Print a table on stdout or stderr; only ``typer.echo`` writes, so a failure is met there."""
    console = Console(width=_width(err=err), stderr=err)
    with console.capture() as captured:
        console.print(table)
    typer.echo(captured.get(), nl=False, err=err)


def _width(*, err: bool = False) -> int | None:
    """Return the width for a table in columns; None lets rich detect it."""
    stream = sys.stderr if err else sys.stdout
    return None if stream.isatty() or "COLUMNS" in os.environ else WIDE


def names_and_values(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of two columns, without borders."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


ROOM_FOR_IDS = 130
"""The least width at which the outbox table shows ids: a day names a row too."""

ROOM_FOR_ENDS = 100
"""The least width at which the table of a row's attempts shows when each finished."""


def _has_room(columns: int, *, err: bool = False) -> bool:
    return (_width(err=err) or Console(stderr=err).width) >= columns


def outbox(rows: Iterable[Record]) -> Table:
    """Return the table of the outbox, each row with its attempts; days and states are never cut."""
    table = Table(title="telemetry_outbox")
    table.add_column("day", no_wrap=True, min_width=len("2026-05-02"))
    table.add_column("state", no_wrap=True, min_width=max(map(len, STATES)))
    with_ids = _has_room(ROOM_FOR_IDS)
    if with_ids:
        table.add_column("id")
    table.add_column("attempts")
    table.add_column("next attempt or end")
    for row in rows:
        when = row["finished_at"] or row["next_attempt_at"]
        tries = [f"{t['n']}. {time(t['started_at'])} {outcome(t, row)}" for t in row["tries"]]
        ids = [str(row["id"])] * with_ids
        cells = (str(row["day"]), row["state"], *ids, "\n".join(tries), time(when))
        table.add_row(*map(escape, cells))
    return table


def attempts(row: Record, *, err: bool = False) -> Table:
    """Return the table of a row's attempts, to be printed on stdout or on stderr."""
    table = Table(title=f"{row['day']}: {row['state']}")
    with_ends = _has_room(ROOM_FOR_ENDS, err=err)
    ends = ["finished"] * with_ends
    for name in ("n", "started", *ends, "outcome", "ms", "endpoint"):
        table.add_column(name, overflow="fold")
    for each in row["tries"]:
        cells = (
            str(each["n"]),
            time(each["started_at"]),
            *[time(each["finished_at"])] * with_ends,
            outcome(each, row),
            str(each["duration_ms"] or ""),
            each["endpoint"],
        )
        table.add_row(*map(escape, cells))
    return table


def outcome(attempt: Record, row: Record | None = None) -> str:
    """Describe an attempt's outcome; ``row`` shows whether one without an outcome still runs."""
    if attempt["outcome"] is None:
        running = row and row["state"] == "sending" and attempt["n"] == row["attempts"]
        return "in flight" if running else "in flight when the process died"
    status = attempt["http_status"]
    detail = f"HTTP {status}" if status else attempt["error"]
    return f"{attempt['outcome']} ({detail})"
