"""``status``: what happened last, what comes next, and what is in the way."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.markup import escape

from app import __version__, report
from app.cli import printing
from app.cli.entry import FAILED, CommandError, command, complain, explained
from app.cli.printing import AsJson, count, print_json, print_table, time
from app.outbox import Record
from app.pipeline import Pipeline
from app.report import Status
from app.settings import Disabled, Settings

MOST_RIGHTS_SHOWN = 3
MINUTE = 60
LATE_SWEEP = 5 * MINUTE
"""Seconds after which the last sweep is late: a worker sweeps every minute."""


@command(short_help="Show whether it is on, what happened last, what comes next.")
def status(
    *,
    as_json: AsJson = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="For a probe that restarts the process: exit with 1 only if telemetry is on, the"
            " day's heartbeat is not written an hour after it was due, and a restart may help.",
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
        # It is unknown whether a heartbeat is overdue, and a restart would not help.
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
        complain(f"Redis cannot be used, so no worker is woken: {now.redis_trouble}.")
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
    yield "instance", str(now.instance_id or "none yet: the first heartbeat creates it")
    yield "notice", time(now.noticed_at) or "not given yet"
    yield "last success", time(now.last_success) or "never"
    yield "next send", time(now.next_send) or "never: telemetry is off"
    for row in now.pending:
        what = _next_attempt(row) if now.enabled else "will be discarded"
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


def _next_attempt(row: Record) -> str:
    if row["state"] == "sending":
        return "being sent now"
    return f"next attempt {time(row['next_attempt_at'])}"


def _failure(attempt: Record | None) -> str:
    return f"{printing.outcome(attempt)}, {time(attempt['started_at'])}" if attempt else "none"


def _sweep(seconds_ago: int | None) -> str:
    """Say how long ago a worker last swept, which it does every minute."""
    if seconds_ago is None:
        return "[yellow]none in the last 30 days: is a worker running?[/]"
    ago = count(seconds_ago, "second")
    if seconds_ago >= 2 * MINUTE:
        ago = f"{timedelta(seconds=seconds_ago)} (hours:minutes:seconds)"
    late = seconds_ago > LATE_SWEEP
    return f"[yellow]{ago} ago: is a worker running?[/]" if late else f"{ago} ago"


def _rights(now: Status) -> str:
    """Say whether the role has the rights that the pipeline needs, and no others."""
    excess = now.excess_rights
    if now.lacking_rights:
        tables = ", ".join(now.lacking_rights)
        return f"[red]too few[/]: the role lacks rights on {tables}. Run `grants --apply`"
    if not excess:
        return "only those needed: the database refuses everything else"
    shown = "; ".join(excess[:MOST_RIGHTS_SHOWN])
    if further := len(excess) - MOST_RIGHTS_SHOWN:
        shown += f"; and {further} more, in --json" if further > 0 else ""
    return f"[yellow]more than needed[/]: the role {escape(shown)}. See `grants`"
