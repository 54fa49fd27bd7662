"""The commands that do something; each says what it changed."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import DBAPIError

from app import control, database, log
from app import grants as rights
from app.cli.entry import FAILED, SWITCHED_OFF, CommandError, command, complain, explained
from app.cli.printing import AsJson, count, print_json, time
from app.control import Forgotten, Rotated
from app.database import PATIENCE_OF_AN_OWNER
from app.outbox import Record
from app.pipeline import Carried, Pipeline, Sent
from app.settings import Disabled, Enabled, Settings
from app.verification import was_sent
from migrations import migrate


@command(short_help="Send the day's heartbeat now.")
def send(
    *,
    by_hand: Annotated[
        bool,
        typer.Option(
            "--by-hand",
            help="Send nothing: print the body for you to carry to the receiver. The day's"
            " heartbeat is then never sent from here; asked again that day, the same bytes are"
            " printed.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the running day's heartbeat if it is missing, and send it now.

    The running day began at the latest 02:30 UTC. Waits for neither the notice, the install's
    offset nor an earlier backoff, but never asks a receiver before the time it asked for. Exits
    with 0 when the day's heartbeat has been sent, now or before, 1 when it could not be, and 3
    when telemetry is off.
    """
    settings = Settings.load()
    if isinstance(settings.gate, Disabled):
        raise CommandError(f"Telemetry is off: {settings.gate.reason}.", SWITCHED_OFF)
    log.setup(settings.log_level, sys.stderr if as_json or by_hand else sys.stdout)
    if by_hand:
        _carry(settings, as_json=as_json)
        return
    with explained(), Console(stderr=True).status("Sending the day's heartbeat …"):
        result = Pipeline(settings).send()
    sent, sentence = _told(result)
    if as_json:
        print_json({"sent": sent, "said": sentence, "day": result.day, "row": result.row})
    else:
        typer.echo(sentence)
    if not sent:
        raise typer.Exit(FAILED)


def _carry(settings: Settings, *, as_json: bool) -> None:
    with explained():
        result = Pipeline(settings).carry()
    day = f"The heartbeat of {result.day}"
    if result.body is None:
        said = f"{day} is not to be carried: {_why_not_carried(result)}."
    else:
        to = settings.endpoint_without_query
        said = f"{day} is yours to carry: POST these bytes to {to}. It is not sent from here."
    if as_json:
        print_json({"sent": False, "said": said, "day": result.day, "row": result.row})
    if result.body is None:
        raise CommandError(said, printed=as_json)
    if not as_json:
        # Into a file go the exact bytes, without a line's end.
        typer.echo(result.body, nl=sys.stdout.isatty())
        typer.echo(said, err=True)


def _why_not_carried(result: Carried) -> str:
    elsewhere = "another program has sent it: see instance.last_telemetry_at"
    row = result.row
    if row is None:
        return elsewhere if result.obstacle == "sent elsewhere" else "it was not written"
    match row["state"]:
        case "sending":
            return "a worker is sending it at this moment; try again"
        case _ if was_sent(row):
            return "it has been sent"
        case "pending":
            return elsewhere
        case "discarded" if row["last_error"] == "sent elsewhere":
            return elsewhere
    return _used_up(row)


def _used_up(row: Record) -> str:
    return (
        f"it is {row['state']} ({row['last_error'] or 'no attempt was made'}) and uses up its day"
    )


def _told(result: Sent) -> tuple[bool, str]:
    """Return whether the day's heartbeat has been sent, and the sentence that says how."""
    row, day = result.row, f"The heartbeat of {result.day}"
    if result.obstacle == "sent elsewhere":
        return True, f"{day} was sent by another program: see instance.last_telemetry_at."
    if row is None:
        return False, f"{day} was not written."
    if row["state"] == "discarded" and row["last_error"] == "sent elsewhere":
        return True, f"{day} was sent by another program: see instance.last_telemetry_at."
    if row["state"] == "sent":
        when = "before" if result.sent_before else "now"
        return True, f"{day} has been sent ({when}, {time(row['finished_at'])})."
    return False, f"{day} was not sent: {_why_not(row)}."


def _why_not(row: Record) -> str:
    error, not_before = row["last_error"] or "no attempt was made", row["not_before"]
    match row["state"]:
        case "sending":
            return "a worker is sending it at this moment; ask `status` again"
        case "pending" if not_before and not_before >= row["next_attempt_at"]:
            return f"{error}; the receiver asks to be left alone until {time(not_before)}"
        case "pending":
            return f"{error}; next try {time(row['next_attempt_at'])}"
    return _used_up(row)


@contextmanager
def _as_admin(settings: Settings) -> Iterator[Engine]:
    """Give the engine for what needs more rights than the pipeline has."""
    with explained():
        try:
            yield database.engine(settings.require_admin(), patience=PATIENCE_OF_AN_OWNER)
        except DBAPIError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
                raise
            cause = log.cause(error)
            raise CommandError(
                f"{cause[0].upper()}{cause[1:]}: MIGRATION_DATABASE_URL must name a role that may."
            ) from error


@command(name="migrate", short_help="Create, upgrade or repair the tables of telemetry.")
def migrate_command(
    *,
    down: Annotated[
        bool, typer.Option("--down", help="Remove the tables of telemetry, the outbox included.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing.")] = False,
) -> None:
    """Make, upgrade or repair the tables of telemetry, as MIGRATION_DATABASE_URL or DATABASE_URL.

    Refuses, and makes nothing, until ConsentOS's own migrations have run. Tables that a partial
    restore has left half there are repaired, and the rows in them are kept. ConsentOS's own tables
    and its alembic_version are never touched. Exits with 0 when the tables are as they should be,
    and 1 when they are not, with the reason.
    """
    settings = Settings.load()
    if down and not yes:
        typer.confirm(
            "This deletes the outbox, its attempts and the notice. Go on?", abort=True, err=True
        )
    url = _url(settings)
    role = url.username if url else None
    with _as_admin(settings) as engine, engine.connect() as connection:
        done = migrate(connection, "telemetry", "base" if down else "head")
        lacking = rights.lacking(connection, role) if role and not down else []
    at = f"at {done.after}" if done.before == done.after else f"{done.before} -> {done.after}"
    typer.echo(f"telemetry: {at}")
    if done.missing:
        typer.echo("Repaired. These were missing:")
    for part in done.missing:
        typer.echo(f"  {part}")
    for sentence in done.kept:
        typer.echo(sentence)
    if lacking:
        complain(
            f"The role {role} lacks rights on {', '.join(lacking)}: now run"
            f" `python -m app grants --role {role} --apply`."
        )


@command(short_help="Create the small database role, or print its SQL.")
def grants(
    *,
    role: Annotated[str, typer.Option(help="The role that the pipeline logs in as.")],
    apply: Annotated[
        bool,
        typer.Option(
            "--apply", help="Run it, as MIGRATION_DATABASE_URL or DATABASE_URL, after `migrate`."
        ),
    ] = False,
) -> None:
    """Print the SQL of a login role that may do what the pipeline does, and nothing else.

    With --apply the role is made where it is missing, with the password that DATABASE_URL has for
    it; one that exists keeps its own. Says what the role may do beyond that, because somebody has
    granted it, or everybody, more.
    """
    settings = Settings.load()
    with explained():
        statements = rights.sql(role)
    if not apply:
        typer.echo(f"BEGIN;\n{statements}COMMIT;")
        return
    url = _url(settings)
    own = url if url and url.username == role else None
    password = own.password if own else None
    with _as_admin(settings) as engine, database.transaction(engine.connect()) as connection:
        made = rights.apply(connection, role, password)
        excess = rights.excess(connection, role)
        search = rights.search(connection, role)
    typer.echo(_made(role, made=made, password=password is not None))
    for what in rights.listed():
        typer.echo(f"granted: {what}")
    for what in excess:
        complain(f"{role} {what}, which telemetry does not need: take it from the role or PUBLIC.")
    if search and not (own and "search_path" in str(own.query.get("options"))):
        complain(
            f"The role {role} does not find the tables by itself: run {search}; as the role that"
            " made it, or as a superuser. A search_path in the URL's options does the same, but"
            " does not pass PgBouncer."
        )


def _url(settings: Settings) -> URL | None:
    """Return DATABASE_URL, if it is set."""
    url = settings.database_url
    return make_url(url.get_secret_value()) if url else None


def _made(role: str, *, made: bool, password: bool) -> str:
    if not made:
        return f"The role {role} exists; its password is as it was."
    if password:
        return f"The role {role} is made, with the password that DATABASE_URL has for it."
    return f"The role {role} is made, without a password: give it one (in psql: \\password {role})."


@command(short_help="Replace the instance id.")
def rotate(
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before replacing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replace the instance id by a new random one; what is pending is discarded.

    Done as MIGRATION_DATABASE_URL or DATABASE_URL. While telemetry is off the id is only deleted:
    the first heartbeat after that makes the new one.
    """
    settings = Settings.load()
    if not yes:
        typer.confirm(
            "This deletes the instance id, and discards the heartbeat that is pending. The next"
            " heartbeat has a new id. The old id cannot be restored. Go on?",
            abort=True,
            err=True,
        )
    with _as_admin(settings) as engine:
        result = control.rotate(engine, enabled=isinstance(settings.gate, Enabled))
    if as_json:
        print_json(asdict(result))
        return
    for sentence in _rotated(result):
        typer.echo(sentence)


def _rotated(result: Rotated) -> Iterator[str]:
    if not result.former:
        yield "There was no instance id: the first heartbeat makes one."
    for former in result.former:
        yield f"The instance id {former} is deleted."
    if result.current:
        yield f"The new one is {result.current}."
    elif result.former:
        yield "Telemetry is off: a new one is made with the first heartbeat after it is turned on."
    for day in result.discarded:
        yield f"The heartbeat of {day}, which was pending, is discarded."
    yield from _on_their_way(result.in_flight)


def _on_their_way(days: Iterable[date]) -> Iterator[str]:
    for day in days:
        yield f"The heartbeat of {day} may be on its way at this moment, and cannot be called back."


@command(short_help="Delete the instance id and all that is on record.")
def forget(
    *,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote",
            help="First have the receiver at TELEMETRY_ENDPOINT delete everything under each id"
            " that is on record here; where it does not confirm that, nothing is deleted here.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the instance id, the outbox, its attempts and the notice from this database.

    With --remote, from the receiver first. Done as MIGRATION_DATABASE_URL or DATABASE_URL. It turns
    nothing off: while telemetry is on, the notice is given anew, and the next 02:30 UTC has a
    heartbeat under a new id.
    """
    settings = Settings.load()
    if not yes:
        also = f", and from {settings.endpoint_without_query}" if remote else ""
        typer.confirm(
            "This deletes the instance id, every heartbeat on record, its attempts and the notice"
            f" from this database{also}. Go on?",
            abort=True,
            err=True,
        )
    with _as_admin(settings) as engine:
        erased = control.erase(engine, settings) if remote else []
        result = control.forget(engine)
    if as_json:
        print_json({**asdict(result), "erased": erased})
        return
    for each in erased:
        typer.echo(f"The receiver has deleted everything under {each}.")
    for sentence in _forgotten(result, erased=bool(erased)):
        typer.echo(sentence)
    if isinstance(settings.gate, Enabled):
        typer.echo("Telemetry is on: the next 02:30 UTC has a heartbeat under a new id.")


def _forgotten(result: Forgotten, *, erased: bool) -> Iterator[str]:
    for former in result.former:
        yield f"The instance id {former} is deleted."
    heartbeats, attempts = count(result.heartbeats, "heartbeat"), count(result.attempts, "attempt")
    yield f"{heartbeats} and {attempts} are deleted, and so is the notice."
    yield from _on_their_way(result.in_flight)
    if result.heartbeats and not erased:
        yield "A receiver keeps what it has: to have that deleted, tell its operator the id."
