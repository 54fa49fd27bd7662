"""What ConsentOS's database must have before telemetry's migrations create a table in it."""

import re

from sqlalchemy import Connection, text

NEEDED = "0005"
"""The revision that creates ConsentOS's table ``instance``, with a bare CREATE TABLE: if the table
exists already, ConsentOS's migrations fail."""

OURS = "made by consentos-telemetry"
"""The comment on an ``instance`` that telemetry's first release created without ConsentOS."""

AGAIN = "run ConsentOS's own migrations first, then this again."


def give_back_instance(connection: Connection) -> str | None:
    """Drop an ``instance`` that telemetry created: it prevents ConsentOS from being installed.

    Returns what was done and what to do now, or None if there is no such table.
    """
    comment = text("SELECT obj_description(to_regclass('instance'), 'pg_class')")
    if connection.scalar(comment) != OURS or (_revision(connection) or "") >= NEEDED:
        return None
    if connection.scalar(text("SELECT count(*) FROM instance")):
        return (
            "An earlier release of telemetry created the table 'instance', which prevents ConsentOS"
            f" from being installed, and it has rows: drop it, {AGAIN}"
        )
    connection.execute(text("DROP TABLE instance"))
    return (
        "The table 'instance' was dropped. An earlier release of telemetry created it, and it"
        f" prevented ConsentOS from being installed: {AGAIN}"
    )


def unready(connection: Connection) -> str | None:
    """Return why telemetry's tables cannot be created here yet, and what to do, or None."""
    revision = _revision(connection)
    if revision and revision < NEEDED:
        return (
            f"ConsentOS's database is at revision {revision}, and telemetry needs {NEEDED} or"
            f" newer: upgrade ConsentOS; {AGAIN}"
        )
    if _exists(connection, "instance"):
        return None
    if revision:
        return (
            f"ConsentOS's database is at revision {revision}, but its table 'instance' is missing:"
            " restore it, then run this again."
        )
    return f"ConsentOS has not been migrated in this database yet: {AGAIN}"


def _revision(connection: Connection) -> str | None:
    """Return ConsentOS's revision, or None if ``alembic_version`` is missing or not ConsentOS's."""
    if not _exists(connection, "alembic_version"):
        return None
    found = connection.scalars(text("SELECT version_num FROM alembic_version")).all()
    # The revisions of other applications are hashes; ConsentOS's are four digits.
    return max((each for each in found if re.fullmatch(r"\d{4}", each)), default=None)


def _exists(connection: Connection, table: str) -> bool:
    return bool(connection.scalar(text("SELECT to_regclass(:t) IS NOT NULL"), {"t": table}))
