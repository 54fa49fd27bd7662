"""What deploy/ and the operator's page say, done for real to a database."""

import re
from collections.abc import Iterator
from uuid import uuid4

import pytest
import yaml
from sqlalchemy import Engine, make_url, text

from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import attempts, count, give_notice, one, run
from tests.support.processes import ROOT

NOTICED_AT = "2026-05-01T12:00:00Z"
CONNECTION_REFUSED = "http://127.0.0.1:1/v1/heartbeat"


def health_check() -> list[str]:
    """Return the arguments of the command that compose asks for the health of the sender."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    kind, *words = map(str, services["telemetry"]["healthcheck"]["test"])
    assert [kind, *words[:3]] == ["CMD", "python", "-m", "app"]
    return words[3:]


class TestTheHealthCheck:
    def test_passes_while_the_collector_refuses_every_connection(
        self,
        environment: dict[str, str],
        clock: Clock,
        db: Engine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refused = {**environment, "TELEMETRY_ENDPOINT": CONNECTION_REFUSED}
        give_notice(db, NOTICED_AT)
        clock("2026-05-02T02:30:00Z")
        monkeypatch.setenv("TELEMETRY_ENDPOINT", CONNECTION_REFUSED)
        assert command(refused, "send").code == 1
        assert {each["outcome"] for each in attempts(db)} == {"retryable"}
        for hour in ("02:31", "20:00"):
            clock(f"2026-05-02T{hour}:00Z")
            assert command(refused, *health_check()).code == 0

    def test_fails_when_nobody_has_written_the_days_heartbeat_for_an_hour(
        self, environment: dict[str, str], clock: Clock, db: Engine
    ) -> None:
        give_notice(db, NOTICED_AT)
        clock("2026-05-02T03:29:00Z")
        assert command(environment, *health_check()).code == 0
        clock("2026-05-02T03:30:00Z")
        assert command(environment, *health_check()).code == 1

    def test_passes_while_the_tables_cannot_be_counted_and_says_why(
        self, environment: dict[str, str], clock: Clock, db: Engine
    ) -> None:
        give_notice(db, NOTICED_AT)
        run(db, "ALTER TABLE scan_jobs RENAME TO moved")
        clock("2026-05-02T09:00:00Z")
        ended = command(environment, *health_check())
        assert ended.code == 0
        assert ended.sentence == (
            'The day\'s heartbeat cannot be written: relation "scan_jobs" does not exist.'
        )

    def test_passes_while_telemetry_is_off(
        self, environment: dict[str, str], clock: Clock, db: Engine
    ) -> None:
        give_notice(db, NOTICED_AT)
        clock("2026-05-02T09:00:00Z")
        off = {**environment, "TELEMETRY_ENABLED": "false"}
        assert command(off, *health_check()).code == 0


@pytest.fixture
def role(db: Engine) -> Iterator[str]:
    """The name of a role that the test makes, and that is gone after it in any case."""
    name = f"telemetry_{uuid4().hex}"
    yield name
    with db.begin() as connection:
        if connection.scalar(text("SELECT to_regrole(:name) IS NOT NULL"), {"name": name}):
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


@pytest.fixture
def released(
    environment: dict[str, str], database_url: str, role: str, server_url: str
) -> dict[str, str]:
    """The environment of a release: the owner's URL, and the URL of the role that is to send."""
    small = make_url(server_url).set(username=role, password="secret")  # noqa: S106 - nobody's
    return {
        **environment,
        "MIGRATION_DATABASE_URL": database_url,
        "DATABASE_URL": small.render_as_string(hide_password=False),
    }


def holdings(db: Engine, role: str, kind: str) -> int:
    """Return how many things of this database a role owns (o), or has rights on (a)."""
    return int(
        one(
            db,
            "SELECT count(*) FROM pg_shdepend WHERE refobjid = to_regrole(:role)"
            " AND deptype = :kind",
            role=role,
            kind=kind,
        )
    )


def test_a_release_may_be_repeated_and_leaves_a_role_that_owns_nothing(
    released: dict[str, str], db: Engine, role: str
) -> None:
    for _ in range(2):
        assert command(released, "migrate").code == 0
        assert command(released, "grants", "--role", role, "--apply").code == 0
    assert holdings(db, role, "a") > 0
    assert holdings(db, role, "o") == 0


def test_a_removal_as_documented_takes_all_of_telemetry_and_nothing_of_consentos(
    released: dict[str, str], pipeline: Pipeline, clock: Clock, db: Engine, role: str
) -> None:
    assert command(released, "grants", "--role", role, "--apply").code == 0
    give_notice(db, NOTICED_AT)
    clock("2026-05-02T02:30:00Z")
    assert pipeline.write_heartbeat()
    before = {table: count(db, table) for table in ("sites", "users", "consent_records")}
    page = (ROOT / "docs" / "operate.md").read_text()
    _, _, steps = page.partition("\n## Remove it\n")
    (sql,) = re.findall(r"```sql\n(.*?)```", steps, re.DOTALL)

    known = str(one(db, "SELECT id FROM instance"))
    assert known in command(released, "forget", "--yes").out
    assert command(released, "migrate", "--down", "--yes").code == 0
    run(db, sql.replace("telemetry", role))

    assert one(db, "SELECT to_regrole(:role) IS NULL", role=role)
    assert one(db, "SELECT count(*) FROM pg_class WHERE relname LIKE 'telemetry%'") == 0
    assert {table: count(db, table) for table in before} == before
    assert count(db, "instance") == 0
