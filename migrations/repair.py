"""Repairs telemetry's tables after a partial restore or a manual change.

Every repair works the same way: copy the rows, drop what is left of the tables, create them with
the migrations, and restore rows and grants.
"""

from collections.abc import Callable
from typing import Any

from psycopg.errors import DependentObjectsStillExist
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

TABLES = ("telemetry_notice", "telemetry_outbox", "telemetry_attempt")
"""In the order of creation: a table comes after those that its foreign keys reference."""

PARTS = {
    "telemetry_notice": {
        "schema integer NOT NULL",
        "noticed_at timestamp with time zone NOT NULL",
        "telemetry_notice_pkey PRIMARY KEY (schema)",
    },
    "telemetry_outbox": {
        "id uuid NOT NULL",
        "day date NOT NULL",
        "instance_id uuid NOT NULL",
        "payload json NOT NULL",
        "state text NOT NULL DEFAULT 'pending'::text",
        "drains integer NOT NULL DEFAULT 0",
        "attempts integer NOT NULL DEFAULT 0",
        "created_at timestamp with time zone NOT NULL",
        "next_attempt_at timestamp with time zone NOT NULL",
        "not_before timestamp with time zone",
        "expires_at timestamp with time zone NOT NULL",
        "lease_token uuid",
        "lease_until timestamp with time zone",
        "finished_at timestamp with time zone",
        "last_error text",
        "host_revision text",
        "telemetry_outbox_pkey PRIMARY KEY (id)",
        "telemetry_outbox_day_key UNIQUE (day)",
        "telemetry_outbox_state CHECK",
        "telemetry_outbox_leased CHECK",
        "telemetry_outbox_finished CHECK",
        "telemetry_outbox_counted CHECK",
        "telemetry_outbox_pending INDEX",
        "telemetry_outbox_sending INDEX",
        "telemetry_outbox_frozen TRIGGER d0715aac988669d2d631386206fc3070",
    },
    "telemetry_attempt": {
        "outbox_id uuid NOT NULL",
        "n integer NOT NULL",
        "started_at timestamp with time zone NOT NULL",
        "finished_at timestamp with time zone",
        "outcome text",
        "http_status integer",
        "error text",
        "endpoint text NOT NULL",
        "duration_ms integer",
        "telemetry_attempt_pkey PRIMARY KEY (outbox_id, n)",
        "telemetry_attempt_outbox_id_fkey FOREIGN KEY",
        "telemetry_attempt_n_check CHECK",
        "telemetry_attempt_outcome_check CHECK",
        "telemetry_attempt_finished CHECK",
    },
}
"""Each table's columns, constraints, indexes and triggers after the newest migration. A trigger is
followed by the MD5 of its function's body."""

_FOUND = text(
    """
    SELECT relname, part FROM pg_class
    CROSS JOIN LATERAL (
        SELECT concat_ws(' ', attname, format_type(atttypid, atttypmod),
            CASE WHEN attnotnull THEN 'NOT NULL' END,
            'DEFAULT ' || pg_get_expr(adbin, adrelid))
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT conname || CASE contype WHEN 'c' THEN ' CHECK' WHEN 'f' THEN ' FOREIGN KEY'
            ELSE ' ' || pg_get_constraintdef(oid) END
        FROM pg_constraint WHERE conrelid = pg_class.oid AND contype IN ('c', 'f', 'p', 'u')
        UNION ALL
        SELECT named.relname || ' INDEX'
        FROM pg_index JOIN pg_class AS named ON named.oid = indexrelid
        WHERE indrelid = pg_class.oid AND NOT indisunique
        UNION ALL
        SELECT tgname || ' TRIGGER ' || md5(prosrc)
        FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = pg_class.oid AND NOT tgisinternal AND tgenabled IN ('O', 'A')
    ) AS parts (part)
    WHERE pg_class.oid = ANY (ARRAY(
        SELECT to_regclass(name) FROM unnest(CAST(:tables AS text[])) AS wanted (name)))
    """
)


def found(connection: Connection) -> dict[str, set[str]]:
    """Return the parts of each existing table; a disabled trigger does not count."""
    tables: dict[str, set[str]] = {}
    for table, part in connection.execute(_FOUND, {"tables": [*TABLES]}):
        tables.setdefault(table, set()).add(part)
    return tables


def missing(connection: Connection) -> list[str]:
    """Return the tables, and the parts of tables, that the database lacks."""
    there = found(connection)
    lacking = [table for table in TABLES if table not in there]
    for table in there:
        lacking += [f"{table}: {part}" for part in sorted(PARTS[table] - there[table])]
    return lacking


class NotRepairableError(Exception):
    """The tables cannot be repaired; the message says why."""


def rebuild(connection: Connection, upgrade: Callable[[], None]) -> list[str]:
    """Recreate the tables with ``upgrade``, and restore the rows and the grants that were left.

    Runs in the caller's transaction. Returns how many rows of each table were kept and removed, in
    words: an attempt without its heartbeat is removed.

    Raises:
        NotRepairableError: a row breaks a rule of its table, or something outside telemetry
            depends on a table.
    """
    left = [table for table in TABLES if _columns(connection, table)]
    _hold(connection, left)
    owner = _owner(connection, left)
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
                connection.exec_driver_sql(
                    statement
                )  # no text(): a role's name may contain a colon
    if owner:
        for table in (*TABLES, "telemetry_alembic_version"):
            connection.exec_driver_sql(f"ALTER TABLE {table} OWNER TO {owner}")
        connection.exec_driver_sql(f"ALTER FUNCTION telemetry_outbox_frozen() OWNER TO {owner}")
    return counts


def _hold(connection: Connection, tables: list[str]) -> None:
    """Lock the tables, so that nothing committed during the repair is lost.

    The outbox is locked before the attempts, the same order as everywhere.
    """
    for table in tables:
        connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))


def _owner(connection: Connection, tables: list[str]) -> str | None:
    """Return the tables' owner, quoted for SQL, unless it is the current role."""
    owners = text(
        "SELECT relowner::regrole::text FROM pg_class WHERE oid = to_regclass(:table)"
        " AND relowner <> (SELECT oid FROM pg_roles WHERE rolname = current_user)"
    )
    found = (connection.scalar(owners, {"table": table}) for table in tables)
    return next(filter(None, found), None)


def clear(connection: Connection) -> None:
    """Drop what is left of telemetry's tables."""
    try:
        connection.execute(text(f"DROP TABLE IF EXISTS {', '.join(reversed(TABLES))}"))
    except DBAPIError as error:
        if not isinstance(error.orig, DependentObjectsStillExist):
            raise
        reason = "something else, such as a view, depends on its tables"
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
    """Fill a new table with its copied rows; return how many were kept and removed, in words."""
    kept = set(_columns(connection, f"kept_{table}"))
    names = ", ".join(name for name in _columns(connection, table) if name in kept)
    fits = " WHERE outbox_id IN (SELECT id FROM telemetry_outbox)" * (table == TABLES[-1])
    # The names come from the catalogue, for a table that a migration has just created.
    fill = f"INSERT INTO {table} ({names}) SELECT {names} FROM kept_{table}{fits}"  # noqa: S608 - see above
    try:
        stored = connection.execute(text(fill)).rowcount
    except DBAPIError as error:
        broken: Any = error.orig
        rule = broken.diag.constraint_name or f"the type or the rule of {broken.diag.column_name}"
        raise NotRepairableError(f"a row of {table} breaks {rule}") from error
    left_out = f"SELECT count(*) - :n FROM kept_{table}"  # noqa: S608 - see above
    removed = connection.scalar(text(left_out), {"n": stored})
    connection.execute(text(f"DROP TABLE kept_{table}"))
    rows = "1 row" if stored == 1 else f"{stored} rows"
    return f"{table}: {rows} kept" + (f", {removed} removed" if removed else "")


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
    """Return each granted column, None for the whole table, and the statement that grants it."""
    found = connection.execute(_GRANTED, {"table": table})
    return [(column, statement) for column, statement in found]
