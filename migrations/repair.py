"""Telemetry's tables after a partial restore or a careless hand, made whole again.

Whatever is missing, one way mends it: what the tables hold is set aside, what is left of them is
dropped, the migrations make them anew, and rows and grants go back in.
"""

from collections.abc import Callable
from typing import Any

from psycopg.errors import DependentObjectsStillExist
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError

TABLES = ("telemetry_notice", "telemetry_outbox", "telemetry_attempt")
"""A table stands after those that its foreign keys name."""

PARTS = {
    "telemetry_notice": {"schema", "noticed_at", "telemetry_notice_pkey"},
    "telemetry_outbox": {
        "id", "day", "instance_id", "payload", "state", "drains", "attempts", "created_at",
        "next_attempt_at", "not_before", "expires_at", "lease_token", "lease_until", "finished_at",
        "last_error", "host_revision", "telemetry_outbox_pkey", "telemetry_outbox_day_key",
        "telemetry_outbox_state", "telemetry_outbox_leased", "telemetry_outbox_finished",
        "telemetry_outbox_counted", "telemetry_outbox_pending", "telemetry_outbox_sending",
        "telemetry_outbox_frozen",
    },
    "telemetry_attempt": {
        "outbox_id", "n", "started_at", "finished_at", "outcome", "http_status", "error",
        "endpoint", "duration_ms", "telemetry_attempt_pkey", "telemetry_attempt_outbox_id_fkey",
        "telemetry_attempt_n_check", "telemetry_attempt_outcome_check",
        "telemetry_attempt_finished",
    },
}  # fmt: skip
"""Each table's columns, constraints, indexes and triggers after the newest migration."""

_FOUND = text(
    """
    SELECT relname, part FROM pg_class
    CROSS JOIN LATERAL (
        SELECT attname FROM pg_attribute WHERE attrelid = pg_class.oid AND NOT attisdropped
        UNION ALL SELECT conname FROM pg_constraint WHERE conrelid = pg_class.oid
        UNION ALL SELECT relname FROM pg_index AS i JOIN pg_class AS named ON named.oid = indexrelid
            WHERE i.indrelid = pg_class.oid
        UNION ALL SELECT tgname FROM pg_trigger
            WHERE tgrelid = pg_class.oid AND tgenabled IN ('O', 'A')
    ) AS parts (part)
    WHERE pg_class.oid = ANY (ARRAY(
        SELECT to_regclass(name) FROM unnest(CAST(:tables AS text[])) AS wanted (name)))
    """
)


def found(connection: Connection) -> dict[str, set[str]]:
    """Return the parts of each table that there is; a trigger that is disabled is none."""
    tables: dict[str, set[str]] = {}
    for table, part in connection.execute(_FOUND, {"tables": [*TABLES]}):
        tables.setdefault(table, set()).add(part)
    return tables


def missing(connection: Connection) -> list[str]:
    """Return what the newest migration makes and the database lacks: a table, or ``table.part``."""
    there = found(connection)
    lacking = [table for table in TABLES if table not in there]
    for table in there:
        lacking += [f"{table}.{part}" for part in sorted(PARTS[table] - there[table])]
    return lacking


class NotRepairableError(Exception):
    """The tables cannot be made anew; the message says why."""


def rebuild(connection: Connection, upgrade: Callable[[], None]) -> list[str]:
    """Make the tables anew by ``upgrade``, with the rows and the grants that were left.

    Runs in the caller's transaction. Returns how many rows of each table were kept and removed, in
    words: an attempt whose heartbeat is gone has nothing to belong to.

    Raises:
        NotRepairableError: a row that is left breaks a rule of its table, or something that is not
            telemetry's depends on a table.
    """
    left = [table for table in TABLES if _columns(connection, table)]
    granted = {table: _grants(connection, table) for table in left}
    for table in left:
        connection.execute(text(f"CREATE TEMP TABLE kept_{table} AS TABLE {table}"))
    clear(connection)
    upgrade()
    counts = [_put_back(connection, table) for table in left]
    for table, grants in granted.items():
        columns = {None, *_columns(connection, table)}
        for column, statement in grants:
            if column in columns:
                connection.exec_driver_sql(statement)  # a role's name may hold a colon
    return counts


def clear(connection: Connection) -> None:
    """Drop whatever is left of telemetry's tables."""
    try:
        connection.execute(text(f"DROP TABLE IF EXISTS {', '.join(reversed(TABLES))}"))
    except DBAPIError as error:
        if not isinstance(error.orig, DependentObjectsStillExist):
            raise
        reason = "something that is not telemetry's, such as a view, depends on its tables"
        raise NotRepairableError(reason) from error
    connection.execute(text("DROP TABLE IF EXISTS telemetry_alembic_version"))
    connection.execute(text("DROP FUNCTION IF EXISTS telemetry_outbox_frozen()"))


def _columns(connection: Connection, table: str) -> list[str]:
    columns = text(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:table)"
        " AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    return [*connection.scalars(columns, {"table": table})]


def _put_back(connection: Connection, table: str) -> str:
    """Fill a table that was just made from what was set aside; say how many rows it has kept."""
    kept = set(_columns(connection, f"kept_{table}"))
    names = ", ".join(name for name in _columns(connection, table) if name in kept)
    fits = " WHERE outbox_id IN (SELECT id FROM telemetry_outbox)" * (table == TABLES[-1])
    # The names are those of a table that a migration has just made.
    fill = f"INSERT INTO {table} ({names}) SELECT {names} FROM kept_{table}{fits}"  # noqa: S608
    try:
        stored = connection.execute(text(fill)).rowcount
    except IntegrityError as error:
        broken: Any = error.orig
        rule = broken.diag.constraint_name or f"{broken.diag.column_name}, which must be set"
        raise NotRepairableError(f"a row of {table} breaks {rule}") from error
    removed = connection.scalar(text(f"SELECT count(*) - :n FROM kept_{table}"), {"n": stored})  # noqa: S608
    connection.execute(text(f"DROP TABLE kept_{table}"))
    return f"{table}: {stored} rows kept" + (f", {removed} removed" if removed else "")


_GRANTED = text(
    """
    SELECT attname, format(
        'GRANT %s %s ON %s TO %s', privilege_type, '(' || quote_ident(attname) || ')', relname,
        CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
    FROM pg_class
    CROSS JOIN LATERAL (
        SELECT NULL AS attname, relacl AS acl
        UNION ALL SELECT attname, attacl FROM pg_attribute
            WHERE attrelid = pg_class.oid AND NOT attisdropped
    ) AS granted
    CROSS JOIN LATERAL aclexplode(acl)
    WHERE pg_class.oid = to_regclass(:table) AND grantee <> relowner
    """
)


def _grants(connection: Connection, table: str) -> list[tuple[str | None, str]]:
    """Return each column, or None for the whole table, with the statement that grants it again."""
    found = connection.execute(_GRANTED, {"table": table})
    return [(column, statement) for column, statement in found]
