"""Migration 0001 makes telemetry's tables, and leaves ConsentOS's alone."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, inspect, text

from app import database
from app.demo import consentos
from app.models import METADATA
from migrations import MigrationRefusedError, migrate
from tests.conftest import Databases
from tests.database import count, one, run

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
        return migrate(connection, "telemetry", to)


@pytest.fixture
def empty(empty_database: str) -> Engine:
    return database.engine(empty_database)


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


class TestAnEmptyDatabase:
    def test_goes_up_down_and_up_again(self, empty: Engine) -> None:
        assert move(empty) == ("base", "0001")
        first = describe_all(empty)
        assert tables(empty) == {*OWN, VERSIONS}
        assert move(empty, "base") == ("0001", "base")
        assert tables(empty) <= {VERSIONS}
        assert move(empty) == ("base", "0001")
        assert describe_all(empty) == first

    def test_is_not_changed_by_a_second_upgrade(self, empty: Engine) -> None:
        move(empty)
        run(empty, "INSERT INTO telemetry_notice VALUES (1, now())")
        assert move(empty) == ("0001", "0001")
        assert count(empty, "telemetry_notice") == 1

    def test_keeps_no_function_and_no_type_of_telemetry_after_a_downgrade(
        self, empty: Engine
    ) -> None:
        move(empty)
        move(empty, "base")
        left = describe_all(empty)
        assert isinstance(left, list)
        assert {name for name in left if not name.startswith(VERSIONS)} == set()

    def test_records_its_revision_in_a_version_table_of_its_own(self, empty: Engine) -> None:
        move(empty)
        assert one(empty, f"SELECT version_num FROM {VERSIONS}") == "0001"
        assert "alembic_version" not in tables(empty)

    def test_gets_an_instance_that_is_marked_as_ours(self, empty: Engine) -> None:
        move(empty)
        comment = one(empty, "SELECT obj_description('instance'::regclass, 'pg_class')")
        assert comment == "made by consentos-telemetry"

    @pytest.mark.parametrize("comment", ["NULL", "'mine'"])
    def test_keeps_on_downgrade_an_instance_whose_mark_was_taken_away(
        self, empty: Engine, comment: str
    ) -> None:
        move(empty)
        run(empty, "INSERT INTO instance VALUES (gen_random_uuid())")
        run(empty, f"COMMENT ON TABLE instance IS {comment}")
        move(empty, "base")
        assert count(empty, "instance") == 1
        move(empty)
        assert count(empty, "instance") == 1


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

    def test_no_table_of_consentos_is_waited_for(self, beside: Engine) -> None:
        with beside.begin() as other:
            every = ", ".join(sorted(tables(beside)))
            other.execute(text(f"LOCK TABLE {every} IN ACCESS EXCLUSIVE MODE"))
            assert move(beside) == ("base", "0001")
            assert move(beside, "base") == ("0001", "base")

    def test_an_instance_without_an_alembic_version_is_adopted_too(self, beside: Engine) -> None:
        run(beside, "DROP TABLE alembic_version")
        before = host(beside)
        move(beside)
        assert host(beside) == before


class TestRefusal:
    @pytest.mark.parametrize(
        ("prepare", "reached"),
        [
            ("UPDATE alembic_version SET version_num = '0004'", "0004"),
            ("UPDATE alembic_version SET version_num = '0001'", "0001"),
            ("DELETE FROM alembic_version", "none"),
            ("DROP TABLE alembic_version", "unknown"),
            ("UPDATE alembic_version SET version_num = 'ae1027a6acf1'", "unknown"),
            ("DROP TABLE organisations CASCADE; UPDATE alembic_version SET version_num = '0004'",
             "0004"),
            ("DROP TABLE organisations CASCADE; DELETE FROM alembic_version", "none"),
        ],
    )  # fmt: skip
    def test_below_0005_one_sentence_says_to_upgrade_consentos_first(
        self, beside: Engine, prepare: str, reached: str
    ) -> None:
        for statement in ("DROP TABLE instance", *prepare.split(";")):
            run(beside, statement)
        before = describe_all(beside)
        with pytest.raises(MigrationRefusedError) as refusal:
            move(beside)
        sentence = str(refusal.value)
        assert f"revision {reached}," in sentence
        assert sentence.endswith("upgrade ConsentOS first.")
        assert "\n" not in sentence
        assert describe_all(beside) == before

    def test_an_instance_that_was_lost_is_not_made_in_consentos_place(self, beside: Engine) -> None:
        run(beside, "DROP TABLE instance")
        with pytest.raises(MigrationRefusedError, match=r"0009.*restore it first\.$"):
            move(beside)
        assert "telemetry_outbox" not in tables(beside)

    @pytest.mark.parametrize("revisions", ["('ae1027a6acf1')", "('ae1027a6acf1'), ('0004')"])
    def test_another_applications_history_is_not_taken_for_consentos(
        self, empty: Engine, revisions: str
    ) -> None:
        run(empty, "CREATE TABLE alembic_version (version_num text)")
        run(empty, f"INSERT INTO alembic_version VALUES {revisions}")
        before = host(empty)
        move(empty)
        assert "instance" in tables(empty)
        move(empty, "base")
        assert host(empty) == before


def test_two_migrations_at_once_both_succeed_and_one_does_the_work(empty: Engine) -> None:
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with ThreadPoolExecutor(2) as pool, empty.connect() as gate:
        gate.execute(text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry'))"))
        results = [pool.submit(move, empty) for _ in range(2)]
        deadline = time.monotonic() + 10
        while gate.scalar(waiting) != 2 and time.monotonic() < deadline:
            continue
        assert gate.scalar(waiting) == 2
        gate.rollback()
        ended = sorted(each.result(30) for each in results)
    assert ended == [("0001", "0001"), ("base", "0001")]


def columns_of(db: Engine, table: str) -> dict[str, tuple[str, bool]]:
    return {
        column["name"]: (column["type"].compile(dialect=db.dialect), column["nullable"])
        for column in inspect(db).get_columns(table)
    }


@pytest.mark.parametrize("table", sorted(OWN))
@pytest.mark.parametrize("kind", ["empty", "beside"])
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


def test_every_table_of_the_models_is_made_and_no_other(empty: Engine) -> None:
    move(empty)
    assert tables(empty) - {VERSIONS} == set(METADATA.tables)
