"""The migrations make telemetry's tables, and leave ConsentOS's alone."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, inspect, text

from app import database
from app.models import METADATA
from demo import consentos
from migrations import MigrationRefusedError, migrate
from tests.conftest import Databases
from tests.support.database import CONSENTOS_0005, HEAD, count, one, run

OWN = {"instance", "telemetry_notice", "telemetry_outbox", "telemetry_attempt"}
VERSIONS = "telemetry_alembic_version"

# All that a migration could change about a table, and what tells that it was rewritten.
TABLES = """
SELECT c.relname, c.relkind, c.relfilenode, c.relacl::text, c.reloptions::text, c.relrowsecurity,
       obj_description(c.oid, 'pg_class'),
       (SELECT jsonb_agg(to_jsonb(i) ORDER BY ordinal_position)::text
        FROM information_schema.columns AS i
        WHERE i.table_schema = 'public' AND i.table_name = c.relname),
       (SELECT array_agg(pg_get_constraintdef(oid) ORDER BY conname)::text
        FROM pg_constraint WHERE conrelid = c.oid OR confrelid = c.oid),
       (SELECT array_agg(pg_get_indexdef(indexrelid) ORDER BY indexrelid)::text
        FROM pg_index WHERE indrelid = c.oid),
       (SELECT array_agg(pg_get_triggerdef(oid) ORDER BY tgname)::text
        FROM pg_trigger WHERE tgrelid = c.oid)
FROM pg_class AS c
WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE 'telemetry%'
ORDER BY c.relname
"""

# ctid and xmin: a row that was written anew with the same values would show.
ROWS = """
SELECT count(*), md5(string_agg(concat_ws('|', t.ctid, t.xmin, t), '/' ORDER BY t.ctid))
FROM {table} AS t
"""


def host(db: Engine) -> object:
    """Return all that there is to know about the tables that are not telemetry's."""
    with db.begin() as connection:
        tables = [tuple(row) for row in connection.execute(text(TABLES))]
        rows = {
            name: tuple(connection.execute(text(ROWS.format(table=name))).one())
            for name, kind, *_ in tables
            if kind == "r"
        }
    return tables, rows


def tables(db: Engine) -> set[str]:
    return set(inspect(db).get_table_names())


def move(db: Engine, to: str = "head") -> tuple[str, str]:
    with db.connect() as connection:
        done = migrate(connection, "telemetry", to)
    assert done.missing == done.kept == []
    return done.before, done.after


@pytest.fixture
def empty(empty_database: str) -> Engine:
    return database.engine(empty_database)


@pytest.fixture
def bare(empty: Engine) -> Engine:
    """A database with nothing of ConsentOS's but the table ``instance``."""
    run(empty, CONSENTOS_0005)
    return empty


@pytest.fixture(scope="module")
def consentos_alone(databases: Databases) -> Iterator[str]:
    """The name of a ConsentOS database that telemetry has never seen."""
    with databases.copy_of("template1") as url:
        engine = database.engine(url)
        with engine.begin() as connection:
            consentos.create_tables(connection)
            consentos.populate(connection)
        assert engine.url.database is not None
        yield engine.url.database


@pytest.fixture
def beside(databases: Databases, consentos_alone: str) -> Iterator[Engine]:
    """A ConsentOS database that telemetry has never seen."""
    with databases.copy_of(consentos_alone) as url:
        yield database.engine(url)


def describe_all(db: Engine) -> object:
    """Return every relation and function of the database."""
    with db.begin() as connection:
        found = connection.execute(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
                " UNION ALL"
                " SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
                " ORDER BY 1"
            )
        )
        return found.scalars().all()


def relations(db: Engine) -> object:
    """Return each relation's files: what is made anew has others."""
    with db.begin() as connection:
        found = connection.execute(text("SELECT oid, relfilenode FROM pg_class ORDER BY oid"))
        return [tuple(row) for row in found]


class TestABareDatabase:
    def test_goes_up_down_and_up_again(self, bare: Engine) -> None:
        assert move(bare) == ("base", HEAD)
        first = describe_all(bare)
        assert tables(bare) == {*OWN, VERSIONS}
        assert move(bare, "base") == (HEAD, "base")
        assert tables(bare) == {"instance"}
        assert move(bare) == ("base", HEAD)
        assert describe_all(bare) == first

    def test_is_not_changed_by_a_second_upgrade(self, bare: Engine) -> None:
        move(bare)
        run(bare, "INSERT INTO telemetry_notice VALUES (1, now())")
        before = [describe_all(bare), relations(bare)]
        assert move(bare) == (HEAD, HEAD)
        assert [describe_all(bare), relations(bare)] == before
        assert count(bare, "telemetry_notice") == 1

    def test_keeps_no_function_and_no_type_of_telemetry_after_a_downgrade(
        self, bare: Engine
    ) -> None:
        before = describe_all(bare)
        move(bare)
        move(bare, "base")
        assert describe_all(bare) == before

    def test_records_its_revision_in_a_version_table_of_its_own(self, bare: Engine) -> None:
        move(bare)
        assert one(bare, f"SELECT version_num FROM {VERSIONS}") == HEAD
        assert "alembic_version" not in tables(bare)

    def test_says_that_a_newer_release_made_tables_that_this_one_does_not_know(
        self, bare: Engine
    ) -> None:
        move(bare)
        run(bare, f"UPDATE {VERSIONS} SET version_num = '0999'")
        before = describe_all(bare)
        for to in ("head", "base"):
            with pytest.raises(
                MigrationRefusedError, match=r"0999.* a newer release created them\."
            ):
                move(bare, to)
        assert describe_all(bare) == before


class TestBesideConsentOS:
    @pytest.mark.parametrize("instances", [0, 1, 3])
    def test_every_table_of_consentos_stays_as_it_was_byte_for_byte(
        self, beside: Engine, instances: int
    ) -> None:
        run(
            beside,
            "INSERT INTO instance SELECT gen_random_uuid(), now() - n * interval '1 day', now(),"
            " now() FROM generate_series(1, :instances) AS n",
            instances=instances,
        )
        before = host(beside)
        for to in ("head", "base", "head"):
            move(beside, to)
            assert host(beside) == before
        assert count(beside, "instance") == instances
        assert one(beside, "SELECT version_num FROM alembic_version") == "0009"
        move(beside, "base")
        assert "instance" in tables(beside)

    def test_no_table_of_consentos_is_waited_for_but_its_revision(self, beside: Engine) -> None:
        with beside.begin() as other:
            every = ", ".join(sorted(tables(beside) - {"alembic_version"}))
            other.execute(text(f"LOCK TABLE {every} IN ACCESS EXCLUSIVE MODE"))
            assert move(beside) == ("base", HEAD)
            assert move(beside, "base") == (HEAD, "base")

    def test_an_instance_without_an_alembic_version_is_adopted_too(self, beside: Engine) -> None:
        run(beside, "DROP TABLE alembic_version")
        before = host(beside)
        move(beside)
        assert host(beside) == before


class TestRefusal:
    @pytest.mark.parametrize("revision", ["0001", "0003", "0004"])
    @pytest.mark.parametrize("beyond", ["", "DROP TABLE organisations CASCADE"])
    def test_below_0005_one_sentence_says_to_upgrade_consentos_first(
        self, beside: Engine, revision: str, beyond: str
    ) -> None:
        for statement in ("DROP TABLE instance", *filter(None, [beyond])):
            run(beside, statement)
        run(beside, f"UPDATE alembic_version SET version_num = '{revision}'")
        assert refused(beside) == (
            f"ConsentOS's database is at revision {revision}, and telemetry needs 0005 or newer:"
            " upgrade ConsentOS; run ConsentOS's own migrations first, then this again."
        )

    def test_below_0005_a_table_of_that_name_does_not_help(self, beside: Engine) -> None:
        run(beside, "UPDATE alembic_version SET version_num = '0004'")
        assert "at revision 0004" in refused(beside)

    @pytest.mark.parametrize(
        "prepare",
        [
            "",
            "CREATE TABLE alembic_version (version_num text)",
            "CREATE TABLE alembic_version AS SELECT 'ae1027a6acf1' AS version_num",
            "CREATE TABLE organisations (id uuid)",
        ],
        ids=["empty", "version table without a row", "another application's", "only a table"],
    )
    def test_without_consentos_one_sentence_says_to_migrate_it_first(
        self, empty: Engine, prepare: str
    ) -> None:
        if prepare:
            run(empty, prepare)
        assert refused(empty) == (
            "ConsentOS has not been migrated in this database yet: run ConsentOS's own migrations"
            " first, then this again."
        )

    def test_an_instance_that_was_lost_is_not_made_in_consentos_place(self, beside: Engine) -> None:
        run(beside, "DROP TABLE instance")
        assert refused(beside).startswith(
            "ConsentOS's database is at revision 0009, but its table 'instance' is missing: restore"
        )

    def test_consentos_can_be_installed_after_a_refusal_and_telemetry_then(
        self, empty: Engine
    ) -> None:
        refused(empty)
        run(empty, CONSENTOS_0005)
        assert move(empty) == ("base", HEAD)

    def test_consentos_can_be_installed_after_a_release_that_made_the_table_itself(
        self, bare: Engine
    ) -> None:
        move(bare, "0001")
        run(bare, "COMMENT ON TABLE instance IS 'made by consentos-telemetry'")
        with pytest.raises(MigrationRefusedError, match=r"was dropped\. .*: run ConsentOS's own"):
            move(bare)
        assert "instance" not in tables(bare)
        run(bare, CONSENTOS_0005)
        assert move(bare) == ("0001", HEAD)

    def test_such_a_table_with_rows_in_it_is_left_to_its_owner(self, bare: Engine) -> None:
        run(bare, "COMMENT ON TABLE instance IS 'made by consentos-telemetry'")
        run(bare, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), NULL)")
        assert "it has rows: drop it" in refused(bare)


def refused(db: Engine) -> str:
    """Return the one sentence with which a migration refuses, and see that it changed nothing."""
    before = describe_all(db)
    with pytest.raises(MigrationRefusedError) as refusal:
        move(db)
    assert describe_all(db) == before
    sentence = str(refusal.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_two_migrations_at_once_both_succeed_and_one_does_the_work(bare: Engine) -> None:
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with ThreadPoolExecutor(2) as pool, bare.connect() as gate:
        gate.execute(text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry'))"))
        results = [pool.submit(move, bare) for _ in range(2)]
        deadline = time.monotonic() + 10
        while gate.scalar(waiting) != 2 and time.monotonic() < deadline:
            continue
        assert gate.scalar(waiting) == 2
        gate.rollback()
        ended = sorted(each.result(30) for each in results)
    assert ended == [(HEAD, HEAD), ("base", HEAD)]


def columns_of(db: Engine, table: str) -> dict[str, tuple[str, bool]]:
    return {
        column["name"]: (column["type"].compile(dialect=db.dialect), column["nullable"])
        for column in inspect(db).get_columns(table)
    }


@pytest.mark.parametrize("table", sorted(OWN))
@pytest.mark.parametrize("kind", ["bare", "beside"])
def test_the_models_and_the_migrated_tables_agree(
    request: pytest.FixtureRequest, table: str, kind: str
) -> None:
    db: Engine = request.getfixturevalue(kind)
    move(db)
    model = METADATA.tables[table]
    assert columns_of(db, table) == {
        column.name: (column.type.compile(dialect=db.dialect), bool(column.nullable))
        for column in model.columns
    }
    key = inspect(db).get_pk_constraint(table)["constrained_columns"]
    assert key == [column.name for column in model.primary_key]


def test_every_table_of_the_models_is_made_and_no_other(bare: Engine) -> None:
    move(bare)
    assert tables(bare) - {VERSIONS} == set(METADATA.tables)
