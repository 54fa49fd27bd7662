"""``migrate`` and ``grants``: telemetry's tables, and the database role that works on them."""

from typing import Annotated

import typer
from sqlalchemy import URL, make_url

from app import database
from app import grants as rights
from app.cli.administrator import administrator
from app.cli.entry import command, complain, explained
from app.settings import Settings
from migrations import migrate


@command(name="migrate", short_help="Create, upgrade or repair telemetry's tables.")
def migrate_command(
    *,
    down: Annotated[
        bool, typer.Option("--down", help="Remove telemetry's tables, the outbox included.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing.")] = False,
) -> None:
    """Create, upgrade or repair telemetry's tables.

    Connects with MIGRATION_DATABASE_URL, or with DATABASE_URL if that is not set. Refuses, and
    creates nothing, until ConsentOS's own migrations have run. Repairs tables that a partial
    restore left incomplete, and keeps their rows. ConsentOS's own tables and its alembic_version
    are never touched. Exits with 0 if the tables are complete, and with 1 and a reason if not.
    """
    settings = Settings.load()
    if down and not yes:
        typer.confirm(
            "This deletes the outbox, its attempts and the notice. Continue?", abort=True, err=True
        )
    url = _url(settings)
    role = url.username if url else None
    with administrator(settings) as engine, engine.connect() as connection:
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


@command(short_help="Create the database role of the pipeline, or print its SQL.")
def grants(
    *,
    role: Annotated[str, typer.Option(help="The role that the pipeline logs in as.")],
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Run the SQL, with MIGRATION_DATABASE_URL or DATABASE_URL. Run `migrate` first.",
        ),
    ] = False,
) -> None:
    """Print the SQL for a login role with only the rights that the pipeline needs.

    With --apply, run it: a missing role is created, with the password from DATABASE_URL if that
    names the role; an existing role keeps its password. Never revokes: lists any extra rights of
    the role, its own or those of PUBLIC.
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
    with administrator(settings) as engine, database.transaction(engine.connect()) as connection:
        created = rights.apply(connection, role, password)
        excess = rights.excess(connection, role)
        search = rights.search(connection, role)
    typer.echo(_applied(role, created=created, password=password is not None))
    for right in rights.listed():
        typer.echo(f"granted: {right}")
    for extra in excess:
        complain(
            f"{role} {extra}, which telemetry does not need: revoke it from the role or PUBLIC."
        )
    if search and not (own and "search_path" in str(own.query.get("options"))):
        complain(
            f"The role {role} does not find the tables: run {search}; as the role that created it,"
            " or as a superuser. A search_path in the URL's options works too, but not through"
            " PgBouncer."
        )


def _url(settings: Settings) -> URL | None:
    """Return DATABASE_URL, if it is set."""
    url = settings.database_url
    return make_url(url.get_secret_value()) if url else None


def _applied(role: str, *, created: bool, password: bool) -> str:
    if not created:
        return f"The role {role} exists; its password is unchanged."
    if password:
        return f"The role {role} was created, with the password from DATABASE_URL."
    return f"The role {role} was created without a password: set one (psql: \\password {role})."
