"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import ArgumentError, DBAPIError

from app import database, log, payload, report
from app.outbox import Record
from app.pipeline import CollectError, Pipeline, Sent
from app.report import Status
from app.settings import Disabled, Settings, SettingsError
from migrations import MigrationRefusedError, migrate

FAILED = 1
WRONG_ENVIRONMENT = 2
SWITCHED_OFF = 3

app = typer.Typer(
    name="consentos-telemetry",
    help="See, check and control the one anonymous heartbeat a day that this ConsentOS sends."
    " Everything is read from the environment; TELEMETRY_ENABLED=false and a restart turn it off.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")]


class CommandError(Exception):
    """A command cannot do what it was asked; the message is one sentence for the operator."""

    def __init__(self, sentence: str, code: int = FAILED) -> None:
        """Keep the sentence, and the exit code that goes with it."""
        super().__init__(sentence)
        self.code = code


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what can go wrong outside this program into one sentence, without any value in it."""
    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), WRONG_ENVIRONMENT) from error
    except ArgumentError as error:
        raise CommandError("DATABASE_URL cannot be understood.", WRONG_ENVIRONMENT) from error
    except MigrationRefusedError as error:
        raise CommandError(str(error)) from error
    except CollectError as error:
        raise CommandError(f"{error}: {log.cause(error)}.") from error
    except DBAPIError as error:
        cause = log.cause(error)
        raise CommandError(f"{cause[0].upper()}{cause[1:]}.") from error


def main() -> None:
    """Run the command line; every failure is one sentence on stderr and an exit code."""
    try:
        app()
    except CommandError as error:
        _complain(str(error))
        raise SystemExit(error.code) from None
    except Exception as error:  # noqa: BLE001 - an operator gets a sentence, whatever happens
        _complain(f"Something unforeseen happened: {log.cause(error)}.")
        raise SystemExit(FAILED) from None


def _complain(sentence: str) -> None:
    typer.echo(f"consentos-telemetry: {sentence}", err=True)


# Looking


@app.command()
def status(
    *,
    as_json: AsJson = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 1 only when telemetry is on and nothing has written the day's"
            " heartbeat an hour after it was due. A collector that is down is no reason.",
        ),
    ] = False,
) -> None:
    """Show whether telemetry is on, what happened last and what comes next."""
    settings = Settings.load()
    try:
        with _explained():
            now = report.status(Pipeline(settings))
    except CommandError as error:
        if as_json:
            _print_json({**_settings_facts(settings), "error": str(error)})
        else:
            _console().print(_table(_settings_rows(settings)))
        if not check:
            raise
        # Nobody knows whether a heartbeat is overdue, and a restart would not mend this.
        _complain(str(error))
        return
    if as_json:
        _print_json(asdict(now))
    else:
        _console().print(_table([*_settings_rows(settings), *_status_rows(now)]))
    if check and now.overdue:
        raise typer.Exit(FAILED)


def _settings_facts(settings: Settings) -> dict[str, Any]:
    gate = settings.gate
    return {
        "enabled": not isinstance(gate, Disabled),
        "reason": gate.reason if isinstance(gate, Disabled) else None,
        "warnings": settings.warnings,
        "endpoint": settings.endpoint_without_query,
    }


def _settings_rows(settings: Settings) -> Iterator[tuple[str, str]]:
    gate = settings.gate
    off = f"[yellow]off[/]: {escape(gate.reason)}" if isinstance(gate, Disabled) else None
    yield "telemetry", off or "[green]on[/]"
    for warning in settings.warnings:
        yield "warning", f"[yellow]{escape(warning)}[/]"
    yield "endpoint", escape(settings.endpoint_without_query)


def _status_rows(now: Status) -> Iterator[tuple[str, str]]:
    yield "schedule", now.schedule
    yield "instance", str(now.instance_id or "none yet: made with the first heartbeat")
    yield "notice", _time(now.noticed_at) or "not given yet"
    yield "last success", _time(now.last_success) or "never"
    yield "next send", _time(now.next_send) or "never: telemetry is off"
    for row in now.pending:
        what = f"next try {_next_try(row)}" if now.enabled else "awaits being discarded"
        tries = f"{row['attempts']} attempt{'' if row['attempts'] == 1 else 's'}"
        yield row["state"], f"{row['day']}, {tries}, {what}"
    if not now.pending:
        yield "pending", "nothing"
    yield "last error", escape(_failure(now.last_error))
    if now.cannot_write:
        yield "cannot write", f"[red]{escape(now.cannot_write)}[/]"
    if now.overdue:
        yield "overdue", "[red]the day's heartbeat is not written: see the worker's log[/]"


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _next_try(row: Record) -> str:
    return "in progress" if row["state"] == "sending" else _time(row["next_attempt_at"])


def _failure(attempt: Record | None) -> str:
    return f"{_outcome(attempt)}, {_time(attempt['started_at'])}" if attempt else "none"


@app.command()
def preview() -> None:
    """Print the exact body that would be written now; store nothing, send nothing.

    Works whether telemetry is on or off.
    """
    settings = Settings.load()
    with _explained():
        body, known = report.preview(Pipeline(settings))
    if not known:
        typer.echo(
            "No instance exists yet: the nil UUID stands for the random one that the first"
            " heartbeat will make.",
            err=True,
        )
    if isinstance(settings.gate, Disabled):
        typer.echo(f"Telemetry is off, so none of this leaves: {settings.gate.reason}.", err=True)
    typer.echo(body)


@app.command()
def audit(
    row_id: Annotated[
        UUID | None,
        typer.Argument(metavar="[ID]", help="Print this row's exact bytes and its attempts."),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the outbox, newest first: every heartbeat, whether it left, and each attempt."""
    with _explained():
        rows = report.audit(Pipeline(Settings.load()))
    if row_id is not None:
        rows = [row for row in rows if row["id"] == row_id]
        if not rows:
            raise CommandError(f"No row of the outbox has the id {row_id}.")
    if as_json:
        _print_json(rows[0] if row_id else rows)
    elif row_id is not None:
        typer.echo(rows[0]["payload"])
        _console().print(_attempts_table(rows[0]))
    else:
        _console().print(_outbox_table(rows))


def _outbox_table(rows: list[Record]) -> Table:
    table = Table("day", "state", "id", "attempts", "next or finished", title="telemetry_outbox")
    for row in rows:
        when = row["finished_at"] or row["next_attempt_at"]
        tries = [f"{t['n']}. {_time(t['started_at'])} {_outcome(t, row)}" for t in row["tries"]]
        cells = (str(row["day"]), row["state"], str(row["id"]), "\n".join(tries), _time(when))
        table.add_row(*map(escape, cells))
    return table


def _attempts_table(row: Record) -> Table:
    table = Table("n", "started", "finished", "outcome", "ms", "endpoint", title="attempts")
    for each in row["tries"]:
        cells = (
            str(each["n"]),
            _time(each["started_at"]),
            _time(each["finished_at"]),
            _outcome(each, row),
            str(each["duration_ms"] or ""),
            each["endpoint"],
        )
        table.add_row(*map(escape, cells))
    return table


def _outcome(attempt: Record, row: Record | None = None) -> str:
    """Tell an attempt's outcome; ``row`` tells one that goes on from one that was cut off."""
    if attempt["outcome"] is None:
        going_on = row and row["state"] == "sending" and attempt["n"] == row["attempts"]
        return "in flight" if going_on else "in flight when the process died"
    status = attempt["http_status"]
    detail = f"HTTP {status}" if status else attempt["error"]
    return f"{attempt['outcome']} ({detail})"


@app.command()
def schema() -> None:
    """Print the JSON Schema of the heartbeat."""
    _print_json(payload.json_schema())


# Doing


@app.command()
def send(*, as_json: AsJson = False) -> None:
    """Write the running day's heartbeat if it is missing, and send it now.

    The running day began at the latest 02:30 UTC. Waits for neither the notice, the install's
    offset nor an earlier backoff, but never asks a receiver before the time it asked for. Exits
    with 0 when the day's heartbeat has been sent, now or before, 1 when it could not be, and 3
    when telemetry is off.
    """
    settings = Settings.load()
    if isinstance(settings.gate, Disabled):
        raise CommandError(f"Telemetry is off: {settings.gate.reason}.", SWITCHED_OFF)
    log.setup(settings.log_level, sys.stderr if as_json else sys.stdout)
    with _explained(), Console(stderr=True).status("Sending the day's heartbeat …"):
        result = Pipeline(settings).send()
    sent, sentence = _told(result)
    if as_json:
        _print_json({"sent": sent, "said": sentence, "day": result.day, "row": result.row})
    else:
        typer.echo(sentence)
    if not sent:
        raise typer.Exit(FAILED)


def _told(result: Sent) -> tuple[bool, str]:
    """Return whether the day's heartbeat has been sent, and the sentence that says how."""
    row, day = result.row, f"The heartbeat of {result.day}"
    if result.obstacle == "sent elsewhere":
        return True, f"{day} was sent by another program: see instance.last_telemetry_at."
    if row is None:
        return False, f"{day} was not written."
    if row["state"] == "sent":
        when = "before" if result.sent_before else "now"
        return True, f"{day} has been sent ({when}, {_time(row['finished_at'])})."
    return False, f"{day} was not sent: {_why_not(row)}."


def _why_not(row: Record) -> str:
    error, not_before = row["last_error"] or "no attempt was made", row["not_before"]
    match row["state"]:
        case "sending":
            return "a worker is sending it at this moment; ask `status` again"
        case "pending" if not_before and not_before >= row["next_attempt_at"]:
            return f"{error}; the receiver asks to be left alone until {_time(not_before)}"
        case "pending":
            return f"{error}; next try {_time(row['next_attempt_at'])}"
    return f"it is {row['state']} ({error}) and uses up its day"


@app.command(name="migrate")
def migrate_command(
    *,
    down: Annotated[
        bool, typer.Option("--down", help="Remove the tables of telemetry, the outbox included.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing.")] = False,
) -> None:
    """Make or upgrade the tables of telemetry, as MIGRATION_DATABASE_URL or DATABASE_URL.

    ConsentOS's own tables and its alembic_version are never touched.
    """
    settings = Settings.load()
    if down and not yes:
        typer.confirm("This deletes the outbox, its attempts and the notice. Go on?", abort=True)
    with _explained():
        given = "migration_database_url" in settings.model_fields_set
        url = settings.require("migration_database_url" if given else "database_url")
        with database.engine(url).connect() as connection:
            before, after = migrate(connection, "telemetry", "base" if down else "head")
    typer.echo(f"telemetry: {before} -> {after}" if before != after else f"telemetry: at {after}")


# Printing


def _console() -> Console:
    """Return a console on stdout that does not fold tables where nobody's terminal sets a width."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _time(value: datetime | None) -> str:
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z" if value else ""


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=_json))


def _json(value: object) -> str:
    return value.isoformat() if isinstance(value, (date, datetime)) else str(value)
