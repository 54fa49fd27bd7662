"""The commands on installs that look invented: show groups, exclude, include."""

import shlex
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import typer
from sqlalchemy import Engine

from app.collector import daily, recount, suspects, terminal
from app.collector.commands.counting import Later, after_change, database
from app.collector.suspects import Group, Match, Selector
from app.collector.terminal import AsJson, count

cli = typer.Typer()

MOST = 20
"""How many groups ``suspects`` shows."""


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("write a time as 2026-11-20T14:30Z") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Ids = Annotated[
    list[UUID] | None, typer.Option("--id", metavar="ID", help="This install; can be repeated.")
]
SeenFrom = Annotated[
    datetime | None,
    typer.Option(
        "--first-seen-from", parser=_time, metavar="TIME", help="First seen at this time or later."
    ),
]
SeenTo = Annotated[
    datetime | None,
    typer.Option(
        "--first-seen-to", parser=_time, metavar="TIME", help="First seen before this time."
    ),
]
Version = Annotated[
    str | None,
    typer.Option(
        "--version", metavar="VERSION", help="Reported this version in their last heartbeat."
    ),
]
Label = Annotated[
    str | None,
    typer.Option("--label", metavar="LABEL", help="Reported this deployment label in it."),
]
Body = Annotated[
    str | None,
    typer.Option(
        "--body", metavar="DIGEST", help="Sent the body with this digest, as `suspects` prints it."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be changed, and change nothing.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@cli.command("suspects")
def list_suspects(
    *,
    at_least: Annotated[
        int,
        typer.Option(min=2, help="How many installs of a group must be first seen within an hour."),
    ] = suspects.LEAST,
    as_json: AsJson = False,
) -> None:
    """List groups of installs that look invented.

    Each comes with the command that excludes it. The installs of a group send the same heartbeat
    except for id and time, or at least the same version and label, and many of them were first
    seen within an hour. Look at a group before you exclude it: real installs can be alike too, and
    their first heartbeats often arrive between 02:30 and 02:45 UTC.
    """
    with database() as engine, engine.connect() as connection:
        groups = suspects.groups(connection, at_least)
        more = len(groups) - MOST
        rows = [
            (group, suspects.look(connection, _selector(group)).installs) for group in groups[:MOST]
        ]
    if as_json:
        terminal.print_json(
            [
                {**group._asdict(), "would_exclude": installs, "exclude": _line(group)}
                for group, installs in rows
            ]
        )
        return
    if not rows:
        typer.echo("No group of installs looks invented.")
        return
    _print_groups(rows)
    if more > 0:
        typer.echo(f"and {count(more, 'more group')}, none of them larger")


def _print_groups(rows: list[tuple[Group, int]]) -> None:
    terminal.print_table(
        "Installs that look invented",
        (
            *("", "installs", "the same", "version", "label", "first seen from", "to"),
            *("established", "excluded", "line excludes"),
        ),
        [
            (
                *(number, group.installs, "heartbeat" if group.body else "version, label"),
                *(group.version, group.label, group.first_seen_from, group.first_seen_to),
                *(group.established, group.excluded, installs),
            )
            for number, (group, installs) in enumerate(rows, start=1)
        ],
    )
    for number, (group, _) in enumerate(rows, start=1):
        typer.echo(f"{number}. {_line(group)}")


def _selector(group: Group) -> Selector:
    """Return the selector of a group, with times in whole minutes."""
    seen = Selector(
        first_seen_from=group.first_seen_from.replace(second=0, microsecond=0),
        first_seen_to=group.first_seen_to.replace(second=0, microsecond=0) + timedelta(minutes=1),
    )
    if group.body:
        return replace(seen, body=group.body)
    return replace(seen, version=group.version, label=group.label)


def _line(group: Group) -> str:
    """Return the command that excludes a group."""
    of = _selector(group)
    options = {
        "--body": of.body,
        "--version": of.version,
        "--label": of.label,
        "--first-seen-from": of.first_seen_from and terminal.moment(of.first_seen_from),
        "--first-seen-to": of.first_seen_to and terminal.moment(of.first_seen_to),
    }
    words = [word for name, value in options.items() if value for word in (name, value)]
    return f"python -m app.collector exclude {shlex.join(words)} --why TEXT"


@cli.command()
def exclude(  # noqa: PLR0913 - each is an option
    *,
    ids: Ids = None,
    first_seen_from: SeenFrom = None,
    first_seen_to: SeenTo = None,
    version: Version = None,
    label: Label = None,
    body: Body = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="The reason, for other maintainers; required to exclude."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    later: Later = False,
    list_reasons: Annotated[
        bool, typer.Option("--list", help="List why installs are excluded, and change nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with --list.")] = False,
) -> None:
    """Take installs out of all numbers: those that match every option.

    The days on which they were counted are counted again. Nothing is deleted, their heartbeats are
    still stored, and `include` undoes it.
    """
    if list_reasons:
        _list_reasons(as_json=as_json)
        return
    chosen = _chosen(Selector(ids or (), first_seen_from, first_seen_to, version, label, body))
    if not dry_run and not (why and why.strip()):
        raise typer.BadParameter("give the reason with --why TEXT")
    with database() as engine:
        if not _agreed(engine, chosen, excluded=False, dry_run=dry_run, yes=yes):
            return
        done = suspects.exclude(engine, chosen, why or "")
        typer.echo(f"Excluded: {_installs(done)}.")
        after_change(engine, done.since, later=later)


@cli.command()
def include(  # noqa: PLR0913 - each is an option
    *,
    ids: Ids = None,
    first_seen_from: SeenFrom = None,
    first_seen_to: SeenTo = None,
    version: Version = None,
    label: Label = None,
    body: Body = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Excluded for exactly this reason: see `exclude --list`."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    later: Later = False,
) -> None:
    """Count excluded installs again: those that match every option.

    This undoes `exclude`. The days on which they count are counted again.
    """
    chosen = _chosen(Selector(ids or (), first_seen_from, first_seen_to, version, label, body, why))
    with database() as engine:
        if not _agreed(engine, chosen, excluded=True, dry_run=dry_run, yes=yes):
            return
        done = suspects.include(engine, chosen)
        typer.echo(f"Included: {_installs(done)}.")
        after_change(engine, done.since, later=later)


def _chosen(selector: Selector) -> Selector:
    if not selector:
        raise typer.BadParameter("say which installs, by --id or another option; see --help")
    return selector


def _agreed(
    engine: Engine, selector: Selector, *, excluded: bool, dry_run: bool, yes: bool
) -> bool:
    """Show what a change would affect, and ask; return whether to make it."""
    with engine.connect() as connection:
        match = suspects.look(connection, selector, excluded=excluded)
        already = suspects.look(connection, selector, excluded=not excluded).installs
        last = daily.finished(recount.clock(connection))
    typer.echo(f"{'Excluded' if excluded else 'Not excluded'} and matching: {_installs(match)}.")
    if already and selector.why is None:
        was = "not excluded" if excluded else "excluded already"
        typer.echo(f"Also matching, but {was}: {count(already, 'install')}.")
    if match.since and match.since <= last:
        typer.echo(f"This changes the days from {match.since} to {last}.")
    if dry_run or not match.installs:
        return False
    if not yes:
        typer.confirm("Include them?" if excluded else "Exclude them?", abort=True)
    return True


def _installs(match: Match) -> str:
    return f"{count(match.installs, 'install')}, {match.established:,} of them established"


def _list_reasons(*, as_json: bool) -> None:
    with database() as engine, engine.connect() as connection:
        reasons = suspects.reasons(connection)
    if as_json:
        terminal.print_json([reason._asdict() for reason in reasons])
    elif reasons:
        columns = ("why", "installs", "established", "first seen from", "to")
        terminal.print_table("Excluded installs", columns, reasons)
    else:
        typer.echo("No install is excluded.")
