"""What telemetry's migrations ask of ConsentOS's database before they make a table in it."""

import re

from sqlalchemy import Connection, text

NEEDED = "0005"
"""The revision that makes ConsentOS's table ``instance``, with a bare CREATE TABLE: if the table is
there already, none of ConsentOS's migrations succeeds."""

OURS = "made by consentos-telemetry"
"""The comment of an ``instance`` that the first release of telemetry made without a ConsentOS."""

AGAIN = "run ConsentOS's own migrations first, then this again."


def give_back_instance(connection: Connection) -> str | None:
    """Drop an ``instance`` of our own making, which keeps ConsentOS from being installed.

    Returns what was done, and what to do now, or None if there is no such table.
    """
    comment = text("SELECT obj_description(to_regclass('instance'), 'pg_class')")
    if connection.scalar(comment) != OURS or (_revision(connection) or "") >= NEEDED:
        return None
    if connection.scalar(text("SELECT count(*) FROM instance")):
        return (
            "An earlier release of telemetry made the table 'instance', which keeps ConsentOS from"
            f" being installed, and it holds rows: drop it, {AGAIN}"
        )
    connection.execute(text("DROP TABLE instance"))
    return (
        "The table 'instance', which an earlier release of telemetry made and which keeps ConsentOS"
        f" from being installed, has been dropped: {AGAIN}"
    )


def unready(connection: Connection) -> str | None:
    """Return why telemetry's tables cannot be made here yet, and what to do, or None."""
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
    """Return ConsentOS's revision, or None if this is not a history of ConsentOS's."""
    if not _exists(connection, "alembic_version"):
        return None
    found = connection.scalars(text("SELECT version_num FROM alembic_version")).all()
    # The revisions of other applications are hashes; ConsentOS's are four digits.
    return max((each for each in found if re.fullmatch(r"\d{4}", each)), default=None)


def _exists(connection: Connection, table: str) -> bool:
    return bool(connection.scalar(text("SELECT to_regclass(:t) IS NOT NULL"), {"t": table}))
