"""What an operator can do about an error of the database: a sentence on the error, for the log.

SQLSTATEs and the catalogues decide, never a message's words: the server may speak any language.
"""

import re
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from app.grants import RIGHTS
from app.models import METADATA

CONSENTOS_NEEDED = "0005"
"""The revision of ConsentOS's database that makes ``instance``."""

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
    """Say on an error about a missing table or column what to do, if telemetry's own are missing.

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
    """Say on an error about a right that the pipeline needs which command grants it."""
    origin: Any = error
    if getattr(origin, "sqlstate", None) != _FORBIDDEN or hasattr(origin, "sentence"):
        return
    told = str(origin.diag.message_primary)
    if origin.diag.source_function != _LACKS_A_GRANT:  # a policy, too, forbids
        return
    if RIGHTS.keys() & set(re.findall(r"\w+", told)):  # names are the same in every language
        origin.sentence = f"{told}: run `python -m app grants --role ROLE --apply`"
