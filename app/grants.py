"""The database rights that the pipeline needs, for a role that has no others.

``RIGHTS`` is the complete list: of ConsentOS's columns only those that are counted, and no change
of a stored payload. A test removes each right in turn and checks that the pipeline needs it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psycopg
from sqlalchemy import Connection, Row, text

WHOLE: tuple[str, ...] = ()
"""All columns, those of later migrations too; also used for DELETE, which has no columns."""

RIGHTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "organisations": {"SELECT": ("deleted_at",)},
    "users": {"SELECT": ("deleted_at",)},
    "sites": {"SELECT": ("id", "organisation_id", "site_group_id", "is_active", "deleted_at")},
    "site_configs": {"SELECT": ("site_id", "tcf_enabled", "blocking_mode", "scan_schedule_cron")},
    "site_group_configs": {"SELECT": ("site_group_id", "tcf_enabled", "blocking_mode")},
    "org_configs": {"SELECT": ("organisation_id", "tcf_enabled", "blocking_mode")},
    "scan_jobs": {"SELECT": ("created_at",)},
    "consent_records": {"SELECT": ("consented_at",)},
    "alembic_version": {"SELECT": ("version_num",)},
    "instance": {
        "SELECT": ("id", "created_at", "updated_at", "last_telemetry_at"),
        "INSERT": ("id", "created_at", "updated_at"),
        "UPDATE": ("updated_at", "last_telemetry_at"),
    },
    "telemetry_notice": {
        "SELECT": WHOLE,
        "INSERT": ("schema", "noticed_at"),
        "UPDATE": ("noticed_at",),
    },
    "telemetry_outbox": {
        "SELECT": WHOLE,
        "INSERT": (
            "id",
            "day",
            "instance_id",
            "payload",
            "created_at",
            "next_attempt_at",
            "expires_at",
            "host_revision",
        ),
        "UPDATE": (
            "state",
            "drains",
            "attempts",
            "next_attempt_at",
            "not_before",
            "lease_token",
            "lease_until",
            "finished_at",
            "last_error",
        ),
        "DELETE": WHOLE,
    },
    "telemetry_attempt": {
        "SELECT": WHOLE,
        "INSERT": ("outbox_id", "n", "started_at", "endpoint"),
        "UPDATE": ("finished_at", "outcome", "http_status", "error", "duration_ms"),
    },
}

_NAME = re.compile(r"(?!public$|none$|pg_)[A-Za-z_][A-Za-z0-9_-]{0,62}", re.ASCII)


class RoleError(Exception):
    """The rights cannot be granted to a role; the message says why and what to do."""


class RoleNameError(RoleError):
    """The name of a role is invalid, or has a special meaning in SQL."""


def sql(role: str) -> str:
    """Return the SQL that creates ``role`` if it is missing, and grants it its rights.

    Raises:
        RoleNameError: the name cannot be quoted safely, or has a special meaning.
    """
    if not _NAME.fullmatch(role):
        raise RoleNameError(
            "The role's name must have 1 to 63 of the characters A-Z, a-z, 0-9, _ and -, must begin"
            " with a letter or _, and must not be public or none, or begin with pg_."
        )
    grants = "\n".join(f"GRANT {what} TO {_quoted(role)};" for what in listed())
    tables = ", ".join(f"'{table}'" for table in RIGHTS)
    # The name was checked above, and the table names are constants.
    return f"""\
DO $$
DECLARE
    needed regnamespace;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
        CREATE ROLE {_quoted(role)} LOGIN;
    END IF;
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), '{role}');
    FOR needed IN
        SELECT DISTINCT relnamespace::regnamespace FROM pg_class
        JOIN unnest(ARRAY[{tables}]) AS "table" ON pg_class.oid = to_regclass("table")
    LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', needed, '{role}');
    END LOOP;
END
$$;
{grants}
"""  # noqa: S608 - the name was checked, and the table names are constants


def listed() -> Iterator[str]:
    """Yield the rights granted on each table, as SQL."""
    for table, rights in RIGHTS.items():
        yield f"{', '.join(_right(*each) for each in rights.items())} ON {table}"


def _right(privilege: str, columns: Iterable[str]) -> str:
    names = ", ".join(columns)
    return f"{privilege} ({names})" if names else privilege


def _quoted(name: str) -> str:
    return f'"{name}"'


def apply(connection: Connection, role: str, password: str | None) -> bool:
    """Grant ``role`` its rights in the caller's transaction; return whether the role was created.

    Only a new role gets the password, and the server receives only a SCRAM hash of it.

    Raises:
        RoleError: grants cannot restrict this role, it cannot log in, or a right was not granted.
    """
    statements = sql(role)
    exists = _role(connection, role)
    if exists and (exists.rolsuper or _owned(connection, exists.oid) & RIGHTS.keys()):
        what = "is a superuser" if exists.rolsuper else "owns tables that it must not change"
        raise RoleError(f"{role} {what}, so grants cannot restrict it: use a separate role.")
    if exists and not exists.rolcanlogin:
        raise RoleError(f"{role} cannot log in: run ALTER ROLE {_quoted(role)} LOGIN.")
    # Without parameters, because psycopg then accepts several statements.
    connection.exec_driver_sql(statements, execution_options={"no_parameters": True})
    if not exists and password:
        connection.exec_driver_sql(
            f"ALTER ROLE {_quoted(role)} PASSWORD '{_verifier(connection, role, password)}'",
            execution_options={"no_parameters": True},
        )
    if tables := ", ".join(lacking(connection, role)):
        raise RoleError(
            f"No rights could be granted on {tables}: MIGRATION_DATABASE_URL must name their owner."
        )
    return not exists


def lacking(connection: Connection, role: str | None = None) -> list[str]:
    """Return the tables on which ``role``, by default the one that logged in, lacks a right.

    A missing role lacks no right, and a missing table is not listed.
    """
    known = _role(connection, role)
    return [*connection.scalars(_LACKING, _every_right(known.rolname))] if known else []


# Postgres only warns if a role grants a right that it cannot grant.
_LACKING = text(
    """
    SELECT DISTINCT held.table
    FROM unnest(
        CAST(:tables AS text[]), CAST(:privileges AS text[]), CAST(:columns AS text[])
    ) AS held ("table", privilege, "column")
    JOIN pg_class ON pg_class.oid = to_regclass(held.table)
    WHERE NOT has_schema_privilege(:role, relnamespace, 'USAGE')
       OR NOT CASE WHEN held.column = ''
          THEN has_table_privilege(:role, pg_class.oid, privilege)
          -- A missing column is reported when it is read.
          WHEN NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid
              AND attname = held.column AND NOT attisdropped) THEN true
          ELSE has_column_privilege(:role, pg_class.oid, held.column, privilege) END
    ORDER BY 1
    """
)


def _every_right(role: str) -> dict[str, Any]:
    rights = [
        (table, privilege, column)
        for table, privileges in RIGHTS.items()
        for privilege, columns in privileges.items()
        for column in columns or [""]
    ]
    tables, privileges, columns = (list(each) for each in zip(*rights, strict=True))
    return {"role": role, "tables": tables, "privileges": privileges, "columns": columns}


def schemas(connection: Connection) -> list[str]:
    """Return the schemas in which this connection finds the tables."""
    return [*connection.scalars(_PLACES, {"tables": [*RIGHTS]})]


_PLACES = text(
    "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class"
    " JOIN unnest(CAST(:tables AS text[])) AS t ON pg_class.oid = to_regclass(t) ORDER BY 1"
)


def unsearched(connection: Connection, role: str) -> list[str]:
    """Return the schemas of the tables that are not in the search_path of ``role``."""
    found = connection.scalar(_SEARCH_PATH, {"role": role}) or '"$user", public'
    path = {name.strip().strip('"').replace("$user", role) for name in found.split(",")}
    return [name for name in schemas(connection) if name.strip('"') not in path]


def search(connection: Connection, role: str) -> str | None:
    """Return the SQL that sets the search_path of ``role``; None if it already finds the tables."""
    missing = unsearched(connection, role)
    path = [*missing, *(name for name in schemas(connection) if name not in missing)]
    return f"ALTER ROLE {_quoted(role)} SET search_path = {', '.join(path)}" if missing else None


# Precedence: the role in this database, the role, the database, all.
_SEARCH_PATH = text(
    """
    SELECT substr(setting, length('search_path=') + 1)
    FROM pg_db_role_setting, unnest(setconfig) AS setting
    WHERE setting LIKE 'search\\_path=%'
      AND setrole IN (0, to_regrole(quote_ident(:role)))
      AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    ORDER BY setrole = 0, setdatabase = 0
    LIMIT 1
    """
)


def _verifier(connection: Connection, role: str, password: str) -> str:
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 - narrows the type; no other driver is used
    made = driver.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
    return made.decode("ascii")


_ROLE = text(
    "SELECT oid, rolname, rolsuper, rolcanlogin, rolcreaterole, rolcreatedb, rolreplication,"
    " rolbypassrls FROM pg_roles WHERE rolname = coalesce(CAST(:role AS text), session_user)"
)
_ATTRIBUTES = {
    "rolcreaterole": "may create roles",
    "rolcreatedb": "may create databases",
    "rolreplication": "may replicate the whole server",
    "rolbypassrls": "bypasses row security",
}
_GROUPS = text(
    "SELECT rolname FROM pg_roles WHERE oid <> :oid AND pg_has_role(:oid, oid, 'MEMBER')"
    " ORDER BY rolname"
)
_OWNED = text(
    """
    SELECT relname FROM pg_class
    WHERE relowner = :oid AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
      AND relnamespace::regnamespace::text !~ '^(pg_.*|information_schema)$'
    UNION ALL
    SELECT proname FROM pg_proc WHERE proowner = :oid
    """
)
# Skips what belongs to an extension, such as a statistics view: it is granted to PUBLIC by default.
_HELD = text(
    """
    WITH relation AS (
        SELECT oid, relname, relkind, pg_table_is_visible(oid) AS visible FROM pg_class
        WHERE relowner <> :oid AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
          AND relnamespace::regnamespace::text !~ '^(pg_.*|information_schema)$'
          AND has_schema_privilege(:oid, relnamespace, 'USAGE')
          AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass
              AND objid = pg_class.oid AND deptype = 'e')
    )
    SELECT relname, visible, privilege, attname,
        has_table_privilege(:oid, relation.oid, privilege) AS whole
    FROM relation
    JOIN pg_attribute ON attrelid = relation.oid AND attnum > 0 AND NOT attisdropped
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
    WHERE has_column_privilege(:oid, relation.oid, attnum, privilege)
    UNION ALL
    SELECT relname, visible, privilege, NULL, true
    FROM relation
    CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER'] || CASE
        WHEN current_setting('server_version_num')::integer >= 170000 THEN ARRAY['MAINTAIN']
        ELSE '{}' END) AS privilege
    WHERE has_table_privilege(:oid, relation.oid, privilege)
    UNION ALL
    SELECT relname, visible, 'USAGE', NULL, true
    FROM relation
    WHERE CASE relkind WHEN 'S' THEN has_sequence_privilege(:oid, oid, 'USAGE') ELSE false END
    ORDER BY relname, privilege, attname
    """
)
_LENT = text(
    """
    SELECT proname FROM pg_proc
    WHERE prosecdef AND proowner <> :oid AND has_function_privilege(:oid, oid, 'EXECUTE')
      AND pronamespace::regnamespace::text !~ '^(pg_.*|information_schema)$'
      AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass
          AND objid = pg_proc.oid AND deptype = 'e')
    ORDER BY proname
    """
)
_PLACES_TO_CREATE = text(
    """
    SELECT 'schemas' WHERE has_database_privilege(:oid, current_database(), 'CREATE')
    UNION ALL
    SELECT 'tables in ' || nspname FROM pg_namespace
    WHERE nspname !~ '^pg_' AND has_schema_privilege(:oid, oid, 'CREATE')
    """
)


def excess(connection: Connection, role: str | None = None) -> list[str]:
    """Return the rights of ``role``, by default the one that logged in, beyond ``RIGHTS``.

    Each is a predicate: "is a superuser", "has SELECT (domain) ON sites".
    """
    known = _role(connection, role)
    if known is None:
        return []
    if known.rolsuper:
        return ["is a superuser and may do anything"]
    who = {"oid": known.oid}
    found = [words for attribute, words in _ATTRIBUTES.items() if getattr(known, attribute)]
    if groups := connection.scalars(_GROUPS, who).all():
        found.append(f"is a member of {', '.join(groups)}")
    if owned := _owned(connection, known.oid):
        found.append(f"owns {', '.join(sorted(owned))}")
    found += [f"has {what}" for what in _beyond(connection.execute(_HELD, who))]
    found += [
        f"may call {name}, which runs with its owner's rights"
        for name in connection.scalars(_LENT, who)
    ]
    found += [f"may create {what}" for what in connection.scalars(_PLACES_TO_CREATE, who)]
    return found


def _role(connection: Connection, role: str | None) -> Row[*tuple[Any, ...]] | None:
    return connection.execute(_ROLE, {"role": role}).one_or_none()


def _owned(connection: Connection, oid: int) -> set[str]:
    return set(connection.scalars(_OWNED, {"oid": oid}))


def _beyond(held: Iterable[Row[*tuple[Any, ...]]]) -> Iterator[str]:
    """Yield the rights on each table that are not in ``RIGHTS``, as SQL."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for table, visible, privilege, column, whole in held:
        needed = RIGHTS.get(table, {}).get(privilege) if visible else None
        if needed is None and whole:
            found[table][privilege] = []
        elif needed is None or (needed and column not in needed):
            found[table][privilege].append(column)
    for table, rights in found.items():
        yield f"{', '.join(_right(*each) for each in rights.items())} ON {table}"
