"""``preview`` and ``schema``: the heartbeat that would be written now, and its JSON Schema."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from app import change, payload, report
from app.change import Change
from app.cli.entry import command, explained
from app.cli.printing import AsJson, count, print_json, to_json
from app.pipeline import Pipeline
from app.report import Preview
from app.settings import Disabled, Settings


@command(short_help="Print the body that would be written now.")
def preview(
    *,
    diff: Annotated[
        bool,
        typer.Option("--diff", help="Show only what changed since the last heartbeat sent."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the exact body that would be written now; store nothing, send nothing.

    Works whether telemetry is on or off. The body is JSON with and without --json.
    """
    settings = Settings.load()
    with explained():
        found = report.preview(Pipeline(settings), with_last_sent=diff)
    if not found.instance_known:
        typer.echo(
            "No instance id exists yet: the first heartbeat creates a random one. The preview"
            " shows the nil UUID in its place.",
            err=True,
        )
    if isinstance(settings.gate, Disabled):
        typer.echo(f"Telemetry is off, so nothing is sent: {settings.gate.reason}.", err=True)
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
        typer.echo(f"Changes since the heartbeat of {last['day']}, the last one sent:")
    else:
        typer.echo("No heartbeat has been sent from here yet, so every field is new:")
    for line in _diff_lines(changes):
        typer.echo(line)
    added, removed, changed = map(len, (changes.added, changes.removed, changes.changed))
    typer.echo(f"{count(added, 'field')} added, {removed} removed, {changed} changed.")


def _diff_lines(changes: Change) -> Iterator[str]:
    meanings = dict(payload.fields())
    for name, value in changes.added.items():
        yield f"+ {name} = {to_json(value)}    {meanings[name].description}"
    for name, value in changes.removed.items():
        yield f"- {name} = {to_json(value)}"
    for name, (before, after) in changes.changed.items():
        yield f"~ {name} = {to_json(before)} -> {to_json(after)}"


@command(short_help="Print the JSON Schema of the heartbeat.")
def schema() -> None:
    """Print the JSON Schema of the heartbeat."""
    print_json(payload.json_schema())
