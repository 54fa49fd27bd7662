"""`migrate` upgrades tables with data in them, and repairs whatever a half restore leaves."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app import database, grants
from app.pipeline import Pipeline
from migrations import Migrated, MigrationRefusedError, migrate, repair
from tests.conftest import ROLE, Databases
from tests.integration.test_migrations import describe_all, relations
from tests.support.command import command
from tests.support.database import (
    CONSENTOS_0005,
    HEAD,
    REVISIONS,
    count,
    give_notice,
    one,
    run,
    waiting_for_locks,
)
from tests.support.processes import ROOT
from tests.support.receiver import Receiver
from tests.support.steps import eventually

BODY = '{"b" : 1,  "a" : 2}'
NOTICE = "INSERT INTO telemetry_notice VALUES (1, '2026-05-01T12:00Z')"
MONTH = (
    "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, drains, attempts,"
    " created_at, next_attempt_at, expires_at, finished_at)"
    f" SELECT gen_random_uuid(), day, gen_random_uuid(), '{BODY}', 'sent', 1, 2, day, day,"
    " day + interval '1 day', day"
    " FROM generate_series(timestamptz '2026-04-01', '2026-04-30', '1 day') AS day"
)
ATTEMPTS = (
    "INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome, endpoint)"
    " SELECT id, n, created_at, created_at, CASE n WHEN 1 THEN 'retryable' ELSE 'sent' END, 'x'"
    " FROM telemetry_outbox, generate_series(1, 2) AS n"
)
CONTENT = """
SELECT o.day, o.instance_id, o.payload::text, o.state, o.attempts, a.n, a.outcome, n.noticed_at
FROM telemetry_outbox AS o JOIN telemetry_attempt AS a ON a.outbox_id = o.id
CROSS JOIN telemetry_notice AS n ORDER BY o.day, a.n
"""


def move(db: Engine, to: str = "head") -> Migrated:
    with db.connect() as connection:
        return migrate(connection, "telemetry", to)


def content(db: Engine) -> list[Any]:
    with db.begin() as connection:
        return [tuple(row) for row in connection.execute(text(CONTENT))]


def do(db: Engine, statements: str) -> None:
    for statement in re.split(r"(?<!\\);", statements):
        with db.begin() as connection:
            connection.exec_driver_sql(statement.replace("\\;", ";"))


@pytest.fixture(params=REVISIONS)
def filled(request: pytest.FixtureRequest, empty_database: str) -> Engine:
    """Telemetry's tables as some released version left them, with a month of heartbeats."""
    db = database.engine(empty_database)
    run(db, CONSENTOS_0005)
    move(db, request.param)
    for statement in (NOTICE, MONTH, ATTEMPTS):
        run(db, statement)
    return db


def assert_whole(db: Engine) -> None:
    """Assert that the tables are those of a new install, and that nothing is left to do."""
    with db.begin() as connection:
        assert repair.missing(connection) == []
    before = [describe_all(db), relations(db)]
    assert move(db) == Migrated(HEAD, HEAD)
    assert [describe_all(db), relations(db)] == before


@pytest.mark.parametrize("filled", ["0001"], indirect=True)
def test_a_release_that_is_newer_than_the_tables_says_to_migrate(
    filled: Engine, environment: dict[str, str]
) -> None:
    here = {**environment, "DATABASE_URL": filled.url.render_as_string(hide_password=False)}
    for line in ("status", "audit"):
        ended = command(here, line)
        assert ended.code == 1
        assert "run `python -m app migrate` first" in ended.sentence


def test_an_upgrade_names_what_the_operator_has_made_dependent_on_a_table(filled: Engine) -> None:
    run(filled, "CREATE VIEW mine AS SELECT * FROM telemetry_attempt")
    run(filled, "ALTER TABLE telemetry_outbox DROP COLUMN not_before")
    with pytest.raises(MigrationRefusedError, match="such as a view, depends on its tables"):
        move(filled)


def test_an_upgrade_keeps_every_heartbeat_and_attempt(filled: Engine) -> None:
    before = content(filled)
    assert len(before) == 60
    done = move(filled)
    assert (done.after, done.missing, done.kept) == (HEAD, [], [])
    assert content(filled) == before
    assert_whole(filled)


def test_what_is_expected_of_the_tables_is_what_the_migrations_make(filled: Engine) -> None:
    move(filled)
    with filled.begin() as connection:
        assert repair.found(connection) == repair.PARTS


HALF = {
    "all tables gone": "DROP TABLE telemetry_attempt, telemetry_outbox, telemetry_notice",
    "all tables gone and the version too": "DROP TABLE telemetry_attempt, telemetry_outbox,"
    " telemetry_notice, telemetry_alembic_version",
    "the version gone": "DROP TABLE telemetry_alembic_version",
    "the version empty": "DELETE FROM telemetry_alembic_version",
    "the version restored twice": "ALTER TABLE telemetry_alembic_version DROP CONSTRAINT"
    " telemetry_alembic_version_pkc;"
    " INSERT INTO telemetry_alembic_version VALUES ('0001'), ('0002')",
    "the notice gone": "DROP TABLE telemetry_notice",
    "the attempts gone": "DROP TABLE telemetry_attempt",
    "the outbox gone": "DROP TABLE telemetry_outbox CASCADE",
    "the trigger gone": "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox",
    "the trigger disabled": "ALTER TABLE telemetry_outbox DISABLE TRIGGER ALL",
    "the trigger and its function gone": "DROP FUNCTION telemetry_outbox_frozen() CASCADE",
    "the key gone": "ALTER TABLE telemetry_outbox DROP CONSTRAINT telemetry_outbox_pkey CASCADE",
    "the one a day gone": "ALTER TABLE telemetry_outbox DROP CONSTRAINT telemetry_outbox_day_key",
    "a check gone": "ALTER TABLE telemetry_outbox DROP CONSTRAINT telemetry_outbox_leased",
    "an index gone": "DROP INDEX telemetry_outbox_pending",
    "a column gone": "ALTER TABLE telemetry_outbox DROP COLUMN not_before",
    "a default gone": "ALTER TABLE telemetry_outbox ALTER COLUMN state DROP DEFAULT",
    "a column that may be empty": "ALTER TABLE telemetry_outbox ALTER COLUMN day DROP NOT NULL",
    "the trigger's function gutted": "CREATE OR REPLACE FUNCTION telemetry_outbox_frozen() RETURNS"
    " trigger LANGUAGE plpgsql AS $$BEGIN RETURN NEW\\; END$$",
    "the attempts of an older backup": "DROP TABLE telemetry_attempt;"
    "CREATE TABLE telemetry_attempt (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
    " outbox_id uuid NOT NULL REFERENCES telemetry_outbox (id) ON DELETE CASCADE,"
    " n integer NOT NULL CHECK (n >= 1), started_at timestamptz NOT NULL, finished_at timestamptz,"
    " outcome text CHECK (outcome IN ('sent')), http_status integer, error text,"
    " endpoint text NOT NULL, duration_ms integer, UNIQUE (outbox_id, n),"
    " CONSTRAINT telemetry_attempt_finished CHECK (outcome IS NULL));"
    "INSERT INTO telemetry_attempt (outbox_id, n, started_at, endpoint)"
    " SELECT id, 1, created_at, 'x' FROM telemetry_outbox",
    "the attempts without their key": "ALTER TABLE telemetry_attempt DROP CONSTRAINT"
    " telemetry_attempt_pkey",
}


@pytest.mark.parametrize("harm", HALF.values(), ids=HALF.keys())
class TestAHalfState:
    def test_is_made_whole_and_what_is_left_is_kept(self, filled: Engine, harm: str) -> None:
        left = {
            table: content_of(filled, table)
            for table in ("telemetry_notice", "telemetry_outbox")
            if not harm.startswith("DROP TABLE telemetry_attempt,") and table not in harm
        }
        do(filled, harm)
        done = move(filled)
        assert done.after == HEAD
        assert done.missing or done.before < done.after  # an upgrade replaces some parts anyway
        for table, rows in left.items():
            assert content_of(filled, table) == rows
        assert_whole(filled)

    def test_can_be_removed(self, filled: Engine, harm: str) -> None:
        do(filled, harm)
        assert move(filled, "base").after == "base"
        found = describe_all(filled)
        assert isinstance(found, list)
        assert [name for name in found if name.startswith("telemetry")] == []


def content_of(db: Engine, table: str) -> list[Any]:
    columns = {
        "telemetry_notice": "schema, noticed_at",
        "telemetry_outbox": "id, day, instance_id, payload::text, state, attempts, created_at",
    }[table]
    with db.begin() as connection:
        found = connection.execute(text(f"SELECT {columns} FROM {table} ORDER BY 1"))
        return [tuple(row) for row in found]


def test_the_pipeline_works_on_mended_tables_under_its_role(pipeline: Pipeline, db: Engine) -> None:
    run(db, "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox")
    before = rights(db)
    move(db)
    assert rights(db) == before
    run(db, "DELETE FROM telemetry_notice")
    give_notice(db, "2026-01-01")
    pipeline.sweep()
    assert pipeline.write_heartbeat()
    with db.begin() as connection:
        assert grants.excess(connection, ROLE) == []


def rights(db: Engine) -> list[Any]:
    """Return who may do what to which table and column of telemetry's."""
    acl = (
        "SELECT relname, '' AS part, a.* FROM pg_class, aclexplode(relacl) AS a"
        " WHERE relname LIKE 'telemetry\\_%' AND grantee <> relowner UNION ALL"
        " SELECT relname, attname, a.* FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid,"
        " aclexplode(attacl) AS a WHERE relname LIKE 'telemetry\\_%' ORDER BY 1, 2, 5, 6"
    )
    with db.begin() as connection:
        return [tuple(row) for row in connection.execute(text(acl))]


OLD_RIGHTS = (
    "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}",
    "GRANT SELECT (deleted_at) ON organisations, users TO {role}",
    "GRANT SELECT, INSERT (schema, noticed_at) ON telemetry_notice TO {role}",
    "GRANT SELECT, UPDATE, DELETE, INSERT (id, day) ON telemetry_outbox TO {role}",
    "GRANT SELECT, INSERT (id, outbox_id, n) ON telemetry_attempt TO {role}",
)


def test_the_documented_upgrade_works_step_by_step_from_the_first_release(
    administered: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    move(db, "base")
    move(db, "0001")
    for statement in (NOTICE, MONTH, ATTEMPTS, *OLD_RIGHTS):
        run(db, statement.replace("{role}", ROLE))
    _, _, of_this = operate("Upgrade").partition("systemctl stop")
    steps = re.findall(r"(?m)^consentos-telemetry (.*)$", of_this)
    assert [step.split()[0] for step in steps] == ["migrate", "grants", "preview"]
    for step in steps:
        ended = command(administered, *step.replace("--role telemetry", f"--role {ROLE}").split())
        assert ended.code == 0, ended.err
    sent = command(administered, "send")
    assert sent.code == 0, sent.err
    assert len(receiver.requests) == 1


def operate(section: str) -> str:
    """Return a section of the operator's page."""
    page = (ROOT / "docs" / "operate.md").read_text()
    return page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]


CANNOT_BE_KEPT = {
    "ALTER TABLE telemetry_outbox DROP CONSTRAINT telemetry_outbox_state,"
    " DROP CONSTRAINT telemetry_outbox_finished;"
    "UPDATE telemetry_outbox SET state = 'lost' WHERE day = '2026-04-01'": (
        "a row of telemetry_outbox breaks telemetry_outbox_"
    ),
    "DROP INDEX telemetry_outbox_pending;CREATE VIEW mine AS SELECT day FROM telemetry_outbox": (
        "something else, such as a view, depends on its tables"
    ),
    "ALTER TABLE telemetry_outbox DROP COLUMN payload": (
        "a row of telemetry_outbox breaks the type or the rule of payload"
    ),
}


@pytest.mark.parametrize("filled", [HEAD], indirect=True)
class TestWhileItWorks:
    def test_nothing_that_is_committed_meanwhile_is_lost(self, filled: Engine) -> None:
        run(filled, "DROP INDEX telemetry_outbox_pending")
        with ThreadPoolExecutor(1) as beside:
            with filled.begin() as worker:
                worker.execute(text("UPDATE telemetry_outbox SET attempts = 3"))
                moving = beside.submit(move, filled)
                eventually(lambda: waiting_for_locks(filled) == 1)
                worker.execute(text("UPDATE telemetry_attempt SET error = 'late'"))
            assert moving.result().missing
        assert one(filled, "SELECT sum(attempts) FROM telemetry_outbox") == 90
        assert one(filled, "SELECT count(*) FROM telemetry_attempt WHERE error = 'late'") == 60

    def test_the_tables_stay_their_owners(self, filled: Engine, owner: str) -> None:
        for table in (*repair.TABLES, "telemetry_alembic_version"):
            run(filled, f"ALTER TABLE {table} OWNER TO {owner}")
        run(filled, "DROP INDEX telemetry_outbox_pending")
        assert move(filled).missing
        owners = (
            "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class"
            " WHERE relname LIKE 'telemetry%' AND relkind IN ('r', 'i')"
        )
        assert one(filled, owners) == [owner]

    @pytest.fixture
    def owner(self, filled: Engine, databases: Databases) -> Iterator[str]:
        name = f"{ROLE}_owner"
        run(filled, f"CREATE ROLE {name}")
        run(filled, f"GRANT CREATE ON SCHEMA public TO {name}")
        yield name
        run(filled, f"DROP OWNED BY {name}")
        databases.drop_role(name)


@pytest.mark.parametrize("filled", [HEAD], indirect=True)
class TestWhatCannotBeKept:
    def test_an_attempt_without_its_heartbeat_is_removed_and_counted(self, filled: Engine) -> None:
        do(
            filled,
            "ALTER TABLE telemetry_attempt DROP CONSTRAINT telemetry_attempt_outbox_id_fkey;"
            "DELETE FROM telemetry_outbox WHERE day > '2026-04-10'",
        )
        done = move(filled)
        assert done.missing == ["telemetry_attempt: telemetry_attempt_outbox_id_fkey FOREIGN KEY"]
        assert done.kept == [
            "telemetry_notice: 1 row kept",
            "telemetry_outbox: 10 rows kept",
            "telemetry_attempt: 20 rows kept, 40 removed",
        ]

    @pytest.mark.parametrize("harm", CANNOT_BE_KEPT)
    def test_is_named_and_nothing_is_changed(self, filled: Engine, harm: str) -> None:
        reason = CANNOT_BE_KEPT[harm]
        do(filled, harm)
        before = [describe_all(filled), relations(filled)]
        with pytest.raises(MigrationRefusedError, match=reason) as refusal:
            move(filled)
        assert str(refusal.value).endswith("Fix that by hand, then run this again.")
        assert [describe_all(filled), relations(filled)] == before
        assert count(filled, "telemetry_outbox") == 30


def test_a_role_that_does_not_own_the_tables_is_refused_with_one_sentence(
    environment: dict[str, str], db: Engine
) -> None:
    run(db, "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox")
    ended = command(
        {**environment, "MIGRATION_DATABASE_URL": environment["DATABASE_URL"]}, "migrate"
    )
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentence == (
        "Permission denied for table telemetry_alembic_version: MIGRATION_DATABASE_URL must name a"
        " role with that right."
    )
