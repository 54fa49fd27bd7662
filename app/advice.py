"""Adds to an error of the database a sentence for the log: what the operator can do about it.

SQLSTATEs and the catalogues decide, never the words of a message, which may be in any language.
"""

import re
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from app.grants import RIGHTS
from app.models import METADATA

CONSENTOS_NEEDED = "0005"
"""The revision of ConsentOS's database that creates ``instance``."""

_NOT_THERE = frozenset({"42703", "42P01"})
_FORBIDDEN = "42501"
_LACKS_A_GRANT = "aclcheck_error"
"""The function of Postgres that reports a missing grant."""

_UNMIGRATED = (
    "the tables of telemetry are missing or of another release; run `python -m app migrate` first"
)

_ALL_THERE = text(
    """
    SELECT bool_and(EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = to_regclass(needed."table") AND attname = needed."column"
            AND NOT attisdropped
    )) FROM unnest(CAST(:tables AS text[]), CAST(:columns AS text[])) AS needed ("table", "column")
    """
)
_HISTORY_WITHOUT_INSTANCE = text(
    "SELECT to_regclass('instance') IS NULL AND to_regclass('alembic_version') IS NOT NULL"
)
# The revisions of other applications are hashes; ConsentOS's are four digits.
_REVISION = text(r"SELECT max(version_num) FROM alembic_version WHERE version_num ~ '^\d{4}$'")


def advise_on_tables(connection: Connection, error: DBAPIError) -> None:
    """Add advice to an error about a missing table or column, if telemetry's own are missing.

    ``connection`` is where the error was raised; its transaction has ended.
    """
    origin: Any = error.orig
    if getattr(origin, "sqlstate", None) not in _NOT_THERE:
        return
    try:
        with connection.begin():
            sentence = _missing(connection)
    except DBAPIError:  # the role may not read the revision, or the connection is gone
        sentence = _UNMIGRATED
    if sentence:
        origin.sentence = sentence


def _missing(connection: Connection) -> str | None:
    needed = [(table.name, column.name) for table in METADATA.sorted_tables for column in table.c]
    tables, columns = zip(*needed, strict=True)
    if connection.scalar(_ALL_THERE, {"tables": [*tables], "columns": [*columns]}):
        return None
    if connection.scalar(_HISTORY_WITHOUT_INSTANCE):
        revision = connection.scalar(_REVISION)
        if revision and revision < CONSENTOS_NEEDED:
            return (
                f"ConsentOS's database is at revision {revision}, and telemetry needs"
                f" {CONSENTOS_NEEDED} or newer: upgrade ConsentOS"
            )
    return _UNMIGRATED


def advise_on_rights(error: BaseException | None) -> None:
    """Add, to an error about a right that the pipeline needs, the command that grants it."""
    origin: Any = error
    if getattr(origin, "sqlstate", None) != _FORBIDDEN or hasattr(origin, "sentence"):
        return
    message = str(origin.diag.message_primary)
    if origin.diag.source_function != _LACKS_A_GRANT:  # a policy forbids with the same SQLSTATE
        return
    if RIGHTS.keys() & set(re.findall(r"\w+", message)):  # names are the same in every language
        origin.sentence = f"{message}: run `python -m app grants --role ROLE --apply`"
