"""How the maintainers' commands print: tables and sentences on stdout, progress on stderr."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

WIDE = 160
"""The width of a table if neither a terminal nor COLUMNS sets one."""


def print_json(value: Any) -> None:
    """Print a value as JSON: days and times in ISO 8601, times in UTC."""
    typer.echo(json.dumps(value, indent=2, default=_json))


def _json(value: date) -> str:
    return (value.astimezone(UTC) if isinstance(value, datetime) else value).isoformat()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; values are never interpreted as markup, because strangers write them."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    chosen = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if chosen else WIDE)
    with console.capture() as captured:
        console.print(table)
    # Not as the title of the table: rich would fold it to the width of the table.
    typer.echo(f"{title}\n{captured.get()}", nl=False)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def moment(value: datetime) -> str:
    """Return a time to the minute, in UTC, as the options of the commands take it."""
    return f"{value.astimezone(UTC):%Y-%m-%dT%H:%MZ}"


def count(number: int, noun: str) -> str:
    """Return "1 install", "2,000 installs"."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


class Shown(Protocol):
    """Shows progress."""

    def __call__(self, step: str, share: float) -> None:
        """Show the last step, and the part that is done, from 0 to 1."""


@contextmanager
def progress(title: str) -> Iterator[Shown]:
    """Show progress on stderr: as a bar on a terminal, otherwise as a line for each step."""
    if not sys.stderr.isatty():
        yield lambda step, share: typer.echo(f"{title}: {step} ({share:.0%})", err=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda step, share: bar.update(task, description=f"{title}: {step}", completed=share)
