"""The commands on the list of releases, and on values that are not listed."""

from datetime import date
from typing import Annotated

import typer

from app.collector import recount, releases, terminal
from app.collector.commands.counting import Later, NotDoneError, after_change, database, day
from app.collector.releases import NotAReleaseError, Unlisted
from app.collector.terminal import AsJson, count

cli = typer.Typer()
list_cli = typer.Typer(no_args_is_help=True)
cli.add_typer(list_cli, name="releases", help="Add, list or remove versions that the numbers name.")

Version = Annotated[str, typer.Argument(help="As heartbeats report it, such as 0.9.0.")]


@list_cli.command()
def add(
    version: Version,
    on: Annotated[
        date, typer.Option(parser=day, metavar="DAY", help="The day of the release (UTC).")
    ],
    *,
    later: Later = False,
) -> None:
    """Name a version in the numbers, from the day of its release on.

    Anybody can send any version, so the numbers name only those on this list. All others are
    counted as "other". Past days are counted again, so that they name the version too. If
    the version is already listed, its date is changed.
    """
    with database() as engine:
        try:
            with engine.begin() as connection:
                since = releases.add(connection, version, on)
                if since:
                    recount.request(connection, since)
        except NotAReleaseError as error:
            raise typer.BadParameter(str(error)) from None
        if since is None:
            typer.echo(f"{version} is already listed as released on {on}.")
            return
        typer.echo(f"{version} is named from {on} on.")
        after_change(engine, since, later=later)


@list_cli.command("list")
def list_releases(*, as_json: AsJson = False) -> None:
    """List the versions that the numbers name, the newest first."""
    with database() as engine, engine.connect() as connection:
        listed = releases.listed(connection)
    if as_json:
        terminal.print_json([release._asdict() for release in listed])
    elif listed:
        terminal.print_table("Releases", ("version", "released on"), listed)
    else:
        typer.echo("No release is listed: every version is counted as other.")


@list_cli.command()
def remove(version: Version, *, later: Later = False) -> None:
    """Take a version off the list.

    It is then counted as "other". Past days are counted again, so it is no longer named there.
    """
    with database() as engine:
        with engine.begin() as connection:
            since = releases.remove(connection, version)
            if since:
                recount.request(connection, since)
        if since is None:
            raise NotDoneError("This version is not listed.")
        typer.echo(f"{version} is counted as other.")
        after_change(engine, since, later=later)


@cli.command()
def unlisted(*, as_json: AsJson = False) -> None:
    """Show which values are counted as "other" now.

    These are versions, deployment labels, and versions of Python and Postgres that are not listed.
    Strangers can write them, so they are only shown in your terminal, never on the page.
    Only established installs that reported within 48 hours are counted.
    """
    with database() as engine, engine.connect() as connection:
        found = releases.unlisted(connection)
        dev_builds = releases.dev_builds(connection)
    if as_json:
        fields = {field: _as_object(of) for field, of in found.items()}
        terminal.print_json({"fields": fields, "dev_builds": dev_builds})
        return
    for field, of in found.items():
        _print_field(field, of)
    typer.echo(f"Development builds, which are counted separately: {count(dev_builds, 'install')}.")
    if versions := found["version"].values:
        typer.echo("To name a version that you have released, with the day of its release:")
        typer.echo(f"  python -m app.collector releases add {versions[0][0]} --on YYYY-MM-DD")


def _as_object(of: Unlisted) -> dict[str, object]:
    values = [{"value": value, "installs": installs} for value, installs in of.values]
    return {**of._asdict(), "values": values}


def _print_field(field: str, of: Unlisted) -> None:
    if not of.values:
        typer.echo(f"{field}: every value is listed.")
        return
    terminal.print_table(f"{field}, counted as other", ("value", "installs"), of.values)
    if of.more_values:
        installs = count(of.more_installs, "install")
        typer.echo(f"and {count(of.more_values, 'more value')} on {installs}")
