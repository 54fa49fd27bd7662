"""The database itself keeps the pipeline to what it needs, and each right that it has is needed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from app import database, delivery, grants, log, report
from app.pipeline import CollectError, Pipeline
from app.settings import Settings
from demo import consentos
from tests.conftest import ROLE, Clock, Databases
from tests.integration.test_facts_access import READ
from tests.support.command import command
from tests.support.database import one, run
from tests.support.receiver import Receiver, answer
from tests.support.steps import DAY_BEGINS, TOMORROW_BEGINS

NEW_ROLE = f"{ROLE}_made"

COUNTED = {
    **{table: {*columns} for table, columns in READ.items()},
    "alembic_version": {"version_num"},
    "instance": {"id", "created_at", "updated_at", "last_telemetry_at"},
}

# Listed for a reader of the table, and asked for by nothing.
NOT_ASKED_FOR = {("instance", "SELECT", "updated_at")}

RIGHTS = [
    (table, privilege, column)
    for table, rights in grants.RIGHTS.items()
    for privilege, columns in rights.items()
    for column in columns or [None]
    if (table, privilege, column) not in NOT_ASKED_FOR
]


@pytest.fixture
def small(environment: dict[str, str]) -> Engine:
    """The database as the pipeline's role sees it."""
    return database.engine(environment["DATABASE_URL"])


@pytest.fixture
def new_role(db: Engine, databases: Databases) -> Iterator[str]:
    """The name of a role that does not exist yet."""
    yield NEW_ROLE
    if one(db, "SELECT count(*) FROM pg_roles WHERE rolname = :name", name=NEW_ROLE):
        run(db, f"DROP OWNED BY {NEW_ROLE}")
        databases.drop_role(NEW_ROLE)


def columns_of(db: Engine, *, ours: bool) -> list[tuple[str, str]]:
    """Return each table's columns: those of telemetry's own tables, or those of ConsentOS's."""
    with db.begin() as connection:
        found = connection.execute(
            text(
                "SELECT table_name, column_name FROM information_schema.columns"
                " WHERE table_schema = 'public' AND starts_with(table_name, 'telemetry_') = :ours"
            ),
            {"ours": ours},
        )
        return [(table, column) for table, column in found]


def refusal(small: Engine, statement: str) -> str | None:
    """Return why the database refuses a statement, or None where it does not."""
    with small.connect() as connection:
        try:
            connection.execute(text(statement))
        except ProgrammingError as error:
            return str(error.orig).partition("\n")[0]
    return None


class TestARoleOfConsentOSs:
    """What ConsentOS keeps is out of reach, column by column."""

    def test_cannot_read_any_column_that_is_not_counted(self, small: Engine, db: Engine) -> None:
        read = {(table, column) for table, columns in COUNTED.items() for column in columns}
        others = set(columns_of(db, ours=False)) - read
        assert {"domain", "email", "ip_hash", "tc_string", "name"} <= {name for _, name in others}
        for table, column in others:
            assert refusal(small, f"SELECT {column} FROM {table}") == (
                f"permission denied for table {table}"
            )
        for table in {table for table, _ in others}:
            assert refusal(small, f"SELECT * FROM {table}") is not None

    def test_can_read_each_column_that_is_counted(self, small: Engine) -> None:
        for table, columns in COUNTED.items():
            for column in columns:
                assert refusal(small, f"SELECT {column} FROM {table}") is None

    def test_cannot_change_anything_but_when_the_instance_last_sent(
        self, small: Engine, db: Engine
    ) -> None:
        may = {("instance", "updated_at"), ("instance", "last_telemetry_at")}
        for table, column in columns_of(db, ours=False):
            refused = refusal(small, f"UPDATE {table} SET {column} = NULL WHERE false")
            assert (refused is None) == ((table, column) in may), (table, column)
        for table in {table for table, _ in columns_of(db, ours=False)}:
            for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}", f"DROP TABLE {table}"):
                assert refusal(small, statement), statement

    def test_cannot_make_a_table(self, small: Engine) -> None:
        assert refusal(small, "CREATE TABLE mine ()") == "permission denied for schema public"


class TestARoleOfTelemetrys:
    """Its own rows it may write once, move on, and delete."""

    @pytest.mark.parametrize("column", ["id", "day", "instance_id", "payload", "created_at"])
    def test_cannot_change_what_was_written(self, small: Engine, column: str) -> None:
        refused = refusal(small, f"UPDATE telemetry_outbox SET {column} = NULL WHERE false")
        assert refused == "permission denied for table telemetry_outbox"

    @pytest.mark.parametrize("column", ["n", "started_at", "endpoint", "outbox_id"])
    def test_cannot_change_that_an_attempt_was_made(self, small: Engine, column: str) -> None:
        refused = refusal(small, f"UPDATE telemetry_attempt SET {column} = NULL WHERE false")
        assert refused == "permission denied for table telemetry_attempt"

    def test_cannot_take_the_trigger_away(self, small: Engine) -> None:
        drop = "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox"
        disable = "ALTER TABLE telemetry_outbox DISABLE TRIGGER ALL"
        for statement in (drop, disable):
            assert refusal(small, statement) == "must be owner of table telemetry_outbox" or (
                refusal(small, statement) == "must be owner of relation telemetry_outbox"
            )

    def test_cannot_delete_an_attempt_but_with_its_row(self, small: Engine) -> None:
        refused = "permission denied for table telemetry_attempt"
        assert refusal(small, "DELETE FROM telemetry_attempt") == refused
        assert refusal(small, "DELETE FROM telemetry_outbox") is None


class TestEachRight:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the database refuses is not tried again: it would take seconds for each right."""
        monkeypatch.setattr(delivery, "PATIENCE_WITH_DATABASE", ())

    def test_is_missed_where_it_is_taken_away(
        self,
        environment: dict[str, str],
        db: Engine,
        clock: Clock,
        receiver: Receiver,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        assert environment
        assert missed(caplog, db, clock, receiver) is None
        for table, privilege, column in RIGHTS:
            what = f"{privilege} ({column}) ON {table}" if column else f"{privilege} ON {table}"
            run(db, f"REVOKE {what} FROM {ROLE}")
            assert missed(caplog, db, clock, receiver) == (
                f"permission denied for table {table}:"
                " run `python -m app grants --role ROLE --apply`"
            )
            run(db, f"GRANT {what} TO {ROLE}")
        assert missed(caplog, db, clock, receiver) is None


def missed(
    caplog: pytest.LogCaptureFixture, db: Engine, clock: Clock, receiver: Receiver
) -> str | None:
    """Return what a pipeline that does all that it can do is refused, or None where nothing is."""
    caplog.clear()
    for table in ("telemetry_outbox", "telemetry_notice", "instance"):
        run(db, f"DELETE FROM {table}")
    try:
        go_through_everything(Pipeline(Settings.load()), db, clock, receiver)
    except DBAPIError as error:
        return log.cause(error)
    except CollectError as error:
        return log.cause(error)
    swallowed = re.search(r'stage=stamp error="([^"]*)"', caplog.text)
    return swallowed[1] if swallowed else None


def go_through_everything(pipeline: Pipeline, db: Engine, clock: Clock, receiver: Receiver) -> None:
    """Give notice, write, fail, send, take a lapsed lease back, expire and prune."""
    receiver.answers[:] = [answer(503, "Retry-After: 60"), answer(202)]
    clock("2026-05-01T12:00:00Z")
    pipeline.sweep()
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()
    pipeline.drain()
    clock("2026-05-02T02:40:00Z")
    pipeline.drain()
    clock(TOMORROW_BEGINS)
    assert pipeline.write_heartbeat()
    run(
        db,
        "UPDATE telemetry_outbox SET state = 'sending', lease_token = id, lease_until = created_at"
        " WHERE state = 'pending'",
    )
    pipeline.sweep()
    clock("2026-05-04T12:00:00Z")
    pipeline.sweep()
    assert states(db) == ["sent", "expired"]
    clock("2027-06-01T00:00:00Z")
    pipeline.prune()
    assert states(db) == []


def states(db: Engine) -> list[str]:
    with db.begin() as connection:
        found = connection.scalars(text("SELECT state FROM telemetry_outbox ORDER BY day"))
        return list(found)


def test_the_columns_of_consentos_are_those_that_are_specified() -> None:
    granted = {
        table: set(rights["SELECT"])
        for table, rights in grants.RIGHTS.items()
        if not table.startswith("telemetry_")
    }
    assert granted == COUNTED
    changes = [table for table in COUNTED if grants.RIGHTS[table].keys() != {"SELECT"}]
    assert changes == ["instance"]


class TestTheCommand:
    def test_prints_the_sql_without_a_database(self) -> None:
        ended = command({}, "grants", "--role", "telemetry")
        assert (ended.code, ended.err) == (0, "")
        assert 'GRANT SELECT (deleted_at) ON organisations TO "telemetry";' in ended.out
        assert not re.search(r"GRANT SELECT[^(]* ON (?!telemetry_)", ended.out)

    @pytest.mark.usefixtures("new_role")
    def test_prints_what_an_administrator_can_run(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        printed = command({}, "grants", "--role", NEW_ROLE).out
        with db.begin() as connection:
            connection.exec_driver_sql(printed, execution_options={"no_parameters": True})
        url = make_url(environment["DATABASE_URL"]).set(username=NEW_ROLE)
        here = {**environment, "DATABASE_URL": url.render_as_string(hide_password=False)}
        assert command(here, "preview").code == 0
        assert command(here, "status", "--json").json["excess_rights"] == []

    @pytest.mark.usefixtures("new_role")
    def test_makes_a_role_with_the_password_of_database_url(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        url = make_url(administered["DATABASE_URL"]).set(username=NEW_ROLE)
        here = {**administered, "DATABASE_URL": url.render_as_string(hide_password=False)}
        ended = command(here, "grants", "--role", NEW_ROLE, "--apply")
        assert (ended.code, ended.err) == (0, "")
        first, *granted = ended.out.splitlines()
        assert first == f"The role {NEW_ROLE} was created, with the password from DATABASE_URL."
        assert granted == [f"granted: {what}" for what in grants.listed()]
        assert password_of(db, NEW_ROLE).startswith("SCRAM-SHA-256$")
        assert command(here, "preview").code == 0
        assert command(here, "status", "--json").json["excess_rights"] == []

    @pytest.mark.usefixtures("new_role")
    def test_makes_a_role_without_one_where_database_url_names_another(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        ended = command(administered, "grants", "--role", NEW_ROLE, "--apply")
        assert ended.code == 0
        assert f"without a password: set one (psql: \\password {NEW_ROLE})" in ended.out
        assert password_of(db, NEW_ROLE) is None

    def test_leaves_the_password_of_a_role_that_exists(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        before = password_of(db, ROLE)
        for _ in range(2):
            ended = command(administered, "grants", "--role", ROLE, "--apply")
            assert ended.code == 0
            assert ended.out.startswith(f"The role {ROLE} exists; its password is unchanged.\n")
        assert password_of(db, ROLE) == before

    def test_gives_back_what_was_taken(self, administered: dict[str, str], db: Engine) -> None:
        run(db, f"REVOKE ALL ON sites, telemetry_outbox FROM {ROLE}")
        assert command(administered, "preview").code == 1
        assert command(administered, "grants", "--role", ROLE, "--apply").code == 0
        assert command(administered, "preview").code == 0

    def test_says_what_a_role_may_do_beyond_that(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        run(db, f"GRANT SELECT ON cookies TO {ROLE}")
        ended = command(administered, "grants", "--role", ROLE, "--apply")
        assert ended.code == 0
        assert ended.sentence == (
            f"{ROLE} has SELECT ON cookies, which telemetry does not need: revoke it from the role"
            " or PUBLIC."
        )

    def test_grants_nothing_to_a_superuser_or_an_owner(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        administrator = one(db, "SELECT current_user")
        ended = command(administered, "grants", "--role", administrator, "--apply")
        assert (ended.code, ended.out) == (1, "")
        assert ended.sentence == (
            f"{administrator} is a superuser, so grants cannot restrict it: use a separate role."
        )
        run(db, f"ALTER TABLE consent_records OWNER TO {ROLE}")
        ended = command(administered, "grants", "--role", ROLE, "--apply")
        assert (ended.code, ended.out) == (1, "")
        assert "owns tables that it must not change" in ended.sentence

    def test_takes_no_name_that_could_not_be_written_down(
        self, administered: dict[str, str]
    ) -> None:
        others = ("public", "none", "pg_monitor", "pg_read_all_data")
        for name in ("", "1st", "a b", 'a"b', "a'b", "a;b", "a$$b", "é", "x" * 64, *others):
            with pytest.raises(grants.RoleNameError, match="The role's name must have 1 to 63 of "):
                grants.sql(name)
        for further in ([], ["--apply"]):
            ended = command(administered, "grants", "--role", "public", *further)
            assert (ended.code, ended.out) == (2, "")
            assert ended.sentence.startswith("The role's name must have 1 to 63 of ")

    @pytest.mark.usefixtures("new_role")
    def test_says_who_must_run_it(self, environment: dict[str, str], db: Engine) -> None:
        ended = command(environment, "grants", "--role", NEW_ROLE, "--apply")
        assert (ended.code, ended.out) == (1, "")
        assert ended.sentence == (
            "Permission denied to create role: MIGRATION_DATABASE_URL must name a role with that"
            " right."
        )
        assert not one(db, "SELECT count(*) FROM pg_roles WHERE rolname = :name", name=NEW_ROLE)

    @pytest.mark.usefixtures("new_role")
    def test_does_not_say_that_it_granted_what_it_could_not(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        run(db, f"CREATE ROLE {NEW_ROLE} LOGIN")
        ended = command(environment, "grants", "--role", NEW_ROLE, "--apply")
        assert (ended.code, ended.out) == (1, "")
        tables = ", ".join(sorted(grants.RIGHTS))
        assert ended.sentence == (
            f"No rights could be granted on {tables}: MIGRATION_DATABASE_URL must name their owner."
        )

    def test_asks_for_the_tables_first(
        self, administered: dict[str, str], empty_database: str
    ) -> None:
        engine = database.engine(empty_database)
        with engine.begin() as connection:
            consentos.create_tables(connection)
        here = {**administered, "MIGRATION_DATABASE_URL": empty_database}
        ended = command(here, "grants", "--role", ROLE, "--apply")
        assert ended.sentence == (
            "The tables of telemetry are missing or of another release; run"
            " `python -m app migrate` first."
        )

    def test_says_where_the_tables_are_if_a_role_would_not_look_there(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        name = one(db, "SELECT current_database()")
        run(db, "ALTER SCHEMA public RENAME TO consentos")
        run(db, f'ALTER ROLE CURRENT_USER IN DATABASE "{name}" SET search_path = consentos')
        ended = command(administered, "grants", "--role", ROLE, "--apply")
        assert ended.code == 0
        assert f'run ALTER ROLE "{ROLE}" SET search_path = consentos;' in ended.sentence
        lost = command(administered, "preview")
        run(db, f'ALTER ROLE "{ROLE}" SET search_path = consentos')
        try:
            found = command(administered, "preview")
            again = command(administered, "grants", "--role", ROLE, "--apply")
        finally:
            run(db, f'ALTER ROLE "{ROLE}" RESET search_path')
        assert (lost.code, found.code, again.code, again.err) == (1, 0, 0, "")

    def test_asks_for_a_role_that_may_log_in(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        run(db, f"ALTER ROLE {ROLE} NOLOGIN")
        ended = command(administered, "grants", "--role", ROLE, "--apply")
        run(db, f"ALTER ROLE {ROLE} LOGIN")
        assert ended.code == 1
        assert ended.sentence == f'{ROLE} cannot log in: run ALTER ROLE "{ROLE}" LOGIN.'

    @pytest.mark.usefixtures("new_role")
    def test_can_be_run_by_the_owner_of_the_tables_where_the_role_exists(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        name = one(db, "SELECT current_database()")
        with db.begin() as connection:
            owner = f"{name}_owner"
            connection.execute(text(f"CREATE ROLE {owner} LOGIN"))
            connection.execute(text(f"CREATE ROLE {NEW_ROLE} LOGIN"))
            for table in grants.RIGHTS:
                connection.execute(text(f"ALTER TABLE {table} OWNER TO {owner}"))
        url = make_url(administered["MIGRATION_DATABASE_URL"]).set(username=owner)
        here = {**administered, "MIGRATION_DATABASE_URL": url.render_as_string(hide_password=False)}
        ended = command(here, "grants", "--role", NEW_ROLE, "--apply")
        run(db, f"REASSIGN OWNED BY {owner} TO CURRENT_USER")
        run(db, f"DROP ROLE {owner}")
        assert (ended.code, ended.err) == (0, "")


def password_of(db: Engine, role: str) -> Any:
    """Return what Postgres has stored of a role's password."""
    return one(db, "SELECT rolpassword FROM pg_authid WHERE rolname = :role", role=role)


@contextmanager
def role_put_back(db: Engine) -> Iterator[None]:
    """Undo afterwards what was done to the role; the rest goes with the database."""
    try:
        yield
    finally:
        run(db, f"ALTER ROLE {ROLE} NOCREATEROLE NOCREATEDB NOBYPASSRLS NOREPLICATION")
        run(db, f"REVOKE pg_read_all_data FROM {ROLE}")


IN_DATABASE, NAME = "DO $$ BEGIN EXECUTE", "current_database()"
IN_S = "; GRANT USAGE ON SCHEMA s TO {role}; ALTER TABLE s.t ADD x text"


class TestTheStatus:
    @pytest.mark.parametrize(
        ("statement", "reported"),
        [
            ("GRANT SELECT (domain) ON sites TO {role}", "has SELECT (domain) ON sites"),
            ("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}", "has SELECT ON api_keys"),
            ("GRANT SELECT (email) ON users TO PUBLIC", "has SELECT (email) ON users"),
            (
                "GRANT UPDATE (payload, day) ON telemetry_outbox TO {role}",
                "has UPDATE (day, payload) ON telemetry_outbox",
            ),
            ("GRANT DELETE ON instance TO {role}", "has DELETE ON instance"),
            ("GRANT TRUNCATE ON telemetry_outbox TO {role}", "has TRUNCATE ON telemetry_outbox"),
            ("GRANT CREATE ON SCHEMA public TO {role}", "may create tables in public"),
            (
                f"{IN_DATABASE} format('GRANT CREATE ON DATABASE %I TO {{role}}', {NAME}); END $$",
                "may create schemas",
            ),
            (
                "CREATE SEQUENCE numbers; GRANT USAGE ON SEQUENCE numbers TO {role}",
                "has USAGE ON numbers",
            ),
            (
                "CREATE FUNCTION leak() RETURNS text SECURITY DEFINER RETURN (SELECT 'domain')",
                "may call leak, which runs with its owner's rights",
            ),
            (
                "ALTER FUNCTION telemetry_outbox_frozen() OWNER TO {role}",
                "owns telemetry_outbox_frozen",
            ),
            ("GRANT pg_read_all_data TO {role}", "is a member of pg_read_all_data"),
            ("ALTER TABLE cookies OWNER TO {role}", "owns cookies"),
            ("ALTER ROLE {role} CREATEROLE", "may create roles"),
            ("ALTER ROLE {role} CREATEDB", "may create databases"),
            ("ALTER ROLE {role} BYPASSRLS", "bypasses row security"),
            ("ALTER ROLE {role} REPLICATION", "may replicate the whole server"),
            (
                "CREATE VIEW mails AS SELECT email FROM users; GRANT SELECT ON mails TO {role}",
                "has SELECT ON mails",
            ),
            (
                "CREATE SCHEMA s CREATE TABLE t () GRANT SELECT ON t TO {role}" + IN_S,
                "has SELECT ON t",
            ),
        ],
    )
    def test_lists_each_right_that_is_not_needed(
        self, pipeline: Pipeline, db: Engine, statement: str, reported: str
    ) -> None:
        assert report.status(pipeline).excess_rights == []
        with role_put_back(db):
            run(db, statement.format(role=ROLE))
            assert reported in report.status(pipeline).excess_rights

    def test_does_not_list_what_an_extension_shows_to_everybody(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        run(db, "CREATE VIEW statistics AS SELECT 1 AS x; GRANT SELECT ON statistics TO PUBLIC")
        assert report.status(pipeline).excess_rights == ["has SELECT ON statistics"]
        run(db, "ALTER EXTENSION plpgsql ADD VIEW statistics")
        assert report.status(pipeline).excess_rights == []

    def test_says_that_a_role_is_a_superuser_and_which_command_makes_a_smaller_one(
        self, environment: dict[str, str], database_url: str
    ) -> None:
        shown = command({**environment, "DATABASE_URL": database_url}, "status")
        (line,) = [line for line in shown.out.splitlines() if line.startswith("rights")]
        assert line.split(maxsplit=1)[1].rstrip() == (
            "more than needed: the role is a superuser and may do anything. See `grants`"
        )

    def test_says_that_a_small_role_has_only_the_rights_that_are_needed(
        self, environment: dict[str, str]
    ) -> None:
        shown = command(environment, "status")
        assert re.search(
            r"^rights +only those needed: the database refuses", shown.out, re.MULTILINE
        )
