"""The command ``recount``, and the recount at the end of other commands."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Annotated

import typer
from sqlalchemy import Connection, Engine

from app.collector import daily, recount, store, terminal
from app.collector.recount import Progress
from app.collector.terminal import AsJson
from app.settings.collector import CollectorSettings

cli = typer.Typer()


class NotDoneError(Exception):
    """A command has not done its work; the message is one sentence."""


@contextmanager
def database() -> Iterator[Engine]:
    """Use the database of COLLECTOR_DATABASE_URL, and close every connection at the end.

    Raises:
        SettingsError: the variable is missing or wrong.
    """
    engine = store.connect(CollectorSettings.load().require("collector_database_url"))
    try:
        yield engine
    finally:
        engine.dispose()


def day(text: str) -> date:
    """Return the day that an option names."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("write a day as 2026-11-20") from None


Later = Annotated[
    bool,
    typer.Option(
        "--later", help="Leave the recount to a web process, which begins within a minute."
    ),
]


@cli.command("recount")
def count_again(
    since: Annotated[
        date | None,
        typer.Option(
            parser=day,
            metavar="DAY",
            help="The first day to count again; by default the first possible one.",
        ),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Count past days again, from the heartbeats that are stored.

    Each day is committed separately. If this is stopped, run it again: it continues where it
    stopped. A web process also continues it within a minute; both may run at the same time.
    """
    began = time.monotonic()
    with database() as engine:
        with engine.begin() as connection:
            first, possible, last = _request(connection, since)
        if not as_json:
            typer.echo(_plan(first, possible, last))
        _finish(engine)
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        counted = {"since": max(first, possible), "until": last, "seconds": seconds}
        terminal.print_json(counted)
    else:
        typer.echo(f"Done in {seconds} s.")


def _request(connection: Connection, since: date | None) -> tuple[date, date, date]:
    """Request a recount, unless a running one includes these days.

    Return the first requested day, the first possible one, and the last.

    Raises:
        NotDoneError: no heartbeat is stored.
    """
    possible = recount.earliest(connection)
    if possible is None:
        raise NotDoneError("No heartbeat is stored: no day can be counted again.")
    since = since or possible
    under_way = recount.progress(connection)
    if not under_way or max(since, possible) < under_way.since:
        recount.request(connection, since)
    return since, possible, daily.finished(recount.clock(connection))


def after_change(engine: Engine, since: date | None, *, later: bool) -> None:
    """Finish the recount that a change has requested, of the days from ``since`` on.

    If ``later``, leave it to a web process. ``since`` is ``None`` if the change affects no day.
    """
    with engine.connect() as connection:
        possible = recount.earliest(connection)
        last = daily.finished(recount.clock(connection))
    if since is None or possible is None:
        typer.echo("No day has to be counted again.")
        return
    typer.echo(_plan(since, possible, last))
    if max(since, possible) > last:
        recount.step(engine)  # removes the request
        return
    if later:
        typer.echo("A web process begins within a minute.")
        return
    _finish(engine)
    typer.echo("Done.")


def _plan(since: date, possible: date, last: date) -> str:
    """Return which days are counted again, and why earlier ones are not."""
    first = max(since, possible)
    if first > last:
        plan = "No finished day has to be counted again."
    else:
        plan = f"The days from {first} to {last} are counted again."
    if since < possible:
        plan += (
            f" Earlier days keep their numbers: not all of the heartbeats that a count before"
            f" {possible} needs are stored any more."
        )
    return plan


def _finish(engine: Engine) -> None:
    """Count until no recount is running, and show the progress."""
    shown: Progress | None = None
    with terminal.progress("recount") as show:
        for come in recount.finish(engine):
            if come != shown:
                show(_step(come), come.share)
            shown = come


def _step(come: Progress) -> str:
    if come.replayed is None:
        return f"from {come.since - recount.BEFORE} on"
    return f"{come.replayed} {'counted' if come.replayed >= come.since else 'read'}"
