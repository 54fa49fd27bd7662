"""Every command teaches, and tells what is wrong in one sentence without a value in it."""

import json
import re

import pytest
from sqlalchemy import Engine, inspect, make_url

from app import database
from app.payload import SCHEMA_VERSION, json_schema
from tests.support.command import PASSWORD, Ended, command, commands
from tests.support.database import CONSENTOS_0005, HEAD, run
from tests.support.processes import ROOT

COMMANDS = (
    *("status", "preview", "audit", "schema"),
    *("send", "migrate", "grants", "rotate", "forget"),
)
ASKING = (
    *("status", "preview", "preview --diff", "audit", "audit last", "audit --verify"),
    *("send", "migrate", "grants --role pipeline --apply", "rotate --yes", "forget --yes"),
)
"""The commands that need a database."""


@pytest.fixture
def switched_on() -> dict[str, str]:
    """Telemetry is on; where its database is, a test says."""
    return {"ENVIRONMENT": "production", "TELEMETRY_ENDPOINT": "http://127.0.0.1:1/"}


def test_the_help_of_every_command_explains_it() -> None:
    overview, *helped = commands({}, "--help", *(f"{name} --help" for name in COMMANDS))
    assert {ended.code for ended in (overview, *helped)} == {0}
    for words in ("TELEMETRY_ENABLED=false", *COMMANDS):
        assert words in reported(overview)
    teaches = dict(zip(COMMANDS, map(reported, helped), strict=True))
    for name, words in (
        ("status", "--check --json an hour after it was due, probe restarts the process"),
        ("preview", "store nothing, send nothing whether telemetry is on or off --diff --json"),
        ("audit", "[ID DAY last] newest first exact bytes --json --verify Exits with 1"),
        ("audit", "--limit --all --state pending, --since"),
        (
            "audit",
            "--log telemetry payload stdin --since log begins --export JSON Lines new file,",
        ),
        ("schema", "the JSON Schema of the heartbeat"),
        ("send", "with 0 when 3 when telemetry is off never sends before the time receiver asked"),
        ("migrate", "--down --yes MIGRATION_DATABASE_URL alembic_version are never touched"),
        ("grants", "--role --apply SQL MIGRATION_DATABASE_URL password keeps"),
        ("rotate", "new random pending is discarded MIGRATION_DATABASE_URL off --yes --json"),
        ("forget", "the outbox, its attempts notice --yes --json turns nothing off new id"),
    ):
        plain = {word.strip(",.:;") for word in teaches[name].split()}
        assert {word.strip(",.:;") for word in words.split()} <= plain, name


def reported(ended: Ended) -> str:
    """Return a help's words without its frames and line ends."""
    return re.sub(r"[^\w\[\]=,-]+", " ", ended.out)


def test_the_schema_is_the_one_that_is_published() -> None:
    printed = command({}, "schema")
    assert printed.code == 0
    assert printed.json == json_schema()
    published = ROOT / "docs" / f"heartbeat.v{SCHEMA_VERSION}.schema.json"
    assert printed.json == json.loads(published.read_text())


def test_a_command_that_does_not_exist_is_a_wrong_use() -> None:
    assert command({}, "delete").code == 2


class TestADatabase:
    def test_that_is_not_named_is_asked_for(self, switched_on: dict[str, str]) -> None:
        for ended in commands(switched_on, *ASKING):
            assert ended.code == 2
            assert ended.sentence == "DATABASE_URL is not set."

    @pytest.mark.parametrize(
        "url",
        [
            f"mysql://operator:{PASSWORD}@127.0.0.1/consentos",
            f"postgresql://operator:{PASSWORD}@127.0.0.1:{PASSWORD}/consentos",
            PASSWORD,
        ],
    )
    def test_that_is_named_by_no_url_is_reported_by_its_variable_alone(
        self, switched_on: dict[str, str], url: str
    ) -> None:
        for ended in commands({**switched_on, "DATABASE_URL": url}, "preview", "migrate"):
            assert ended.code == 2
            assert ended.sentence.startswith("DATABASE_URL ")

    def test_that_cannot_be_reached_is_reported_without_its_address(
        self, switched_on: dict[str, str]
    ) -> None:
        url = f"postgresql://operator:{PASSWORD}@127.0.0.1:1/consentos"
        for ended in commands({**switched_on, "DATABASE_URL": url}, *ASKING):
            assert ended.code == 1
            assert ended.sentence == "The database cannot be reached."

    def test_that_does_not_exist_is_reported(
        self, environment: dict[str, str], database_url: str
    ) -> None:
        gone = database_url.replace("telemetry_test_", "telemetry_gone_")
        ended = command(environment, "status", DATABASE_URL=gone)
        assert ended.code == 1
        assert ended.sentence == "The database or its role does not exist."

    def test_that_was_not_migrated_is_reported_with_the_remedy(
        self, switched_on: dict[str, str], empty_database: str
    ) -> None:
        here = {**switched_on, "DATABASE_URL": empty_database}
        for ended in commands(here, "status", "preview", "audit", "send"):
            assert ended.code == 1
            assert ended.sentence.endswith("run `python -m app migrate` first.")

    def test_that_refuses_the_password_is_reported_without_it(
        self, switched_on: dict[str, str], locked_url: str
    ) -> None:
        for ended in commands({**switched_on, "DATABASE_URL": locked_url}, "status", "send"):
            assert ended.code == 1
            assert ended.sentence == "The database refuses the password."


class TestMigrate:
    def test_makes_the_tables_once_and_removes_them_when_that_is_confirmed(
        self, switched_on: dict[str, str], empty_database: str
    ) -> None:
        run(database.engine(empty_database), CONSENTOS_0005)
        here = {**switched_on, "MIGRATION_DATABASE_URL": empty_database}
        made, removed = f"telemetry: base -> {HEAD}\n", f"telemetry: {HEAD} -> base\n"
        assert command(here, "migrate").out == made
        assert command(here, "migrate").out == f"telemetry: at {HEAD}\n"
        for answer in ("n\n", ""):
            assert command(here, "migrate", "--down", typed=answer).code == 1
        assert command(here, "migrate").out == f"telemetry: at {HEAD}\n"
        confirmed = command(here, "migrate", "--down", typed="y\n")
        assert confirmed.code == 0
        assert confirmed.out.endswith(removed)
        assert command(here, "migrate").out == made
        last = command(here, "migrate", "--down", "--yes")
        assert (last.code, last.out) == (0, removed)

    def test_uses_its_own_url_before_the_pipelines(
        self, switched_on: dict[str, str], empty_database: str
    ) -> None:
        run(database.engine(empty_database), CONSENTOS_0005)
        here = {**switched_on, "MIGRATION_DATABASE_URL": empty_database}
        unreachable = "postgresql://operator@127.0.0.1:1/consentos"
        assert command(here, "migrate", DATABASE_URL=unreachable).code == 0

    def test_does_not_put_the_pipelines_url_in_the_place_of_its_own_misspelt_one(
        self, switched_on: dict[str, str], empty_database: str
    ) -> None:
        here = {**switched_on, "DATABASE_URL": empty_database}
        ended = command(here, "migrate", MIGRATION_DATABASE_URL=f"postgres//:{PASSWORD}@nowhere")
        assert inspect(database.engine(empty_database)).get_table_names() == []
        assert (ended.code, ended.out) == (2, "")
        assert ended.sentence.startswith("MIGRATION_DATABASE_URL ")

    def test_says_in_one_sentence_that_consentos_comes_first_and_makes_nothing(
        self, switched_on: dict[str, str], empty_database: str
    ) -> None:
        db = database.engine(empty_database)
        here = {**switched_on, "DATABASE_URL": empty_database}
        ended = command(here, "migrate")
        assert (ended.code, ended.out) == (1, "")
        assert ended.sentence.endswith("run ConsentOS's own migrations first, then this again.")
        assert inspect(db).get_table_names() == []
        run(db, CONSENTOS_0005)
        assert command(here, "migrate").code == 0

    def test_names_the_command_that_gives_the_role_what_a_restore_without_rights_has_lost(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        role = make_url(administered["DATABASE_URL"]).username
        run(db, f"REVOKE ALL ON telemetry_attempt, telemetry_notice FROM {role}")
        ended = command(administered, "migrate")
        assert (ended.code, ended.out) == (0, f"telemetry: at {HEAD}\n")
        assert ended.sentence == (
            f"The role {role} lacks rights on telemetry_attempt, telemetry_notice: now run"
            f" `python -m app grants --role {role} --apply`."
        )
        assert command(administered, "grants", "--role", str(role), "--apply").code == 0
        assert command(administered, "migrate").err == ""

    def test_mends_what_a_partial_restore_left_and_says_what_it_did(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        run(db, "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox")
        ended = command(administered, "migrate")
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.splitlines() == [
            f"telemetry: at {HEAD}",
            "Repaired. These were missing:",
            "  telemetry_outbox: telemetry_outbox_frozen TRIGGER d0715aac988669d2d631386206fc3070",
            "telemetry_notice: 0 rows kept",
            "telemetry_outbox: 0 rows kept",
            "telemetry_attempt: 0 rows kept",
        ]
        assert command(administered, "migrate").out == f"telemetry: at {HEAD}\n"
