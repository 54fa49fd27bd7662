"""``rotate`` and ``forget``: the instance id, replaced or deleted with all that is stored."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from typing import Annotated

import typer

from app import control
from app.cli.administrator import administrator
from app.cli.entry import command
from app.cli.printing import AsJson, count, print_json
from app.control import Forgotten, Rotated
from app.settings import Enabled, Settings


@command(short_help="Replace the instance id.")
def rotate(
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before replacing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replace the instance id with a new random one; the pending heartbeat is discarded.

    Connects with MIGRATION_DATABASE_URL, or with DATABASE_URL if that is not set. While telemetry
    is off the id is only deleted: the first heartbeat after that creates a new one.
    """
    settings = Settings.load()
    if not yes:
        typer.confirm(
            "This deletes the instance id and discards the pending heartbeat. The next heartbeat"
            " has a new id. The old id cannot be restored. Continue?",
            abort=True,
            err=True,
        )
    with administrator(settings) as engine:
        result = control.rotate(engine, enabled=isinstance(settings.gate, Enabled))
    if as_json:
        print_json(asdict(result))
        return
    for sentence in _rotated(result):
        typer.echo(sentence)


def _rotated(result: Rotated) -> Iterator[str]:
    if not result.former:
        yield "There was no instance id: the first heartbeat creates one."
    for former in result.former:
        yield f"The instance id {former} was deleted."
    if result.current:
        yield f"The new instance id is {result.current}."
    elif result.former:
        yield "Telemetry is off: the first heartbeat after it is turned on creates a new id."
    for day in result.discarded:
        yield f"The pending heartbeat of {day} was discarded."
    yield from _in_flight(result.in_flight)


def _in_flight(days: Iterable[date]) -> Iterator[str]:
    for day in days:
        yield f"The heartbeat of {day} may be in flight right now, and cannot be recalled."


@command(short_help="Delete the instance id and all stored heartbeats.")
def forget(
    *,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote",
            help="First ask the receiver at TELEMETRY_ENDPOINT to delete everything under each"
            " stored id. If it does not confirm, nothing is deleted here.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the instance id, the outbox, its attempts and the notice from this database.

    Connects with MIGRATION_DATABASE_URL, or with DATABASE_URL if that is not set. It turns nothing
    off: while telemetry is on, the notice is given again, and the next 02:30 UTC has a heartbeat
    under a new id.
    """
    settings = Settings.load()
    if not yes:
        also = f", and from {settings.endpoint_without_query}" if remote else ""
        typer.confirm(
            "This deletes the instance id, every stored heartbeat, its attempts and the notice"
            f" from this database{also}. Continue?",
            abort=True,
            err=True,
        )
    with administrator(settings) as engine:
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
        yield f"The instance id {former} was deleted."
    heartbeats, attempts = count(result.heartbeats, "heartbeat"), count(result.attempts, "attempt")
    yield f"{heartbeats}, {attempts} and the notice were deleted."
    yield from _in_flight(result.in_flight)
    if result.heartbeats and not erased:
        yield "The receiver still stores what was sent: its operator can delete it by the id."
