"""``audit``: the outbox as a list, one row of it, its verification and its export."""

import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from app import report
from app.cli import printing, verifying
from app.cli.entry import CommandError, command, complain, explained
from app.cli.printing import AsJson, count, print_json, print_table
from app.outbox import STATES, State, Wanted
from app.pipeline import Pipeline
from app.report import Listed
from app.settings import Settings

LATEST = 30
"""Rows that are listed by default."""

_LIST = "the list"
_ROW = "a row"
_OPTIONS = {
    _LIST: {"--limit", "--all", "--state", "--since"},
    _ROW: set[str](),
    "--verify": {"--since", "--log", "--remote"},
    "--export": {"--state", "--since"},
}
"""What `audit` can be asked for, and the options that go with each."""


@command(short_help="List what was sent, print a row, verify or export.")
def audit(  # noqa: PLR0913 - Typer takes each option of a command as a parameter
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="ID|DAY|last",
            help="Print the exact bytes of one row, and its attempts. Name the row by its id, by"
            " its day (2026-05-02), or as `last`: the last one attempted or carried by hand.",
            show_default=False,
        ),
    ] = None,
    *,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"List the latest N rows; the default is {LATEST}.",
            show_default=False,
        ),
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="List all rows.")] = False,
    state: Annotated[
        State | None,
        typer.Option(
            metavar="STATE",
            help=f"List or export only the rows in this state: {', '.join(STATES)}.",
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            metavar="DAY",
            formats=["%Y-%m-%d"],
            help="List, export or verify only this day and later. With --log, give the day on"
            " which the log begins.",
        ),
    ] = None,
    as_json: AsJson = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check that each body matches its schema, that the trigger which protects the"
            " rows is in place, and that the attempts are complete. Exits with 1 on a problem.",
        ),
    ] = False,
    log: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="With --verify: also check that each telemetry.payload line of this log is stored"
            " as a row, and that each row sent is in the log. - reads stdin. May be gzipped.",
        ),
    ] = None,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote",
            help="With --verify: also ask the receiver at TELEMETRY_ENDPOINT what it holds under"
            " each stored id, and compare it with the rows byte for byte. Sends only the ids,"
            " whether telemetry is on or off.",
        ),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write all rows to a new file, or to stdout (-), as JSON Lines: one row with its"
            " attempts per line.",
        ),
    ] = None,
) -> None:
    """List the outbox, newest first: every heartbeat, its state and its attempts.

    A row's body goes to stdout. The table of its attempts follows, on stderr if stdout is not a
    terminal, so that `audit last | jq` works.
    """
    values = {
        _ROW: which,
        "--limit": limit,
        "--all": all_rows,
        "--state": state,
        "--since": since,
        "--verify": verify,
        "--log": log,
        "--remote": remote,
        "--export": export,
    }
    _check_options([name for name, value in values.items() if value not in {None, False}])
    pipeline = Pipeline(Settings.load())
    wanted = Wanted(state=state, since=since.date() if since else None)
    if verify:
        verifying.verify(pipeline, log, since=wanted.since, remote=remote, as_json=as_json)
    elif which is not None:
        _print_row(pipeline, which, as_json=as_json)
    elif export is not None:
        _export(pipeline, wanted, export)
    else:
        most = None if all_rows else limit or LATEST
        _print_list(pipeline, replace(wanted, limit=most), as_json=as_json)


def _check_options(given: Collection[str]) -> None:
    """Refuse options that do not go together.

    Raises:
        typer.BadParameter: two things are asked for, or an option does not go with what is.
    """
    asked = [each for each in _OPTIONS if each in given] or [_LIST]
    if len(asked) > 1:
        raise typer.BadParameter("choose one of a row, --verify and --export")
    for option in given:
        if option in {*asked, *_OPTIONS[asked[0]]}:
            continue
        allowed = " or ".join(each for each, options in _OPTIONS.items() if option in options)
        raise typer.BadParameter(f"{option} goes with {allowed}, not with {asked[0]}")
    if {"--limit", "--all"} <= {*given}:
        raise typer.BadParameter("choose one of --limit and --all")


def _rows(pipeline: Pipeline, wanted: Wanted) -> Listed:
    with explained():
        return report.audit(pipeline, wanted)


def _print_list(pipeline: Pipeline, wanted: Wanted, *, as_json: bool) -> None:
    found = _rows(pipeline, wanted)
    if as_json:
        print_json(found.rows)
    else:
        print_table(printing.outbox(found.rows))
    if found.more:
        complain(f"{count(found.more, 'older row')} not shown: --all shows all.")


def _print_row(pipeline: Pipeline, which: str, *, as_json: bool) -> None:
    wanted, missing = _named(which)
    found = _rows(pipeline, wanted).rows
    if not found:
        raise CommandError(missing)
    (row,) = found
    if as_json:
        print_json(row)
        return
    typer.echo(row["payload"])
    err = not sys.stdout.isatty()
    print_table(printing.attempts(row, err=err), err=err)


def _named(which: str) -> tuple[Wanted, str]:
    """Return the row that is named, and the sentence for the case that it does not exist.

    Raises:
        typer.BadParameter: ``which`` is not an id, a day or ``last``.
    """
    if which == "last":
        return Wanted(left=True, limit=1), "No heartbeat has been attempted yet."
    with suppress(ValueError):
        row_id = UUID(which)
        return Wanted(id=row_id), f"No row of the outbox has the id {row_id}."
    with suppress(ValueError):
        day = date.fromisoformat(which)
        return Wanted(day=day), f"No row of the outbox has the day {day}."
    raise typer.BadParameter("name a row by its id, by its day (2026-05-02), or as last")


def _export(pipeline: Pipeline, wanted: Wanted, path: Path) -> None:
    rows = _rows(pipeline, wanted).rows
    lines = "".join(f"{printing.to_json(row)}\n" for row in reversed(rows))
    if str(path) == "-":
        typer.echo(lines, nl=False)
    else:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror}.") from error
    attempts = count(sum(len(row["tries"]) for row in rows), "attempt")
    typer.echo(f"{count(len(rows), 'heartbeat')} with {attempts} written to {path}.", err=True)
