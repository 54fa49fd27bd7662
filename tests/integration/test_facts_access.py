"""The census reads only the listed columns, waits for no lock, and names what is missing."""

import re
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from app import database, facts, log
from app.pipeline import CollectError, Pipeline
from demo.consentos import Truth
from tests.conftest import ROLE, Clock, Databases
from tests.support.command import command
from tests.support.database import count, give_notice, one, run

# As docs/ and the specification of the host list them.
READ = {
    "organisations": ("deleted_at",),
    "users": ("deleted_at",),
    "sites": ("id", "organisation_id", "site_group_id", "is_active", "deleted_at"),
    "site_configs": ("site_id", "tcf_enabled", "blocking_mode", "scan_schedule_cron"),
    "site_group_configs": ("site_group_id", "tcf_enabled", "blocking_mode"),
    "org_configs": ("organisation_id", "tcf_enabled", "blocking_mode"),
    "scan_jobs": ("created_at",),
    "consent_records": ("consented_at",),
}
COLUMNS = [(table, column) for table, columns in READ.items() for column in columns]


@pytest.fixture(scope="module")
def copy(databases: Databases, truth_and_template: tuple[Truth, str]) -> Iterator[Engine]:
    with databases.copy_of(truth_and_template[1]) as url:
        yield database.engine(url)


@pytest.fixture
def connection(copy: Engine) -> Iterator[Connection]:
    """A connection to the generated ConsentOS, whose transaction is rolled back."""
    with copy.connect() as connection:
        yield connection


@pytest.fixture
def noticed(db: Engine) -> None:
    give_notice(db, "2026-01-01")


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_column_that_is_missing_is_named(connection: Connection, table: str, column: str) -> None:
    connection.exec_driver_sql(f"ALTER TABLE {table} RENAME COLUMN {column} TO moved")
    with pytest.raises(DBAPIError) as failure:
        facts.census(connection)
    assert re.search(rf"column .*\b{column}\b.* does not exist", log.cause(failure.value))


@pytest.mark.parametrize("table", READ)
def test_a_table_that_is_missing_is_named(connection: Connection, table: str) -> None:
    connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO moved")
    with pytest.raises(DBAPIError) as failure:
        facts.census(connection)
    assert log.cause(failure.value) == f'relation "{table}" does not exist'


def test_it_takes_no_lock_that_anybody_but_a_schema_change_could_notice(
    connection: Connection,
) -> None:
    connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    facts.census(connection)
    held = connection.exec_driver_sql(
        "SELECT c.relname, l.mode FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation"
        " WHERE l.pid = pg_backend_pid() AND c.relnamespace = 'public'::regnamespace"
        " AND c.relkind = 'r'"
    ).all()
    assert {(table, mode) for table, mode in held} == {(table, "AccessShareLock") for table in READ}


@pytest.mark.usefixtures("noticed")
class TestAWriteThatCannotCount:
    @pytest.mark.parametrize(
        ("statement", "cause"),
        [
            ("DROP TABLE org_configs", 'relation "org_configs" does not exist'),
            ("ALTER TABLE sites DROP COLUMN is_active", "column sites.is_active does not exist"),
        ],
    )
    def test_names_what_is_missing_and_writes_nothing(
        self, pipeline: Pipeline, db: Engine, statement: str, cause: str
    ) -> None:
        run(db, statement)
        with pytest.raises(CollectError) as failure:
            pipeline.write_heartbeat()
        assert log.cause(failure.value) == cause
        assert (count(db, "telemetry_outbox"), count(db, "instance")) == (0, 0)

    @pytest.mark.parametrize("table", ["scan_jobs", "consent_records"])
    def test_waits_a_second_for_a_locked_table_and_writes_nothing(
        self, pipeline: Pipeline, db: Engine, table: str
    ) -> None:
        with db.begin() as other:
            other.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            started = time.monotonic()
            with pytest.raises(CollectError) as failure:
                pipeline.write_heartbeat()
            assert 0.9 < time.monotonic() - started < 4
        assert log.cause(failure.value) == "canceling statement due to lock timeout"
        assert (count(db, "telemetry_outbox"), count(db, "instance")) == (0, 0)

    def test_gives_up_on_a_table_that_is_too_slow_to_count(
        self, pipeline: Pipeline, db: Engine, clock: Clock
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        # Found before Postgres's own, as the clock is: a count that takes a minute a row.
        run(
            db,
            "CREATE FUNCTION clock.slowly(bigint) RETURNS bigint LANGUAGE sql AS"
            " 'SELECT $1 + 1 FROM pg_sleep(60)'",
        )
        run(
            db,
            "CREATE AGGREGATE clock.count(*) (SFUNC = clock.slowly, STYPE = bigint,"
            " INITCOND = '0')",
        )
        started = time.monotonic()
        with pytest.raises(CollectError) as failure:
            pipeline.write_heartbeat()
        assert time.monotonic() - started < 8
        assert log.cause(failure.value) == "canceling statement due to statement timeout"
        assert count(db, "telemetry_outbox") == 0


@pytest.mark.usefixtures("noticed")
class TestACountThatWouldNotBeTrue:
    """Rows that the role cannot see do not count as zero: the heartbeat is not written."""

    @pytest.mark.parametrize(
        ("harm", "cause"),
        [
            (
                "ALTER TABLE sites ENABLE ROW LEVEL SECURITY",
                'query would be affected by row-level security policy for table "sites"',
            ),
            (
                (
                    "ALTER TABLE consent_records ENABLE ROW LEVEL SECURITY;"
                    "CREATE POLICY own ON consent_records USING (false)"
                ),
                'query would be affected by row-level security policy for table "consent_records"',
            ),
            (
                (
                    "ALTER TABLE users RENAME TO everybody;"
                    "CREATE VIEW users AS SELECT * FROM everybody WHERE role = 'owner'"
                ),
                "public.users is not a table",
            ),
            (
                (
                    "CREATE SCHEMA shop; CREATE TABLE shop.users (deleted_at timestamptz);"
                    f"GRANT USAGE ON SCHEMA shop TO {ROLE}; GRANT SELECT ON shop.users TO {ROLE};"
                    f'ALTER ROLE {ROLE} IN DATABASE "%s" SET search_path = shop, public'
                ),
                (
                    "the tables are found in different schemas (public: alembic_version,"
                    " consent_records, instance, org_configs, organisations, scan_jobs,"
                    " site_configs, site_group_configs, sites; shop: users): set the role's"
                    " search_path so that ConsentOS's come first"
                ),
            ),
            (
                f"REVOKE SELECT (deleted_at) ON organisations FROM {ROLE}",
                (
                    "permission denied for table organisations:"
                    " run `python -m app grants --role ROLE --apply`"
                ),
            ),
            ("DROP TABLE alembic_version", 'relation "alembic_version" does not exist'),
        ],
        ids=["security", "policy", "view", "another schema", "right", "no revision"],
    )
    def test_is_refused_with_its_reason_in_the_log_and_in_status(
        self, pipeline: Pipeline, db: Engine, environment: dict[str, str], harm: str, cause: str
    ) -> None:
        name = one(db, "SELECT current_database()")
        for statement in harm.replace("%s", name).split(";"):
            run(db, statement)
        with pytest.raises(CollectError) as failure:
            pipeline.write_heartbeat()
        assert log.cause(failure.value) == cause
        assert (count(db, "telemetry_outbox"), count(db, "instance")) == (0, 0)
        ended = command(environment, "status", "--json")
        assert ended.json["cannot_write"] == cause
        refused = command(environment, "preview")
        assert (refused.code, refused.out) == (1, "")
        assert cause in refused.sentence

    def test_is_not_taken_from_the_outbox_either(self, pipeline: Pipeline, db: Engine) -> None:
        run(db, "ALTER TABLE telemetry_outbox ENABLE ROW LEVEL SECURITY")
        with pytest.raises(DBAPIError, match="row-level security"):
            pipeline.sweep()

    def test_partitions_are_counted_as_the_table_they_are(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        for statement in (
            "ALTER TABLE scan_jobs RENAME TO first_jobs",
            "CREATE TABLE scan_jobs (LIKE first_jobs) PARTITION BY RANGE (created_at)",
            "ALTER TABLE scan_jobs ATTACH PARTITION first_jobs DEFAULT",
            f"GRANT SELECT (created_at) ON scan_jobs TO {ROLE}",
        ):
            run(db, statement)
        assert pipeline.write_heartbeat()
        counted = "SELECT payload #>> '{counts,scans_last_24h}' FROM telemetry_outbox"
        assert one(db, counted) == "10-100"
