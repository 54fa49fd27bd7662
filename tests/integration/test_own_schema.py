"""Telemetry's tables in a schema of their own, as the operator's page has it: all commands work."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, MetaData, make_url, text

from app import database
from demo import consentos
from tests.support.command import PASSWORD, command
from tests.support.database import one, run
from tests.support.processes import ROOT, Processes
from tests.support.receiver import Receiver

PAGE = (ROOT / "docs" / "operate.md").read_text()
_, _, SECTION = PAGE.partition("\n## Put the tables into a schema of their own\n")
SECTION, _, _ = SECTION.partition("\n## ")
SQL = re.findall(r"(?ms)^ *```sql\n(.*?)^ *```", SECTION)


@pytest.fixture
def consentos_db(empty_database: str) -> Engine:
    """A database that ConsentOS has migrated, and telemetry has not."""
    engine = database.engine(empty_database)
    with engine.begin() as connection:
        consentos.create_tables(connection)
        consentos.populate(connection)
    return engine


@pytest.fixture
def role(consentos_db: Engine) -> Iterator[str]:
    """The name of a role for the pipeline, which is gone after the test."""
    name = f"telemetry_{uuid4().hex}"
    yield name
    with consentos_db.begin() as connection:
        if connection.scalar(text("SELECT to_regrole(:name) IS NOT NULL"), {"name": name}):
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


@pytest.fixture
def variables(empty_database: str, role: str, receiver: Receiver, redis_url: str) -> dict[str, str]:
    """What both roles need, in the plain layout."""
    small = make_url(empty_database).set(username=role, password=PASSWORD)
    return {
        "DATABASE_URL": small.render_as_string(hide_password=False),
        "MIGRATION_DATABASE_URL": empty_database,
        "REDIS_URL": redis_url,
        "ENVIRONMENT": "production",
        "TELEMETRY_ENDPOINT": receiver.url,
    }


def in_a_schema(variables: dict[str, str], db: Engine, role: str) -> dict[str, str]:
    """Do what the page says; return the variables that it has the operator set."""
    run(db, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    for statement in filter(str.strip, SQL[0].split(";")):
        run(db, statement.replace("ROLE telemetry", f"ROLE {role}"))
    return {**variables, "MIGRATION_DATABASE_URL": owners(variables)}


def owners(variables: dict[str, str]) -> str:
    """Return the owner's URL with the options that the page has for it."""
    (options,) = re.findall(r"MIGRATION_DATABASE_URL=\S+\?(options=[^\s`]+)", SECTION)
    url = variables["MIGRATION_DATABASE_URL"]
    return f"{url}{'&' if '?' in url else '?'}{options}"


def reflected(db: Engine) -> MetaData:
    metadata = MetaData()
    metadata.reflect(db)
    return metadata


def dropped_by_alembic(db: Engine, metadata: MetaData) -> list[str]:
    """Return the tables in ConsentOS's autogenerate that its models do not know."""
    with db.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    assert {each[0] for each in found} <= {"remove_table", "remove_index"}
    return sorted(each[1].name for each in found if each[0] == "remove_table")


def test_every_command_works_where_the_tables_have_a_schema_of_their_own(
    variables: dict[str, str],
    consentos_db: Engine,
    role: str,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    db = consentos_db
    known = reflected(db)
    environment = in_a_schema(variables, db, role)

    def succeeds(*arguments: str) -> str:
        ended = command(environment, *arguments)
        assert ended.code == 0, (arguments, ended.err)
        return ended.out

    succeeds("migrate")
    granted = command(environment, "grants", "--role", role, "--apply")
    assert (granted.code, granted.err) == (0, "")
    assert dropped_by_alembic(db, known) == []
    places = "SELECT string_agg(DISTINCT relnamespace::regnamespace::text, ',') FROM pg_class"
    assert one(db, f"{places} WHERE relkind = 'r' AND relname LIKE 'telemetry%'") == "telemetry"

    processes = Processes(environment, tmp_path)
    try:
        solo = processes.start("solo")
        solo.wait_for("telemetry.notice")
        solo.signal(signal.SIGTERM)
        assert solo.wait() == 0
    finally:
        processes.end()
    assert one(db, "SELECT count(*) FROM telemetry.telemetry_notice") == 1
    assert "telemetry.failed" not in solo.output()

    status = succeeds("status")
    assert "no more than it needs" in status
    succeeds("preview")
    assert "has been sent (now" in succeeds("send")
    (request,) = receiver.requests
    sent = str(one(db, "SELECT payload::text FROM telemetry.telemetry_outbox"))
    assert request.body.decode() == sent
    assert sent in succeeds("audit", "last")
    assert "sent" in succeeds("audit")
    assert "No problem in 1 heartbeat" in succeeds("audit", "--verify")
    succeeds("status", "--check")
    succeeds("migrate")
    succeeds("grants", "--role", role, "--apply")

    first = one(db, "SELECT id FROM instance")
    assert str(first) in succeeds("rotate", "--yes")
    assert one(db, "SELECT id FROM instance") != first
    assert "1 heartbeat" in succeeds("forget", "--yes")
    assert one(db, "SELECT count(*) FROM telemetry.telemetry_outbox") == 0
    succeeds("migrate", "--down", "--yes")
    assert one(db, "SELECT count(*) FROM pg_class WHERE relname LIKE 'telemetry%'") == 0
    assert dropped_by_alembic(db, known) == []


@pytest.mark.parametrize(
    ("setting", "options", "finds"),
    [
        (None, "", False),
        ("other, public", "", False),
        ('telemetry, "public"', "", True),
        ("public", "-csearch_path=telemetry,public", True),
    ],
)
def test_grants_says_whether_the_role_finds_the_tables(
    setting: str | None,
    options: str,
    finds: bool,  # noqa: FBT001 - pytest passes it by name
    variables: dict[str, str],
    consentos_db: Engine,
    role: str,
) -> None:
    environment = in_a_schema(variables, consentos_db, role)
    change = f"SET search_path = {setting}" if setting else "RESET search_path"
    run(consentos_db, f"ALTER ROLE {role} {change}")
    if options:
        url = make_url(variables["DATABASE_URL"]).update_query_dict({"options": options})
        environment["DATABASE_URL"] = url.render_as_string(hide_password=False)
    assert command(environment, "migrate").code == 0
    granted = command(environment, "grants", "--role", role, "--apply")
    assert granted.code == 0
    search = f'ALTER ROLE "?{role}"? SET search_path = telemetry, public;'
    assert bool(re.search(search, granted.err)) is not finds
    if options:
        assert command(environment, "preview").code == 0


def test_alembic_would_drop_the_tables_in_the_plain_layout_and_not_after_they_have_moved(
    variables: dict[str, str], consentos_db: Engine, role: str
) -> None:
    db = consentos_db
    known = reflected(db)
    assert command(variables, "migrate").code == 0
    assert command(variables, "grants", "--role", role, "--apply").code == 0
    ours = [
        "telemetry_alembic_version",
        "telemetry_attempt",
        "telemetry_notice",
        "telemetry_outbox",
    ]
    assert dropped_by_alembic(db, known) == ours
    assert command(variables, "send").code == 0

    setup, move = SQL
    for statement in filter(str.strip, (setup + move).split(";")):
        run(db, statement.replace("ROLE telemetry", f"ROLE {role}"))
    moved = {**variables, "MIGRATION_DATABASE_URL": owners(variables)}
    assert dropped_by_alembic(db, known) == []
    assert command(moved, "migrate").code == 0
    assert command(moved, "grants", "--role", role, "--apply").code == 0
    assert "No problem in 1 heartbeat" in command(moved, "audit", "--verify").out
    assert "no more than it needs" in command(moved, "status").out
    assert command(moved, "migrate", "--down", "--yes").code == 0
    assert one(db, "SELECT count(*) FROM pg_class WHERE relname LIKE 'telemetry%'") == 0
