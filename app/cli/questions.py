"""The commands that look, and change nothing."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.markup import escape

from app import __version__, change, payload, report
from app.change import Change
from app.cli import printing, verifying
from app.cli.entry import FAILED, CommandError, command, complain, explained
from app.cli.printing import AsJson, count, print_json, print_table, time
from app.outbox import STATES, Record, State, Wanted
from app.pipeline import Pipeline
from app.report import Listed, Preview, Status
from app.settings import Disabled, Settings

MOST_RIGHTS_SHOWN = 3
MINUTE = 60
LATE_SWEEP = 5 * MINUTE
"""Seconds after which a sweep, which comes every minute, is missed."""


@command(short_help="Show whether it is on, what happened last, what comes next.")
def status(
    *,
    as_json: AsJson = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="For a probe that restarts the process: exit with 1 only when telemetry is on, the"
            " day's heartbeat is not written an hour after it was due, and nothing but the process"
            " can be the reason.",
        ),
    ] = False,
) -> None:
    """Show whether telemetry is on, what happened last and what comes next."""
    settings = Settings.load()
    try:
        with explained():
            now = report.status(Pipeline(settings))
    except CommandError as error:
        code = 0 if check else error.code
        if as_json:
            print_json({**_settings_facts(settings), "error": str(error), "code": code})
        else:
            print_table(printing.names_and_values(_settings_rows(settings)))
        if not check:
            raise CommandError(str(error), code, printed=as_json) from error
        # Nobody knows whether a heartbeat is overdue, and a restart would not mend this.
        complain(str(error))
        return
    if as_json:
        print_json(asdict(now))
    else:
        rows = [*_settings_rows(settings), *_status_rows(now)]
        print_table(printing.names_and_values(rows))
    if check and now.cannot_write:
        complain(f"The day's heartbeat cannot be written: {now.cannot_write}.")
    if check and now.enabled and settings.redis_url and now.redis_trouble:
        complain(f"Redis cannot be used, so that no worker is woken: {now.redis_trouble}.")
    if check and now.overdue:
        raise typer.Exit(FAILED)


def _settings_facts(settings: Settings) -> dict[str, Any]:
    gate = settings.gate
    return {
        "release": __version__,
        "enabled": not isinstance(gate, Disabled),
        "reason": gate.reason if isinstance(gate, Disabled) else None,
        "warnings": settings.warnings,
        "endpoint": settings.endpoint_without_query,
        "version": settings.app_version,
        "edition": settings.edition,
    }


def _settings_rows(settings: Settings) -> Iterator[tuple[str, str]]:
    gate = settings.gate
    off = f"[yellow]off[/]: {escape(gate.reason)}" if isinstance(gate, Disabled) else None
    yield "telemetry", off or "[green]on[/]"
    for warning in settings.warnings:
        yield "warning", f"[yellow]{escape(warning)}[/]"
    yield "endpoint", escape(settings.endpoint_without_query)
    yield "version", settings.app_version
    yield "edition", settings.edition
    yield "release", __version__


def _status_rows(now: Status) -> Iterator[tuple[str, str]]:
    yield "schedule", now.schedule
    yield "instance", str(now.instance_id or "none yet: made with the first heartbeat")
    yield "notice", time(now.noticed_at) or "not given yet"
    yield "last success", time(now.last_success) or "never"
    yield "next send", time(now.next_send) or "never: telemetry is off"
    for row in now.pending:
        what = f"next try {_next_try(row)}" if now.enabled else "awaits being discarded"
        yield row["state"], f"{row['day']}, {count(row['attempts'], 'attempt')}, {what}"
    if not now.pending:
        yield "pending", "nothing"
    yield "last error", escape(_failure(now.last_error))
    yield "rights", _rights(now)
    yield "redis", f"[red]{escape(now.redis_trouble)}[/]" if now.redis_trouble else "answers"
    if not now.redis_trouble:
        yield "last sweep", _sweep(now.last_sweep_seconds_ago)
    if now.cannot_write:
        yield "cannot write", f"[red]{escape(now.cannot_write)}[/]"
    if now.overdue:
        yield "overdue", "[red]the day's heartbeat is not written: see the worker's log[/]"


def _next_try(row: Record) -> str:
    return "in progress" if row["state"] == "sending" else time(row["next_attempt_at"])


def _failure(attempt: Record | None) -> str:
    return f"{printing.outcome(attempt)}, {time(attempt['started_at'])}" if attempt else "none"


def _sweep(seconds_ago: int | None) -> str:
    """Say when a worker last looked for work, which it does every minute."""
    if seconds_ago is None:
        return "[yellow]none in the last 30 days: is a worker running?[/]"
    ago = count(seconds_ago, "second")
    if seconds_ago >= 2 * MINUTE:
        ago = f"{timedelta(seconds=seconds_ago)} (hours:minutes:seconds)"
    late = seconds_ago > LATE_SWEEP
    return f"[yellow]{ago} ago: is a worker running?[/]" if late else f"{ago} ago"


def _rights(now: Status) -> str:
    """Say whether the database gives the pipeline what it needs, and no more than that."""
    excess = now.excess_rights
    if now.lacking_rights:
        tables = ", ".join(now.lacking_rights)
        return f"[red]too few[/]: its role lacks rights on {tables}. Run `grants --apply`"
    if not excess:
        return "no more than it needs: the database refuses all else that is in its tables"
    shown = "; ".join(excess[:MOST_RIGHTS_SHOWN])
    if further := len(excess) - MOST_RIGHTS_SHOWN:
        shown += f"; and {further} more, in --json" if further > 0 else ""
    return f"[yellow]more than it needs[/]: its role {escape(shown)}. See `grants`"


@command(short_help="Print the body that would be written now.")
def preview(
    *,
    diff: Annotated[
        bool,
        typer.Option("--diff", help="Show instead what it has that the last one sent had not."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the exact body that would be written now; store nothing, send nothing.

    Works whether telemetry is on or off. With --diff: each field that is new, gone or other than
    in the last heartbeat that was sent. The body is JSON with and without --json.
    """
    settings = Settings.load()
    with explained():
        found = report.preview(Pipeline(settings), beside_last_sent=diff)
    if not found.instance_known:
        typer.echo(
            "No instance exists yet: the nil UUID stands for the random one that the first"
            " heartbeat will make.",
            err=True,
        )
    if isinstance(settings.gate, Disabled):
        typer.echo(f"Telemetry is off, so none of this leaves: {settings.gate.reason}.", err=True)
    if not diff:
        typer.echo(found.body)
        return
    _print_diff(found, as_json=as_json)


def _print_diff(found: Preview, *, as_json: bool) -> None:
    last = found.last_sent
    changes = change.between(last["payload"] if last else None, found.body)
    if as_json:
        print_json({"since": last["day"] if last else None, **asdict(changes)})
        return
    if last:
        typer.echo(f"Beside the heartbeat of {last['day']}, the last that was sent:")
    else:
        typer.echo("No heartbeat has been sent from here yet, so that every field is new:")
    for line in _diff_lines(changes):
        typer.echo(line)
    new, gone, other = map(len, (changes.added, changes.removed, changes.changed))
    typer.echo(f"{count(new, 'field')} new, {gone} gone, {other} with another value.")


def _diff_lines(changes: Change) -> Iterator[str]:
    meanings = dict(payload.fields())
    for name, value in changes.added.items():
        yield f"+ {name} = {printing.to_json(value)}    {meanings[name].description}"
    for name, value in changes.removed.items():
        yield f"- {name} = {printing.to_json(value)}"
    for name, (before, after) in changes.changed.items():
        yield f"~ {name} = {printing.to_json(before)} -> {printing.to_json(after)}"


LATEST = 30
"""Rows that a list has unless told otherwise."""


@command(short_help="List what was sent, print a row, verify or export.")
def audit(  # noqa: PLR0913 - one for each option
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="ID|DAY|last",
            help="Print this row's exact bytes and its attempts: by its id, by its day such as"
            " 2026-05-02, or the last that was tried or carried by hand.",
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
            help="List, export or verify only this day and later. With --log: as far as the log"
            " goes back.",
        ),
    ] = None,
    as_json: AsJson = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check each row: its body against the schema of its version, that the trigger"
            " which freezes it stands, and that its attempts are complete. Exits with 1 where"
            " something is wrong.",
        ),
    ] = False,
    log: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="With --verify: that each telemetry.payload in this file, or in what is piped to"
            " -, is stored, and that each row sent was logged. The file may be gzipped.",
        ),
    ] = None,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote",
            help="With --verify: ask the receiver at TELEMETRY_ENDPOINT what it holds under each id"
            " on record, and compare that with the rows byte for byte. Sends nothing but the ids,"
            " whether telemetry is on or off.",
        ),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write all rows into a new file, or to - for stdout, as JSON Lines: a row with"
            " its attempts on each.",
        ),
    ] = None,
) -> None:
    """List the outbox, newest first: every heartbeat, whether it left, and each attempt.

    A row's body goes to stdout. The table of its attempts follows, on stderr if stdout is not a
    terminal, so that `audit last | jq` works.
    """
    listing = limit is not None or all_rows
    _refuse(
        ("choose one of a row, --verify and --export", (which, verify, export)),
        ("choose one of --limit and --all", (limit, all_rows)),
        ("--limit and --all belong to the list", (listing, which or verify or export)),
        ("--state belongs to the list and to --export", (state, which or verify)),
        ("--since does not go with a row", (since, which)),
        ("--log belongs to --verify", (log, not verify)),
        ("--remote belongs to --verify", (remote, not verify)),
    )
    pipeline = Pipeline(Settings.load())
    day = since.date() if since else None
    if verify:
        verifying.verify(pipeline, log, since=day, remote=remote, as_json=as_json)
    elif which is not None:
        _print_row(_chosen(pipeline, which), as_json=as_json)
    elif export is not None:
        _write_lines(_listed(pipeline, Wanted(state=state, since=day)).rows, export)
    else:
        most = None if all_rows else limit or LATEST
        found = _listed(pipeline, Wanted(state=state, since=day, limit=most))
        _print_rows(found, as_json=as_json)


def _refuse(*rules: tuple[str, tuple[object, ...]]) -> None:
    """Refuse what does not go together: of the values that a rule names, one may be set."""
    for sentence, values in rules:
        if sum(value not in {None, False} for value in values) > 1:
            raise typer.BadParameter(sentence)


def _listed(pipeline: Pipeline, wanted: Wanted) -> Listed:
    with explained():
        return report.audit(pipeline, wanted)


def _print_rows(found: Listed, *, as_json: bool) -> None:
    if as_json:
        print_json(found.rows)
    else:
        print_table(printing.outbox(found.rows))
    if found.more:
        complain(f"{count(found.more, 'older row')} not shown: --all shows all.")


def _chosen(pipeline: Pipeline, which: str) -> Record:
    """Return the row that is asked for.

    Raises:
        CommandError: there is no such row.
        typer.BadParameter: ``which`` names none in any of the ways.
    """
    if which == "last":
        wanted, missing = Wanted(left=True, limit=1), "No heartbeat has been tried yet."
    else:
        wanted, missing = _named(which)
    found = _listed(pipeline, wanted).rows
    if not found:
        raise CommandError(missing)
    return found[0]


def _named(which: str) -> tuple[Wanted, str]:
    """Return what a day or an id asks for, and the sentence for the case that it is missing."""
    with suppress(ValueError):
        row_id = UUID(which)
        return Wanted(id=row_id), f"No row of the outbox has the id {row_id}."
    with suppress(ValueError):
        day = date.fromisoformat(which)
        return Wanted(day=day), f"No row of the outbox has the day {day}."
    raise typer.BadParameter("a row is named by its id, by its day such as 2026-05-02, or by last")


def _print_row(row: Record, *, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    typer.echo(row["payload"])
    err = not sys.stdout.isatty()
    print_table(printing.attempts(row, err=err), err=err)


def _write_lines(rows: list[Record], path: Path) -> None:
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


@command(short_help="Print the JSON Schema of the heartbeat.")
def schema() -> None:
    """Print the JSON Schema of the heartbeat."""
    print_json(payload.json_schema())
